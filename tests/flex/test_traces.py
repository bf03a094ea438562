"""Mods are traced once, and an old trace is never taken for a mod that has changed."""

from __future__ import annotations

import functools
import gc
import threading
import warnings
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, create_block_mask

import orchard_ops
from orchard_ops.flex import closure, traces

pytestmark = pytest.mark.usefixtures("fresh_stats")


def some(device: str) -> Tensor:
    return torch.randn(1, 2, 20, 8).to(device)


class _Counted:
    """Counts the traces that are made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        original = traces.trace

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(traces, "trace", counted)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> _Counted:
    return _Counted(monkeypatch)


def attend(score_mod: Any, q: Tensor) -> Tensor:
    return orchard_ops.flex_attention(q, q, q, score_mod)


def test_a_function_made_anew_is_not_traced_again(made: _Counted):
    q = some("mps")

    def mod(bias: Tensor) -> Any:
        return lambda score, b, h, q_idx, kv_idx: score + bias[h] * kv_idx

    results = [attend(mod(torch.tensor([n, -n]).to("mps")), q) for n in (0.1, 0.2, 0.1)]
    assert made.count == 1
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])


NUMBER = 1.0
_settings: dict[str, float] = {"slope": 1.0}


class _Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tensor([0.5, 0.25]))
        self.slope = 1.0

    def score_mod(
        self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor
    ) -> Tensor:
        return score + self.slope * self.bias[h] * (kv_idx - q_idx)


def _by_global(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score * NUMBER


def _by_dict(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score * _settings["slope"]


def _by_default(
    score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor, slope: float = 1.0
) -> Tensor:
    return score * slope


def _by_another(score: Tensor, *indices: Tensor) -> Tensor:
    return _by_global(score, *indices)


def _set_global(x: float) -> None:
    global NUMBER
    NUMBER = x


CHANGES = (
    "cell", "global", "global of another", "dict", "default", "attribute",
    "attribute in a closure", "partial", "shape",
)  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_what_a_mod_reads_may_change_between_calls(what: str):
    """A result with the number 2 is that of a mod that never had another number."""
    q = some("mps")
    number = 1.0
    model = _Model().to("mps")
    sizes = torch.zeros(1, device="mps")

    def by_cell(score: Tensor, *_: Tensor) -> Tensor:
        return score * number

    mods = {
        "cell": by_cell,
        "global": _by_global,
        "global of another": _by_another,
        "dict": _by_dict,
        "default": _by_default,
        "attribute": model.score_mod,
        "attribute in a closure": lambda score, b, h, i, j: model.score_mod(score, b, h, i, j),
        "partial": functools.partial(lambda number, score, *_: score * number, 1.0),
        "shape": lambda score, *_: score * sizes.shape[0],
    }
    right = {name: (lambda score, *_: score * 2.0) for name in mods}
    two = _Model().to("mps")
    two.slope = 2.0
    right["attribute"] = right["attribute in a closure"] = two.score_mod
    try:
        before = attend(mods[what], q)
        number, model.slope, sizes, _settings["slope"] = 2.0, 2.0, torch.zeros(2).to("mps"), 2.0
        _set_global(2.0)
        _by_default.__defaults__ = (2.0,)
        mods["partial"] = functools.partial(mods["partial"].func, 2.0)
        after = attend(mods[what], q)
    finally:
        _set_global(1.0)
        _settings["slope"] = 1.0
        _by_default.__defaults__ = (1.0,)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, attend(right[what], q), rtol=1e-5, atol=1e-6)


def test_code_that_is_not_followed_is_traced_in_every_call(made: _Counted):
    class Table:
        def __init__(self, number: float) -> None:
            self.number = number

        def __getitem__(self, name: str) -> float:
            return self.number

    q, table = some("mps"), Table(1.0)

    def score_mod(score: Tensor, *_: Tensor) -> Tensor:
        return score * table["anything"]

    assert closure.snapshot(score_mod) is None
    first = attend(score_mod, q)
    table.number = 2.0
    second = attend(score_mod, q)
    assert made.count == 2 and not torch.equal(first, second)


def test_two_tensors_are_not_taken_for_one(made: _Counted):
    """Where the first call's two names were one tensor, the second's may be two."""
    q = some("mps")
    one, other = torch.tensor([0.5, 1.0]).to("mps"), torch.tensor([2.0, 3.0]).to("mps")

    def mod(x: Tensor, y: Tensor) -> Any:
        return lambda score, b, h, q_idx, kv_idx: score * x[h] + y[h] * kv_idx

    attend(mod(one, one), q)
    out = attend(mod(one, other), q)
    assert made.count == 2
    right = attend(lambda score, b, h, q_idx, kv_idx: score * one[h] + other[h] * kv_idx, q)
    assert torch.equal(out, right)


def test_no_trace_holds_what_it_captured():
    def call() -> weakref.ref[Tensor]:
        q, table = some("mps"), torch.randn(20, 20).to("mps")
        attend(lambda score, b, h, q_idx, kv_idx: score + table[q_idx, kv_idx], q)
        return weakref.ref(table)

    gone = call()
    gc.collect()
    assert gone() is None


def test_masks_joined_by_and_masks_are_followed():
    causal = lambda b, h, q_idx, kv_idx: q_idx >= kv_idx  # noqa: E731
    window = lambda b, h, q_idx, kv_idx: q_idx - kv_idx < 5  # noqa: E731
    assert closure.snapshot(and_masks(causal, window)) is not None


class _Slopes:
    """Tensors that are read in other ways than as an attribute that is stored."""

    def __init__(self, start: float) -> None:
        self.start = start
        self.marked = torch.zeros(2).to("mps")
        self.marked.factor = start
        self.marked.slopes = self.stored = torch.tensor([start, 1.0]).to("mps")
        self.trained = torch.zeros(2, device="mps", requires_grad=True)
        self.trained.grad = self.stored

    @property
    def made(self) -> Tensor:
        return torch.full((2,), self.start, device="mps")

    @property
    def doubled(self) -> Tensor:
        return self.stored * 2

    def __getattr__(self, name: str) -> Tensor:
        if name != "answered":
            raise AttributeError(name)
        return self.stored * 3


READ = {
    "a property of numbers": lambda slopes: lambda s, b, h, *_: s * slopes.made[h],
    "a property of tensors": lambda slopes: lambda s, b, h, *_: s * slopes.doubled[h],
    "__getattr__": lambda slopes: lambda s, b, h, *_: s * slopes.answered[h],
    "a tensor's grad": lambda slopes: lambda s, b, h, *_: s * slopes.trained.grad[h],
    "a tensor of a tensor": lambda slopes: lambda s, b, h, *_: s * slopes.marked.slopes[h],
    "a number of a tensor": lambda slopes: lambda s, *_: s * slopes.marked.factor,
}


@pytest.mark.parametrize("name", READ)
def test_what_code_answers_for_is_asked_in_every_call(name: str):
    q = some("mps")
    results = [attend(READ[name](_Slopes(start)), q) for start in (1.0, 2.0)]
    traces._of_functions.clear()
    assert torch.equal(results[1], attend(READ[name](_Slopes(2.0)), q))
    assert not torch.equal(*results)


def test_stored_attributes_are_followed():
    """What is asked in every call is slow: this is for code that has to be."""

    class Settings(NamedTuple):
        slopes: Tensor

    class Slotted:
        __slots__ = ("slopes",)

    slotted, module, model = Slotted(), torch.nn.Module(), _Model()
    slotted.slopes = module.slopes = model.bias
    owners = (Settings(model.bias), slotted, module)
    for owner in owners:
        assert closure.snapshot(lambda s, b, h, *_: s * owner.slopes[h]) is not None  # noqa: B023
    assert closure.snapshot(lambda s, b, h, *_: s * model.bias[h]) is not None
    assert closure.snapshot(lambda s, b, h, *_: s * model.bias.shape[0]) is not None


VALUES = {
    "item": lambda x: lambda s, *_: s * x.item(),
    "float": lambda x: lambda s, *_: s * float(x),
    "if": lambda x: lambda s, *_: s if x > 1.0 else s * 2.0,
}


@pytest.mark.parametrize("device", ("cpu", "mps"))
@pytest.mark.parametrize("name", VALUES)
def test_the_value_of_a_captured_tensor_is_not_read_in_python(name: str, device: str):
    """The first call's value would be that of all calls."""
    with pytest.raises(TypeError, match=r"must not read the value of a tensor.*test_traces\.py"):
        attend(VALUES[name](torch.tensor(1.0).to(device)), some("mps"))


def test_a_table_that_a_mod_writes_down():
    q, table = some("mps"), torch.tensor([0.5, 2.0], device="mps")
    out = attend(lambda s, b, h, *_: s * torch.tensor([0.5, 2.0], device="mps")[h], q)
    assert torch.equal(out, attend(lambda s, b, h, *_: s * table[h], q))


def test_the_state_of_the_first_call_is_not_that_of_the_next():
    """PyTorch's default dtype is what divided integers become; autocast is for operands alone."""
    q, table = some("mps"), torch.rand(20, device="mps", dtype=torch.float16)

    def divided(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + (kv_idx - q_idx) / 3

    def rounded(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score * torch.exp(table[kv_idx])

    try:
        torch.set_default_dtype(torch.bfloat16)
        attend(divided, q)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autocast("mps", torch.float16):
        traces.of_function(rounded, "score", q)
    results = [attend(mod, q) for mod in (divided, rounded)]
    traces._of_functions.clear()
    for mod, result in zip((divided, rounded), results):
        assert torch.equal(attend(mod, q), result)


def test_a_mask_traced_in_every_call_is_not_kept():
    def followed(score: Tensor, *_: Tensor) -> Tensor:
        return torch.tanh(score)

    q = some("mps")
    score = traces.of_function(followed, "score", q)
    for _ in range(3):
        item = iter([torch.ones(20, dtype=torch.bool).to("mps")])
        mask = traces.of_function(lambda b, h, i, j: next(item)[j], "mask", q)  # noqa: B023
        traces.known_call(score, mask)
    del mask
    gc.collect()
    assert len(score.kept.known) == 0


def test_threads_trace_at_the_same_time():
    q = some("mps")
    go, failed = threading.Barrier(4), []

    def work(number: int) -> None:
        try:
            go.wait()
            for n in range(4):
                factor = 1.0 + number + 10 * n
                traces.of_function(lambda s, *_: torch.tanh(s) * factor, "score", q)  # noqa: B023
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_what_cannot_be_traced_is_a_type_error():
    q, table = some("mps"), torch.zeros(2).to("mps")

    def writes(score: Tensor, *_: Tensor) -> Tensor:
        table[0] = 1.0
        return score

    def no_derivative(score: Tensor, *_: Tensor) -> Tensor:
        return torch.igamma(score.abs() + 1.0, score.abs())

    with pytest.raises(TypeError, match=r"score_mod: .*changes a tensor.*fill tensors before"):
        attend(writes, q)
    with pytest.raises(TypeError, match=r"score_mod: the derivative.*igamma.*detach\(\)"):
        attend(no_derivative, q)


# ---- what is slow is said -----------------------------------------------------------------------


def _said(call: Any, times: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in range(times):
            call(n)
    return [str(x.message) for x in caught if "orchard_ops.flex_attention" in str(x.message)]


def test_a_number_that_changes_with_every_call_is_said_once(made: _Counted):
    q = some("cpu")

    def anew(n: int) -> None:
        factor = 1.0 + n / 64
        use = traces.of_function(lambda score, *_: torch.tanh(score * factor), "score", q)
        assert use.mod(0).text

    (said,) = _said(anew, 20)
    assert "16 different kernels" in said and "capture what changes as a 0-dim tensor" in said
    assert "test_traces.py:" in said and "anew.<locals>.<lambda>" in said

    def by_tensor(n: int) -> None:
        factor = torch.tensor(1.0 + n / 64)
        traces.of_function(lambda score, *_: torch.tanh(score * factor), "score", q).mod(0)

    made.count = 0
    assert _said(by_tensor, 20) == [] and made.count == 1


def test_a_function_that_is_traced_in_every_call_is_said_once():
    class Tables:
        def __getitem__(self, n: int) -> float:
            return 2.0

    tables, q = Tables(), some("cpu")
    (said,) = _said(
        lambda n: traces.of_function(lambda s, *_: torch.tanh(s) * tables[0], "score", q), 20
    )
    assert "traced in 16 calls" in said


# ---- what is kept, in training ------------------------------------------------------------------


def _documents(device: str) -> tuple[Any, Any]:
    ids = (torch.arange(20) // 6).to(device)
    return lambda s, b, h, i, j: torch.where(ids[i] == ids[j], s, -torch.inf), None


def _blocks(device: str) -> tuple[Any, Any]:
    mask = create_block_mask(
        lambda b, h, i, j: (i + j) % 3 == 0, None, None, 20, 20, device=device, BLOCK_SIZE=8
    )
    return None, mask


def _table_written_down(device: str) -> tuple[Any, Any]:
    return lambda s, b, h, i, j: s * torch.tensor([0.5, 2.0])[h], None


@pytest.mark.parametrize("make", (_documents, _blocks, _table_written_down))
def test_what_a_call_in_inference_mode_leaves_can_be_trained(make: Any):
    """Autograd saves no tensor that inference mode made."""
    q, functions = some("mps"), make("mps")
    with torch.inference_mode():
        first = orchard_ops.flex_attention(q, q, q, *functions).clone()
    leaf = q.clone().requires_grad_()
    out = orchard_ops.flex_attention(leaf, leaf, leaf, *functions)
    out.sum().backward()
    assert torch.equal(out, first) and bool(leaf.grad.any())
    assert orchard_ops.stats().reference == {}


# ---- threads ------------------------------------------------------------------------------------


def test_four_threads_trace_at_once():
    """Each gets what it gets alone."""
    q = some("cpu")

    def call(factor: float) -> Tensor:
        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.tanh(score * factor) + 0.1 * factor * (i - j)

        return orchard_ops.flex_attention(q, q, q, score_mod)

    right = {n: call(1.0 + n) for n in range(12)}
    traces._of_functions.clear()
    found: dict[int, Tensor] = {}
    errors: list[BaseException] = []
    begin = threading.Barrier(4)

    def work(first: int) -> None:
        try:
            begin.wait()
            for n in range(first, 12, 4):
                found[n] = call(1.0 + n)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for n, out in right.items():
        torch.testing.assert_close(found[n], out, rtol=1e-5, atol=1e-6)
