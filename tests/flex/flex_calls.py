"""Calls of flex_attention for tests, and PyTorch's own answer to them on the CPU in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as pytorch
from torch.nn.attention.flex_attention import create_block_mask

BLOCK = 16


class Case(NamedTuple):
    """A call by its sizes and by what makes its mods of the tensors that they capture."""

    heads: tuple[int, int]
    lengths: tuple[int, int]
    widths: tuple[int, int]
    captured: Callable[[], dict[str, Tensor]]
    score: Callable[[dict[str, Tensor]], Callable[..., Tensor] | None]
    mask: Callable[[dict[str, Tensor]], Callable[..., Tensor] | None]
    mask_heads: int | None = None


def nothing(captured: dict[str, Tensor]) -> None:
    return None


def no_tensors() -> dict[str, Tensor]:
    return {}


def causal(captured: dict[str, Tensor]) -> Callable[..., Tensor]:
    return lambda b, h, q_idx, kv_idx: q_idx >= kv_idx


def documents() -> dict[str, Tensor]:
    return {"document": torch.tensor([0] * 13 + [1] * 20 + [2] * 17)}


def same_document(captured: dict[str, Tensor]) -> Callable[..., Tensor]:
    document = captured["document"]
    return lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (document[q_idx] == document[kv_idx])


def capped(captured: dict[str, Tensor]) -> Callable[..., Tensor]:
    return lambda score, b, h, q_idx, kv_idx: 5.0 * torch.tanh(score / 5.0)


def sloped(captured: dict[str, Tensor]) -> Callable[..., Tensor]:
    slopes = captured["slopes"]
    return lambda score, b, h, q_idx, kv_idx: score + slopes[h] * (kv_idx - q_idx)


def tabled(captured: dict[str, Tensor]) -> Callable[..., Tensor]:
    table, gain = captured["table"], captured["gain"]
    return lambda score, b, h, q_idx, kv_idx: score * gain[b] + table[h, q_idx, kv_idx]


def per_head(captured: dict[str, Tensor]) -> Callable[..., Tensor]:
    return lambda b, h, q_idx, kv_idx: q_idx - kv_idx <= 4 * (h + 1)


CASES = {
    "nothing": Case((2, 2), (50, 50), (16, 16), no_tensors, nothing, nothing),
    "causal": Case((2, 2), (50, 50), (32, 32), no_tensors, nothing, causal),
    "documents, grouped heads": Case((4, 2), (50, 50), (16, 16), documents, nothing, same_document),
    "softcap": Case((2, 1), (37, 50), (16, 24), no_tensors, capped, nothing),
    "slopes": Case(
        (4, 4),
        (50, 41),
        (16, 16),
        lambda: {"slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
        sloped,
        causal,
    ),
    "a table": Case(
        (2, 2),
        (33, 21),
        (8, 8),
        lambda: {"table": torch.randn(2, 33, 21), "gain": torch.tensor([0.5, 2.0])},
        tabled,
        nothing,
    ),
    "a mask by head": Case((2, 2), (50, 50), (16, 16), no_tensors, capped, per_head, 2),
}


class Operands(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    dout: Tensor


def operands(case: Case) -> Operands:
    (heads, kv_heads), (q_len, kv_len), (width, value_width) = case[:3]
    return Operands(
        torch.randn(2, heads, q_len, width, dtype=torch.float64),
        torch.randn(2, kv_heads, kv_len, width, dtype=torch.float64),
        torch.randn(2, kv_heads, kv_len, value_width, dtype=torch.float64),
        torch.randn(2, heads, q_len, value_width, dtype=torch.float64),
    )


def run(
    function: Callable[..., Any],
    case: Case,
    given: Operands,
    captured: dict[str, Tensor],
    device: str,
    dtype: torch.dtype,
    block: int = BLOCK,
) -> list[Tensor]:
    """out, lse, dq, dk and dv on the CPU in float64. The loss is of out and of lse."""
    moved = {
        name: x.to(device, dtype if x.is_floating_point() else x.dtype)
        for name, x in captured.items()
    }
    leaves = [x.to(device, dtype).requires_grad_() for x in given[:3]]
    mask_mod, block_mask = case.mask(moved), None
    if mask_mod is not None:
        block_mask = create_block_mask(
            mask_mod, None, case.mask_heads, *case.lengths, device=device, BLOCK_SIZE=block
        )
    out, aux = function(
        *leaves,
        score_mod=case.score(moved),
        block_mask=block_mask,
        enable_gqa=True,
        return_aux=pytorch.AuxRequest(lse=True),
    )
    lse = aux.lse
    seen = torch.where(torch.isfinite(lse), lse, 0.0)
    loss = (out * given.dout.to(device, dtype)).sum() + seen.sin().sum()
    return [x.detach().cpu().double() for x in (out, lse, *torch.autograd.grad(loss, leaves))]


@contextmanager
def pytorch_differentiates(monkeypatch: Any) -> Iterator[None]:
    """PyTorch's dense formulas have a backward on the CPU, which its function does not let one
    have."""
    with monkeypatch.context() as patch:
        patch.setattr(pytorch, "_validate_device", lambda query, key, value: None)
        yield


def expected(monkeypatch: Any, case: Case, given: Operands, captured: Any) -> list[Tensor]:
    with pytorch_differentiates(monkeypatch):
        return run(pytorch.flex_attention, case, given, captured, "cpu", torch.float64)


NAMES = ("out", "lse", "dq", "dk", "dv")
TOLERANCES = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (2e-5, 2e-5),
    torch.float16: (5e-3, 5e-3),
    torch.bfloat16: (4e-2, 4e-2),
}


def assert_same(actual: list[Tensor], right: list[Tensor], dtype: torch.dtype) -> None:
    rtol, atol = TOLERANCES[dtype]
    for name, x, y in zip(NAMES, actual, right, strict=True):
        scale = max(1.0, y[torch.isfinite(y)].abs().max().item())
        torch.testing.assert_close(
            x, y, rtol=rtol, atol=atol * scale, msg=lambda text, name=name: f"{name}: {text}"
        )
