"""What a call costs the host, in counts: no waiting, no extra memory, no repeated work.

Times are measured by benchmarks/host/measure.py; a loaded machine must not fail a test.
"""

from __future__ import annotations

import itertools
import sys
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.nn import Parameter

import orchard_ops
from orchard_ops import _ops, attention, checks

if sys.platform != "linux":
    pytest.skip("counted on the simulated device", allow_module_level=True)

import simulator

B, H, HKV, L, S, D = 2, 4, 2, 24, 40, 32
HALF = 2


def qkv(requires_grad: bool = False, dtype: torch.dtype = torch.float16) -> list[torch.Tensor]:
    shapes = ((B, H, L, D), (B, HKV, S, D), (B, HKV, S, D))
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
            orchard_ops.flash_attn(q, k, v)
        with simulator.recording(execute=False) as recorded:
            orchard_ops.flash_attn(q, k, v)
        assert len(recorded) == len(executed) == 1
        for field in ("kernel", "threads", "group", "arguments"):
            assert getattr(recorded[0], field) == getattr(executed[0], field)

    def test_nothing_runs(self):
        q, k, v = qkv()
        before = simulator.launches()
        with simulator.recording(execute=False):
            out = orchard_ops.flash_attn(q, k, v)
        assert simulator.launches() == before
        with simulator.recording() as launches:
            expected = orchard_ops.flash_attn(q, k, v)
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
            out = orchard_ops.flash_attn(q, k, v, is_causal=True, dropout_p=dropout_p)
        assert counted.num_waits == 0
        assert counted.num_allocations == 2  # out, lse
        assert counted.peak_bytes == out.numel() * HALF + B * H * L * 4

    def test_backward(self, dropout_p: float):
        leaves = qkv(requires_grad=True)
        out = orchard_ops.flash_attn(*leaves, is_causal=True, dropout_p=dropout_p)
        dout = torch.randn_like(out)
        with Counted() as counted:
            grads = torch.autograd.grad(out, leaves, dout)
        assert counted.num_waits == 0
        assert counted.num_allocations == 4  # dq, dk, dv, delta
        assert counted.peak_bytes == sum(x.numel() for x in grads) * HALF + B * H * L * 4


class TestPlans:
    def test_one_per_problem(self):
        leaves = qkv(requires_grad=True)

        def step() -> None:
            orchard_ops.flash_attn(*leaves, window_left=5).sum().backward()

        step()
        with Counted() as counted:
            for _ in range(3):
                step()
        assert counted.num_plans == 0
        with Counted() as counted:
            orchard_ops.flash_attn(*(x.detach()[:, :, 1:] for x in leaves), window_left=5)
        assert counted.num_plans == 1

    @pytest.mark.parametrize(
        "change",
        (
            {"scale": 0.5},
            {"window_left": 3},
            {"window_right": 2},
            {"is_causal": True},
            {"dropout_p": 0.5},
        ),
        ids=lambda change: next(iter(change)),
    )
    def test_a_remembered_plan_is_not_taken_for_another(self, change: dict):
        q, k, v = qkv(dtype=torch.float32)
        torch.ops.orchard.flash_attn(q, k, v)  # its plan is remembered
        torch.manual_seed(3)
        metal = orchard_ops.flash_attn(q, k, v, **change)
        torch.manual_seed(3)
        expected = orchard_ops.flash_attn(q, k, v, impl="reference", **change)
        torch.testing.assert_close(metal, expected)

    def test_more_problems_than_are_remembered(self):
        q, k, v = qkv()
        with simulator.recording(execute=False):
            for scale in range(1, 300):
                orchard_ops.flash_attn(q, k, v, scale=float(scale))
            with Counted() as counted:
                orchard_ops.flash_attn(q, k, v, scale=299.0)
        assert counted.num_plans == 0


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
            attended = orchard_ops.flash_attn(q, k, v, is_causal=True, dropout_p=dropout_p)
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
    assert len(launches) >= 3 * 2 * 4  # two layers: forward, dq, dk and dv; forward
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
        plainly = checks.plainly_right(q, k, v)
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

    monkeypatch.setattr(_ops, "attend", attend)
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
            orchard_ops.flash_attn(*operands, **call)
        short_calls = len(CALLS) - prepared.call_count
        monkeypatch.setattr(attention, "_is_usual", lambda *_: False)
        for call in CALLS:
            torch.manual_seed(7)
            orchard_ops.flash_attn(*operands, **call)
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
        {"dropout_p": 1.0},
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
        orchard_ops.flash_attn(*qkv(), **wrong)


@pytest.mark.parametrize("requires_grad", (False, True))
@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
def test_the_short_way_through_autograd_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, requires_grad: bool, dropout_p: float
):
    leaves = qkv(requires_grad)

    def run() -> list[torch.Tensor]:
        torch.manual_seed(5)
        out, lse = orchard_ops.flash_attn(*leaves, dropout_p=dropout_p, return_lse=True)
        assert out.requires_grad == lse.requires_grad == requires_grad
        if not requires_grad:
            return [out, lse]
        loss = out.float().square().sum() + lse.sum()
        return [out, lse, *torch.autograd.grad(loss, leaves)]

    short = run()
    asked = []
    monkeypatch.setattr(_ops, "_nothing_between", lambda tensors: bool(asked.append(tensors)))
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
        assert _ops._nothing_between((q, Parameter(k), v, None))
        with torch.no_grad():
            assert _ops._nothing_between((q, k, v))

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
        assert _ops._nothing_between((q,))
        assert not _ops._nothing_between((q, q.as_subclass(Subclass)))
        with FunctionMode():
            assert not _ops._nothing_between((q,))
        with DispatchMode():
            assert not _ops._nothing_between((q,))
        with torch.autograd.forward_ad.dual_level():
            assert not _ops._nothing_between((q,))
        inside = []
        torch.func.grad(lambda x: (inside.append(_ops._nothing_between((x,))), x.sum())[1])(q)
        torch.vmap(lambda x: (inside.append(_ops._nothing_between((x,))), x)[1])(q)
        assert inside == [False, False]

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
            out = orchard_ops.flash_attn(*leaves)
            torch.autograd.grad(out, leaves, torch.ones_like(out))
        assert log.names.count("orchard::flash_attn_fwd") == 1
        assert log.names.count("orchard::flash_attn_bwd") == 1


def test_numbers_of_the_short_way_agree_with_sdpa():
    q, k, v = (x.float() for x in qkv())
    out = orchard_ops.flash_attn(q, k, v, is_causal=True)
    expected = F.scaled_dot_product_attention(
        q.cpu(), k.cpu(), v.cpu(), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out.cpu(), expected)
