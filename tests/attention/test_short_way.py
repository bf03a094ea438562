"""The short way of the usual call, past checks and dispatcher, gives what the long way gives."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from counted import HKV, B, D, H, L, S, qkv
from torch.nn import Parameter

import orchard_ops
from orchard_ops import attention, checks
from orchard_ops.ops import autograd, eager


def _operands() -> list[tuple[torch.Tensor, ...]]:
    """Operands that are right, or wrong in one respect or two."""
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
    """Over all combinations `plainly_right` is never true of what `check_problem` refuses, and it
    is true of the usual operands."""
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

    def attend(args: tuple, *_: object) -> tuple[object, object]:
        seen.append(args)
        return args[0], args[0]

    for name in ("attend", "attend_operands"):
        monkeypatch.setattr(autograd, name, attend)
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
        monkeypatch.setattr(attention, "is_usual", lambda *_: False)
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
    monkeypatch.setattr(eager, "no_layer_between", lambda: bool(asked.append(None)))
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
