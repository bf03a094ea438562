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
    dmask: Tensor | None = None
    dsinks: Tensor | None = None
    dmask_cancelled: float = 0.0
    """The same for dmask: largest entry of P rowsum(|dO| |O|), summed as the mask broadcasts."""
    dsinks_cancelled: float = 0.0

    score_size: float = 0.0
    """Largest |scale| |q| . |k|: how large the terms are that a score sums up."""
    out_size: float = 0.0
    """Largest P |v|, the same for out."""
    dv_size: float = 0.0
    """Largest P^T |dO|, the same for dv."""

    def rounding(self, name: str, dtype: torch.dtype) -> float:
        """One unavoidable rounding of each sum, at the size of its terms, as it enters `name`.

        A score rounded once at the size of its terms moves lse by that much and the weights
        relatively so; lse is a sum of an origin and a logarithm, either of which may be about 1. A
        backward starts from `out` rounded to `dtype`, so that a gradient which cancels (a row that
        sees one key has dq = 0) keeps that error, and from `lse` rounded to float32.
        """
        u32 = torch.finfo(torch.float32).eps / 2
        if name == "lse":
            return u32 * (1.0 + self.score_size)
        size = _largest(getattr(self, name))
        if name == "out":
            return u32 * (self.out_size + self.score_size * size)
        lse = _largest(self.lse[torch.isfinite(self.lse)])
        cancelled = getattr(self, f"{name}_cancelled", 0.0)
        summed = u32 * self.dv_size if name == "dv" else torch.finfo(dtype).eps / 2 * cancelled
        return summed + u32 * (self.score_size + lse) * size


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
    attn_mask: Tensor | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> MathResult:
    """Unfused attention and its gradients by autograd, results rounded to `dtype`.

    Operands are (B, H, length, D) tensors of any device and dtype, copied to the CPU; the further
    arguments are those of ``orchard::flash_attn_fwd``, attn_mask has four dimensions. With dtype
    float64 it is the reference; with the operands' own dtype it does as PyTorch's math path does
    (half precision is computed in float32 and the output rounded).
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32

    def leaf(x: Tensor) -> Tensor:
        return x.detach().cpu().to(compute).requires_grad_()

    q, k, v = leaf(query), leaf(key), leaf(value)
    q_len, kv_len, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k_all, v_all = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
    scores = torch.matmul(q, k_all.transpose(-1, -2)) * scale
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        distance = (torch.arange(q_len).unsqueeze(1) + diagonal - torch.arange(kv_len)).abs()
        scores = scores - alibi_slopes.cpu().to(compute).view(-1, q.shape[1], 1, 1) * distance
    bias = None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask.cpu(), -math.inf)
    elif attn_mask is not None:
        bias = leaf(attn_mask)
        scores = scores + bias
    hidden = _hidden(q_len, kv_len, window_left, window_right, diagonal)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    logits, sink = scores, None
    if sinks is not None:
        sink = leaf(sinks)
        column = sink.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        logits = torch.cat((scores, column), dim=-1)
    lse = torch.logsumexp(logits, dim=-1)
    empty = (lse == -math.inf).unsqueeze(-1)
    row_lse = lse.unsqueeze(-1).masked_fill(empty, 0.0)
    weights = torch.where(empty, 0.0, torch.exp(scores - row_lse))
    dropped = weights
    if dropout.threshold(dropout_p) > 0:
        keep = dropout.dropout_mask(dropout_seed, dropout_p, (*scores.shape,))
        dropped = weights * keep * dropout.rescale(dropout_p)
    out = torch.matmul(dropped, v_all)
    loss = (out * dout.cpu().to(compute)).sum()
    if dlse is not None:
        loss = loss + (lse * dlse.cpu().to(compute)).masked_fill(empty.squeeze(-1), 0.0).sum()
    inputs = [x for x in (q, k, v, bias, sink) if x is not None]
    grads = iter(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))
    dq, dk, dv = (next(grads).to(dtype) for _ in range(3))
    dmask = (
        None
        if bias is None or attn_mask is None
        else next(grads).to(dtype if dtype == torch.float64 else attn_mask.dtype)
    )
    dsinks = (
        None
        if sink is None or sinks is None
        else next(grads).to(dtype if dtype == torch.float64 else sinks.dtype)
    )
    with torch.no_grad():
        dv_terms = torch.matmul(dropped.transpose(-1, -2), dout.cpu().to(compute).abs())
        row_size = (dout.cpu().to(compute) * out).abs().sum(-1, keepdim=True)
        size = weights * row_size
        dq_size = torch.matmul(size, k_all.abs()) * abs(scale)
        dk_size = torch.matmul(size.transpose(-1, -2), q.abs()) * abs(scale)
        dmask_size = size if bias is None else size.sum_to_size(bias.shape)
        dsinks_size = size if sink is None else (torch.exp(column - row_lse) * row_size).sum((0, 2))
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return MathResult(
        out.detach().to(dtype),
        lse.detach().to(lse_dtype),
        dq,
        dk,
        dv,
        _largest(dq_size),
        _largest(dk_size.unflatten(1, (-1, group)).sum(2)),
        dmask,
        dsinks,
        _largest(dmask_size),
        _largest(dsinks_size),
        _largest(torch.matmul(q.detach().abs(), k_all.detach().abs().transpose(-1, -2)) * scale),
        _largest(torch.matmul(dropped.detach(), v_all.detach().abs())),
        _largest(dv_terms.unflatten(1, (-1, group)).sum(2)),
    )


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
        floor: further rounding the comparison must grant, `MathResult.rounding`.

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
    results: Sequence[Tensor | None], ref: MathResult, eager: MathResult, label: str = ""
) -> None:
    """Applies the rule to (out, lse, dq, dk, dv, dmask, dsinks), or to the first few of them.

    None stands for a result that is not compared.
    """
    names = ("out", "lse", "dq", "dk", "dv", "dmask", "dsinks")
    for name, x in zip(names, results):
        if x is None:
            continue
        is_grad = name.startswith("d")
        assert_no_worse_than_math(
            f"{label}{name}", x, getattr(ref, name), getattr(eager, name),
            GRAD_FACTOR if is_grad else OUT_FACTOR,
            ref.rounding(name, eager.out.dtype),
        )  # fmt: skip
