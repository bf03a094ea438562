"""What a call costs the host, in counts: no waiting, no extra memory, no repeated work.

Times are measured by benchmarks/host/measure.py; a loaded machine must not fail a test.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.nn import Parameter

import orchard_ops
from orchard_ops import attention, checks
from orchard_ops.ops import autograd, eager
from orchard_ops.scoring import Scoring

if sys.platform != "linux":
    pytest.skip("counted on the simulated device", allow_module_level=True)

import simulator

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks.host import measure  # noqa: E402

B, H, HKV, L, S, D = 2, 4, 2, 24, 40, 32
HALF = 2


def qkv(
    requires_grad: bool = False, dtype: torch.dtype = torch.float16, head_dim: int = D
) -> list[torch.Tensor]:
    shapes = ((B, H, L, head_dim), (B, HKV, S, head_dim), (B, HKV, S, head_dim))
    return [
        torch.randn(shape, device="mps", dtype=dtype).requires_grad_(requires_grad)
        for shape in shapes
    ]


class Counted:
    """What happened on the device inside a `with` block."""

    def __enter__(self) -> Counted:
        self.waits, self.memory = simulator.waits(), simulator.memory()
        self.plans = torch.ops.orchard.plans_computed()
        simulator.reset_peak()
        return self

    def __exit__(self, *exception: object) -> None:
        self.num_waits = simulator.waits().total - self.waits.total
        self.num_allocations = simulator.memory().allocations - self.memory.allocations
        self.peak_bytes = simulator.memory().peak - self.memory.allocated
        self.num_plans = torch.ops.orchard.plans_computed() - self.plans


class TestRecordingEngine:
    def test_launches_are_recorded_as_they_would_run(self):
        q, k, v = qkv()
        with simulator.recording() as executed:
            orchard_ops.flash_attn(q, k, v, enable_gqa=True)
        with simulator.recording(execute=False) as recorded:
            orchard_ops.flash_attn(q, k, v, enable_gqa=True)
        assert len(recorded) == len(executed) == 1
        for field in ("kernel", "threads", "group", "arguments"):
            assert getattr(recorded[0], field) == getattr(executed[0], field)

    def test_nothing_runs(self):
        # Operands of no other test: memory that is used again may still hold the results of those.
        q, k, v = (x + 0.625 for x in qkv())
        before = simulator.launches()
        with simulator.recording(execute=False):
            out = orchard_ops.flash_attn(q, k, v, enable_gqa=True)
        assert simulator.launches() == before
        with simulator.recording() as launches:
            expected = orchard_ops.flash_attn(q, k, v, enable_gqa=True)
        assert len(launches) == 1
        assert not torch.equal(out, expected)  # what lay in memory

    def test_does_not_nest(self):
        with (
            simulator.recording(execute=False),
            pytest.raises(RuntimeError, match="inside another"),
            simulator.recording(execute=False),
        ):
            pass

    def test_waits_are_counted(self):
        x = torch.ones(2, device="mps")
        for wait, kind in (
            (torch.mps.synchronize, "synchronize"),
            (x.cpu, "copy"),
            (lambda: torch.ones(2).to("mps"), "copy"),
            (lambda: x.sum().item(), "read"),
            (lambda: torch.nonzero(x), "read"),
        ):
            before = getattr(simulator.waits(), kind)
            wait()
            assert getattr(simulator.waits(), kind) == before + 1


@pytest.mark.parametrize("dropout_p", (0.0, 0.25))
class TestNoWaitingAndNoExtraMemory:
    def test_forward(self, dropout_p: float):
        q, k, v = qkv()
        with Counted() as counted:
            out = orchard_ops.flash_attn(
                q, k, v, enable_gqa=True, is_causal=True, dropout_p=dropout_p
            )
        assert counted.num_waits == 0
        assert counted.num_allocations == 2  # out, row_stats
        assert counted.peak_bytes == out.numel() * HALF + B * H * L * 2 * 4

    @pytest.mark.parametrize("head_dim", (D, 64))
    def test_backward(self, dropout_p: float, head_dim: int):
        leaves = qkv(requires_grad=True, head_dim=head_dim)
        out = orchard_ops.flash_attn(*leaves, enable_gqa=True, is_causal=True, dropout_p=dropout_p)
        dout = torch.randn_like(out)
        with Counted() as counted:
            grads = torch.autograd.grad(out, leaves, dout)
        assert counted.num_waits == 0
        ds = B * H * L * S * 4 if head_dim >= 64 else 0
        assert counted.num_allocations == 4 + (ds > 0)  # dq, dk, dv, delta
        assert counted.peak_bytes == sum(x.numel() for x in grads) * HALF + B * H * L * 4 + ds


MOST_PLANS = 256  # native/plan_cache.h
OPERANDS = ("q", "k", "v", "out", "dout")
TOLERANCE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
}
SCALARS = {
    "dropout_p": 0.0, "scale": 0.2, "window_left": -1, "window_right": -1, "diagonal": 0,
}  # fmt: skip


def problem() -> dict:
    """A call of the functional ops: dense float32 operands and the numbers of the scoring."""
    q, k, v = (x.detach() for x in qkv(dtype=torch.float32))
    out, row_stats = (
        x.contiguous()
        for x in torch.ops.orchard.flash_attn_fwd(q, k, v, *scoring(SCALARS), "reference")
    )
    operands = dict(zip(OPERANDS, (q, k, v, out, torch.randn_like(out))))
    return {**operands, "row_stats": row_stats, **SCALARS}


def scoring(call: dict) -> Scoring:
    return Scoring(dropout_seed=torch.tensor(3), **{name: call[name] for name in SCALARS})


def run_op(passes: str, call: dict, impl: str = "metal") -> tuple[torch.Tensor, ...]:
    """out and row_stats, or dq, dk and dv."""
    q, k, v, out, dout = (call[name] for name in OPERANDS)
    if passes == "forward":
        return torch.ops.orchard.flash_attn_fwd(q, k, v, *scoring(call), impl)
    return torch.ops.orchard.flash_attn_bwd(
        dout, None, q, k, v, out, call["row_stats"], *scoring(call), False, impl
    )[:3]  # fmt: skip


def with_row_stride(x: torch.Tensor) -> torch.Tensor:
    """The same values, rows further apart: the offset stays."""
    return F.pad(x, (0, 8))[..., : x.shape[-1]]


def with_batch_stride(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (0, 0, 0, 0, 0, 1))[:, : x.shape[1]]


def with_head_stride(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (0, 0, 0, 1))[:, :, : x.shape[2]]


def with_column_stride(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def with_offset(x: torch.Tensor) -> torch.Tensor:
    """The same values and strides, one element further in memory: unaligned."""
    storage = torch.zeros(x.numel() + 1, device=x.device, dtype=x.dtype)
    storage[1:] = x.flatten()
    return storage[1:].view(x.shape)


LAYOUTS = (with_batch_stride, with_head_stride, with_row_stride, with_column_stride, with_offset)


class TestPlans:
    def test_one_per_problem(self):
        leaves = qkv(requires_grad=True)

        def step() -> None:
            orchard_ops.flash_attn(*leaves, enable_gqa=True, window_left=5).sum().backward()

        step()
        with Counted() as counted:
            for _ in range(3):
                step()
        assert counted.num_plans == 0
        with Counted() as counted:
            orchard_ops.flash_attn(
                *(x.detach()[:, :, 1:] for x in leaves), enable_gqa=True, window_left=5
            )
        assert counted.num_plans == 1

    def check_not_mistaken(self, passes: str, changed: dict, call: dict) -> None:
        """`changed` has a plan of its own though `call`'s is remembered, and runs by it."""
        run_op(passes, call)
        with Counted() as counted:
            run_op(passes, call)
        assert counted.num_plans == 0
        with Counted() as counted:
            results = run_op(passes, changed)
        assert counted.num_plans == 1
        expected = run_op(passes, changed, "reference")
        if passes == "forward":  # the kernels count from origins of their own
            results, expected = ((out, stats.sum(-1)) for out, stats in (results, expected))
        for x, y in zip(results, expected, strict=True):
            torch.testing.assert_close(x, y, **TOLERANCE[x.dtype])

    @pytest.mark.parametrize("passes", ("forward", "backward"))
    @pytest.mark.parametrize(
        ("name", "number"),
        (
            ("scale", 0.5),
            ("window_left", 3),
            ("window_right", 2),
            ("diagonal", 5),
            ("dropout_p", 0.5),
        ),
    )
    def test_numbers_tell_plans_apart(self, passes: str, name: str, number: float):
        call = problem() | {"window_left": 9, "window_right": 9}
        changed = call | {name: number}
        changed["out"], changed["row_stats"] = run_op("forward", changed, "reference")
        self.check_not_mistaken(passes, changed, call)

    @pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
    @pytest.mark.parametrize(
        ("passes", "name"),
        [("forward", name) for name in OPERANDS[:3]] + [("backward", name) for name in OPERANDS],
    )
    def test_layouts_tell_plans_apart(self, passes: str, name: str, layout):
        call = problem()
        changed = call | {name: layout(call[name])}
        assert torch.equal(changed[name], call[name])
        self.check_not_mistaken(passes, changed, call)

    @pytest.mark.parametrize("passes", ("forward", "backward"))
    def test_dtypes_tell_plans_apart(self, passes: str):
        call = problem()
        changed = call | {name: call[name].half() for name in OPERANDS}
        self.check_not_mistaken(passes, changed, call)

    def test_forward_and_backward_have_plans_of_their_own(self):
        call = problem() | {"scale": 0.123}
        for passes in ("forward", "backward"):
            with Counted() as counted:
                run_op(passes, call)
            assert counted.num_plans == 1

    def test_a_bounded_number_is_remembered(self):
        q, k, v = qkv()
        remembered = []

        def num_plans(scale: int) -> int:
            with Counted() as counted:
                orchard_ops.flash_attn(q, k, v, enable_gqa=True, scale=float(scale))
            remembered.append(torch.ops.orchard.plans_remembered())
            return counted.num_plans

        last = MOST_PLANS + 50
        with simulator.recording(execute=False):
            assert sum(map(num_plans, range(1, last + 1))) == last
            assert num_plans(last) == 0
            assert num_plans(1) == 1  # forgotten
        assert min(remembered) >= 1
        assert max(remembered) == MOST_PLANS

    def test_threads_that_make_each_other_forget(self):
        """More problems than are remembered, met by all threads at once: each gets its plan."""
        num_threads, num_problems = 4, MOST_PLANS + 50
        ones = torch.ones(1, 1, 1, 16, device="mps")
        start, done, wrong = threading.Barrier(num_threads), [], []

        def work(number: int) -> None:
            scales = random.Random(number).sample(range(num_problems), num_problems)
            start.wait()
            for scale in scales:
                call = SCALARS | {"scale": float(scale)}
                _, row_stats = torch.ops.orchard.flash_attn_fwd(
                    ones, ones, ones, *scoring(call), "metal"
                )
                lse = row_stats.sum().item() * scoring(call).unit
                if abs(lse - 16 * scale) > 1e-5 * 16 * scale:
                    wrong.append((scale, lse))
                if torch.ops.orchard.plans_remembered() > MOST_PLANS:
                    wrong.append(scale)
            done.append(number)

        with Counted() as counted:
            threads = [threading.Thread(target=work, args=(n,)) for n in range(num_threads)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(done) == num_threads
        assert not wrong
        assert counted.num_plans > num_problems  # some were forgotten and made again


class GPT(torch.nn.Module):
    """Two layers, as far as attention sees them: dropout in training, none in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        width = H * D
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, 3 * width) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            q, k, v = layer(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
            dropout_p = 0.1 if self.training else 0.0
            attended = orchard_ops.flash_attn(
                q, k, v, enable_gqa=True, is_causal=True, dropout_p=dropout_p
            )
            x = x + attended.transpose(1, 2).flatten(2)
        return x


def test_a_training_run_compiles_few_variants():
    model = GPT().to("mps")
    optimizer = torch.optim.AdamW(model.parameters())
    with simulator.recording() as launches:
        for step, length in enumerate((16, 16, 11)):  # the last batch is shorter
            optimizer.zero_grad()
            model.train()(torch.randn(2, length, H * D, device="mps")).square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                model.eval()(torch.randn(1, length + step, H * D, device="mps"))
    variants = {launch.kernel for launch in launches}
    # Two layers: forward, delta, dk and dv, dq; forward.
    assert len(launches) == 3 * 2 * 5
    assert len(variants) <= 5, variants


# ---- the short way is the long way --------------------------------------------------------------


def _operands() -> list[tuple[torch.Tensor, ...]]:
    """Operands right and wrong in one respect or two."""
    good = {"shape": (B, H, L, D), "dtype": torch.float16, "device": "mps"}
    changes: list[dict] = [
        {},
        {"shape": (B, HKV, S, D)},
        {"shape": (B, 3, S, D)},
        {"shape": (B, 0, S, D)},
        {"shape": (1, H, L, D)},
        {"shape": (B, H, L, 2 * D)},
        {"shape": (B, H, L, 0)},
        {"shape": (B, H, 0, D)},
        {"shape": (H, L, D)},
        {"shape": (1, B, H, L, D)},
        {"dtype": torch.bfloat16},
        {"dtype": torch.int32},
        {"device": "cpu"},
        {"device": "meta"},
    ]

    def make(change: dict) -> torch.Tensor:
        settings = good | change
        return torch.zeros(settings["shape"], dtype=settings["dtype"], device=settings["device"])

    tensors = [make(change) for change in changes]
    return list(itertools.product(tensors, repeat=3))


def test_plainly_right_only_where_the_checks_agree():
    """Over all combinations: never true of what `check_problem` refuses; true of the usual."""
    combinations = _operands()
    recognised = 0
    for q, k, v in combinations:
        try:
            checks.check_problem("op", q, k, v)
            right = True
        except (ValueError, TypeError):
            right = False
        plainly = checks.plainly_right(q, k, v, enable_gqa=True)
        assert right or not plainly, (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype)
        if right and q.dim() == 4 and k.shape == v.shape:
            assert plainly, (q.shape, k.shape)
        recognised += plainly
    assert 10 < recognised < len(combinations) / 2


CALLS: list[dict] = [
    dict(zip(("is_causal", "scale", "window_left", "window_right", "dropout_p"), values))
    for values in itertools.product((False, True), (None, 0.3), (-1, 0, 7), (-1, 5), (0.0, 0.4))
]


def record_attend(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    seen: list[tuple] = []

    def attend(*args: object) -> tuple[object, object]:
        seen.append(args)
        return args[0], args[0]

    monkeypatch.setattr(autograd, "attend", attend)
    return seen


@pytest.mark.parametrize("autocast", (None, torch.float16, torch.bfloat16))
def test_the_usual_call_is_prepared_as_any_other(
    monkeypatch: pytest.MonkeyPatch, autocast: torch.dtype | None
):
    seen = record_attend(monkeypatch)
    prepared = mock.Mock(wraps=attention.prepare)
    monkeypatch.setattr(attention, "prepare", prepared)
    operands = qkv()
    with torch.autocast("mps", dtype=autocast or torch.float16, enabled=autocast is not None):
        for call in CALLS:
            torch.manual_seed(7)
            orchard_ops.flash_attn(*operands, enable_gqa=True, **call)
        short_calls = len(CALLS) - prepared.call_count
        monkeypatch.setattr(attention, "_is_usual", lambda *_: False)
        for call in CALLS:
            torch.manual_seed(7)
            orchard_ops.flash_attn(*operands, enable_gqa=True, **call)
    assert short_calls == (0 if autocast is torch.bfloat16 else len(CALLS))
    for short, long in zip(seen[: len(CALLS)], seen[len(CALLS) :], strict=True):
        for a, b in zip(short, long, strict=True):
            if isinstance(a, torch.Tensor):
                assert torch.equal(a, b)
                assert a.dtype == b.dtype
            else:
                assert type(a) is type(b)
                assert a == b


@pytest.mark.parametrize(
    "wrong",
    (
        {"dropout_p": 1.5},
        {"dropout_p": -0.1},
        {"window_left": -2},
        {"window_right": -2},
        {"softcap": -1.0},
        {"impl": "fast"},
    ),
    ids=str,
)
def test_what_is_malformed_is_not_usual(wrong: dict):
    with pytest.raises(ValueError, match="orchard::flash_attn"):
        orchard_ops.flash_attn(*qkv(), enable_gqa=True, **wrong)


@pytest.mark.parametrize("requires_grad", (False, True))
@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
def test_the_short_way_through_autograd_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, requires_grad: bool, dropout_p: float
):
    leaves = qkv(requires_grad)

    def run() -> list[torch.Tensor]:
        torch.manual_seed(5)
        out, lse = orchard_ops.flash_attn(
            *leaves, enable_gqa=True, dropout_p=dropout_p, return_lse=True
        )
        assert out.requires_grad == lse.requires_grad == requires_grad
        if not requires_grad:
            return [out, lse]
        loss = out.float().square().sum() + lse.sum()
        return [out, lse, *torch.autograd.grad(loss, leaves)]

    short = run()
    asked = []
    monkeypatch.setattr(eager, "nothing_between", lambda tensors: bool(asked.append(tensors)))
    long = run()
    assert len(asked) == 1 + requires_grad
    for a, b in zip(short, long, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


class Subclass(torch.Tensor):
    pass


class TestNothingBetween:
    def test_plain_tensors_and_parameters(self):
        q, k, v = qkv()
        assert eager.nothing_between((q, Parameter(k), v, None))
        with torch.no_grad():
            assert eager.nothing_between((q, k, v))

    def test_not_what_must_see_the_op(self):
        from torch.overrides import TorchFunctionMode
        from torch.utils._python_dispatch import TorchDispatchMode

        class FunctionMode(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                return func(*args, **(kwargs or {}))

        class DispatchMode(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                return func(*args, **(kwargs or {}))

        q = torch.ones(1)
        assert eager.nothing_between((q,))
        assert not eager.nothing_between((q, q.as_subclass(Subclass)))
        with FunctionMode():
            assert not eager.nothing_between((q,))
        with DispatchMode():
            assert not eager.nothing_between((q,))
        with torch.autograd.forward_ad.dual_level():
            assert not eager.nothing_between((q,))
        inside = []
        torch.func.grad(lambda x: (inside.append(eager.nothing_between((x,))), x.sum())[1])(q)
        torch.vmap(lambda x: (inside.append(eager.nothing_between((x,))), x)[1])(q)
        assert inside == [False, False]

    def test_not_below_autograd(self):
        q = torch.ones(1)
        with torch._C._AutoDispatchBelowAutograd():
            assert not eager.nothing_between((q,))
        assert eager.nothing_between((q,))

    @pytest.mark.parametrize("way", (orchard_ops.flash_attn, torch.ops.orchard.flash_attn))
    def test_nothing_is_recorded_below_autograd(self, way):
        leaves = qkv(requires_grad=True)
        expected = way(*leaves, enable_gqa=True)
        assert expected.requires_grad
        with torch._C._AutoDispatchBelowAutograd():
            out = way(*leaves, enable_gqa=True)
        assert not out.requires_grad
        assert torch.equal(out, expected)

    def test_nothing_is_recorded_in_the_body_of_another_operator(self):
        q, k, v = qkv()
        weights = [k.requires_grad_(), v.requires_grad_()]  # as a module's parameters
        inside = []

        @torch.library.custom_op("orchard_test::attention", mutates_args=())
        def attention_op(q: torch.Tensor) -> torch.Tensor:
            inside.append(orchard_ops.flash_attn(q, *weights, enable_gqa=True))
            return inside[-1]

        out = attention_op(q)
        assert not inside[0].requires_grad
        expected = orchard_ops.flash_attn(q, *weights, enable_gqa=True)
        assert expected.requires_grad
        assert torch.equal(out, expected)

    def test_modes_see_the_op_once_as_before(self):
        from torch.utils._python_dispatch import TorchDispatchMode

        class Log(TorchDispatchMode):
            def __init__(self) -> None:
                super().__init__()
                self.names: list[str] = []

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                self.names.append(func.name())
                return func(*args, **(kwargs or {}))

        leaves = qkv(requires_grad=True)
        with Log() as log:
            out = orchard_ops.flash_attn(*leaves, enable_gqa=True)
            torch.autograd.grad(out, leaves, torch.ones_like(out))
        assert log.names.count("orchard::flash_attn_fwd") == 1
        assert log.names.count("orchard::flash_attn_bwd") == 1


def test_numbers_of_the_short_way_agree_with_sdpa():
    q, k, v = (x.float() for x in qkv())
    out = orchard_ops.flash_attn(q, k, v, enable_gqa=True, is_causal=True)
    expected = F.scaled_dot_product_attention(
        q.cpu(), k.cpu(), v.cpu(), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out.cpu(), expected)


# ---- what is documented -------------------------------------------------------------------------


def test_the_documented_command_makes_the_documented_table():
    text = (ROOT / "docs" / "performance.md").read_text()
    result = json.loads(measure.RESULT.read_text())
    for line in measure.table(result).splitlines():
        assert line in text
    environment = result["environment"]
    settings = (environment["batches"], environment["repeats"])
    assert settings == (measure.BATCHES, measure.REPEATS)  # what the command takes by default
    assert "one of {} batches of {} repeats".format(*settings) in text


def test_the_quietest_batch_is_that_of_the_control_s_lowest_median():
    def batch(control: list[float], ours: list[float]) -> measure.Times:
        rows = ((measure.PEERS[0], control), ("orchard_ops.flash_attn", ours))
        return {(name, measure.WAYS[3]): {"whole": times} for name, times in rows}

    quiet, spiky, loud = batch([5, 5, 90], [9]), batch([1, 7, 7], [1]), batch([8, 8, 8], [2])
    assert measure.quietest([spiky, quiet, loud]) is quiet
