"""What "right" means: float64 mathematics, and the same-dtype math path as the measure of error.

FlashAttention's rule: an implementation's error against float64 may be a small multiple of the
error that PyTorch's own unfused math makes in the same dtype on the same inputs, plus a rounding
floor. The tolerance thereby follows the dtype, the size and the mask by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import dropout

OUT_FACTOR = 2.0
GRAD_FACTOR = 3.0


@dataclass(frozen=True)
class MathResult:
    """One evaluation of attention and its gradients, on the CPU."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dq_cancelled: float
    """Largest entry of |scale| * rowsum(|dO| |O|) * P |K|: how `out`'s relative error enters dq."""
    dk_cancelled: float
    """The same for dk: largest entry of |scale| * P^T rowsum(|dO| |O|) |Q|."""

    def gradient_floor(self, name: str, dtype: torch.dtype) -> float:
        """What a fused backward loses before it starts, because it starts from rounded results.

        `out` comes rounded to `dtype`, so a gradient that cancels (a row that sees one key has dq =
        0) keeps that error; `lse` comes rounded to float32, and its error is the weights' relative
        one.
        """
        cancelled = {"dq": self.dq_cancelled, "dk": self.dk_cancelled}.get(name, 0.0)
        lse = _largest(self.lse[torch.isfinite(self.lse)])
        ref = _largest(getattr(self, name))
        return (
            cancelled * torch.finfo(dtype).eps / 2 + ref * lse * torch.finfo(torch.float32).eps / 2
        )


def _hidden(
    q_len: int, kv_len: int, window_left: int, window_right: int, diagonal: int
) -> Tensor | None:
    """(L, S) bool, True where the window hides a key."""
    if window_left < 0 and window_right < 0:
        return None
    distance = torch.arange(kv_len) - torch.arange(q_len).unsqueeze(1) - diagonal
    hidden = torch.zeros(q_len, kv_len, dtype=torch.bool)
    if window_left >= 0:
        hidden |= distance < -window_left
    if window_right >= 0:
        hidden |= distance > window_right
    return hidden


def math_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dout: Tensor,
    dlse: Tensor | None = None,
    *,
    dtype: torch.dtype,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    window_left: int = -1,
    window_right: int = -1,
    diagonal: int = 0,
) -> MathResult:
    """Unfused attention and its gradients by autograd, results rounded to `dtype`.

    Operands are (B, H, length, D) tensors of any device and dtype, copied to the CPU. With dtype
    float64 it is the reference; with the operands' own dtype it does as PyTorch's math path does
    (half precision is computed in float32 and the output rounded).
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = (x.detach().cpu().to(compute).requires_grad_() for x in (query, key, value))
    q_len, kv_len, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k_all, v_all = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
    scores = torch.matmul(q, k_all.transpose(-1, -2)) * scale
    hidden = _hidden(q_len, kv_len, window_left, window_right, diagonal)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    empty = (lse == -math.inf).unsqueeze(-1)
    weights = torch.where(empty, 0.0, torch.exp(scores - lse.unsqueeze(-1).masked_fill(empty, 0.0)))
    if dropout.threshold(dropout_p) > 0:
        keep = dropout.dropout_mask(dropout_seed, dropout_p, (*scores.shape,))
        weights = weights * keep * dropout.rescale(dropout_p)
    out = torch.matmul(weights, v_all)
    loss = (out * dout.cpu().to(compute)).sum()
    if dlse is not None:
        loss = loss + (lse * dlse.cpu().to(compute)).masked_fill(empty.squeeze(-1), 0.0).sum()
    grads = torch.autograd.grad(loss, (q, k, v))
    with torch.no_grad():
        size = weights * (dout.cpu().to(compute) * out).abs().sum(-1, keepdim=True) * abs(scale)
        dq_cancelled = torch.matmul(size, k_all.abs())
        dk_cancelled = (
            torch.matmul(size.transpose(-1, -2), q.abs()).unflatten(1, (-1, group)).sum(2)
        )
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    dq, dk, dv = (g.to(dtype) for g in grads)
    return MathResult(
        out.detach().to(dtype), lse.detach().to(lse_dtype), dq, dk, dv,
        _largest(dq_cancelled), _largest(dk_cancelled),
    )  # fmt: skip


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _max_error(x: Tensor, ref: Tensor) -> float:
    return _largest(x.double() - ref.double())


def assert_no_worse_than_math(
    name: str, x: Tensor, ref: Tensor, eager: Tensor, factor: float, floor: float = 0.0
) -> None:
    """max|x - ref| <= factor * max|eager - ref| + a rounding floor; x's NaN and inf must be ref's.

    The rounding floor is half a unit in the last place of the largest |ref|, plus factor * `floor`.

    Args:
        name: what is compared, for the message.
        x: the result under test.
        ref: float64 mathematics.
        eager: same-dtype mathematics.
        factor: `OUT_FACTOR` or `GRAD_FACTOR`.
        floor: further rounding the comparison must grant, `MathResult.gradient_floor`.

    Raises:
        AssertionError: with both errors and the tolerance.
    """
    x, ref, eager = x.detach().cpu(), ref.detach().cpu(), eager.detach().cpu()
    if x.shape != ref.shape:
        raise AssertionError(f"{name}: shape {tuple(x.shape)}, expected {tuple(ref.shape)}")
    finite = torch.isfinite(ref)
    special = torch.nan_to_num(x.double(), nan=7.0, posinf=8.0, neginf=9.0)[~finite]
    expected = torch.nan_to_num(ref.double(), nan=7.0, posinf=8.0, neginf=9.0)[~finite]
    if not torch.equal(special, expected) or not torch.isfinite(x[finite]).all():
        raise AssertionError(f"{name}: NaN or infinity where the reference has none, or none where")
    x, ref, eager = x[finite], ref[finite], eager[finite]
    floor = torch.finfo(x.dtype).eps / 2 * _largest(ref) + factor * floor
    error, eager_error = _max_error(x, ref), _max_error(eager, ref)
    tolerance = factor * eager_error + floor
    if not error <= tolerance:
        raise AssertionError(
            f"{name}: max error {error:.3e} exceeds {tolerance:.3e} "
            f"({factor} x {eager_error:.3e} of same-dtype math + {floor:.1e})"
        )


def assert_attention_close(
    results: Sequence[Tensor], ref: MathResult, eager: MathResult, label: str = ""
) -> None:
    """Applies the rule to (out, lse, dq, dk, dv), or to the first few of them."""
    names = ("out", "lse", "dq", "dk", "dv")
    for name, x in zip(names, results):
        is_grad = name.startswith("d")
        assert_no_worse_than_math(
            f"{label}{name}", x, getattr(ref, name), getattr(eager, name),
            GRAD_FACTOR if is_grad else OUT_FACTOR,
            ref.gradient_floor(name, x.dtype) if is_grad else 0.0,
        )  # fmt: skip
