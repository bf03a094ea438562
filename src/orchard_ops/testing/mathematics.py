"""Attention and its gradients as unfused mathematics, with what their roundings can amount to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import dropout
from ..scoring import Scoring

UNLIKELY = 1e-6
"""The chance that rounded weights move an element by more than `MathResult.rounded_weights`."""


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
    """Largest row of sum P (1 - P) |scale| |q| . |k|: how far the row's weights move, all together,
    if each score is rounded once at the size of the terms that it sums up. A row of one key, or in
    which one key has all the weight, does not move."""
    out_size: float = 0.0
    """Largest P |v|, the same for out."""
    dv_size: float = 0.0
    """Largest P^T |dO|, the same for dv."""
    lse_size: float = 0.0
    """Largest row of sum P |scale| |q| . |k|: how far lse moves by such roundings."""

    dsinks_size: float = 0.0
    """Largest sum over rows of P |rowsum(dO O) - dlse| of a sink, the same for dsinks."""

    out_spread: float = 0.0
    """The root mean square of out's elements, if the signs of the terms P v were those of coins:
    that of sqrt(sum (P v)^2)."""
    dv_spread: float = 0.0
    """The same for dv, of P dO."""
    dq_spread: float = 0.0
    """The same for dq, which delta enters: of P v dO, the terms of delta, times P scale K."""
    dk_spread: float = 0.0
    """The same for dk, of those terms times P scale Q."""
    dmask_spread: float = 0.0
    """The same for dmask, of those terms times P."""
    dsinks_spread: float = 0.0
    """The same for dsinks, of those terms times the sink's P."""

    def rounding(self, name: str, dtype: torch.dtype) -> float:
        """One unavoidable rounding of each sum, at the size of its terms, as it enters `name`.

        A score rounded once at the size of its terms moves lse, and the weights of its row against
        each other. lse is a sum of an origin and a logarithm, either of which may be about 1. out,
        dv and dsinks are sums of their own. dP - delta is a difference of two sums over the head
        dim, each rounded in float32, and delta starts from `out` rounded to `dtype`: a gradient in
        which they cancel (a row that sees one key has dq = 0) keeps those three errors.
        """
        u32 = torch.finfo(torch.float32).eps / 2
        if name == "lse":
            return u32 * (1.0 + self.lse_size)
        moved = u32 * self.score_size * largest(getattr(self, name))
        if name == "out":
            return u32 * self.out_size + moved
        if name == "dv":
            return u32 * self.dv_size + moved
        if name == "dsinks":
            moved += u32 * self.dsinks_size
        cancelled = getattr(self, f"{name}_cancelled")
        return (torch.finfo(dtype).eps / 2 + 2 * u32) * cancelled + moved

    def rounded_weights(self, name: str, dtype: torch.dtype) -> float:
        """What the weights' rounding to float16, the matrix unit's operands, can do to a result.

        Gradients have it from delta, which starts from `out`. Unfused math keeps its weights in
        float32. If the relative roundings are independent and uniform within u = 2^-11, an element
        moves by more than t u / sqrt(3) times its spread with a chance of at most 2 exp(-t^2 / 2),
        however many keys there are; t makes that `UNLIKELY`. Where there are many elements, the
        largest is above their root mean square, and what its own rounding grants is more.
        """
        if dtype != torch.float16 or name == "lse":
            return 0.0
        t = math.sqrt(2.0 * math.log(2.0 / UNLIKELY))
        u = torch.finfo(dtype).eps / 2
        return t * u / math.sqrt(3.0) * getattr(self, f"{name}_spread")


def _hidden(
    ahead: Tensor, window_left: int, window_right: int, key_ranges: Tensor | None
) -> Tensor | None:
    """True where a window or the range of a row hides a key that is `ahead` of the row's place."""
    if window_left < 0 and window_right < 0 and key_ranges is None:
        return None
    hidden = torch.zeros(ahead.shape, dtype=torch.bool)
    if window_left >= 0:
        hidden |= ahead < -window_left
    if key_ranges is not None:
        begin, end, _, prefix = key_ranges.cpu().unsqueeze(-2).unbind(-1)
        j = torch.arange(ahead.shape[-1])
        hidden = (hidden | (j < begin) | (j >= end)) & (j >= prefix)
    if window_right >= 0:
        hidden |= ahead > window_right
    return hidden


def _entries(mask: Tensor, batch: int) -> tuple[int, ...]:
    """The batch dimensions as the mask counts them: (batch,) or (outer, inner)."""
    return Scoring(attn_mask=mask).mask_batch(batch)


def _by_batch(mask: Tensor, batch: int) -> Tensor:
    """A mask of four or five dimensions with four, an entry of the batch each or 1 for all."""
    if mask.dim() == 4:
        return mask
    return mask.expand(*_entries(mask, batch), *mask.shape[2:]).flatten(0, 1)


def _sum_as(mask: Tensor, x: Tensor) -> Tensor:
    """x, (B, H, L, S), summed over what the mask broadcasts."""
    return x.unflatten(0, _entries(mask, x.shape[0])).sum_to_size(mask.shape)


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
    key_span: int = 0,  # changes no result
    key_ranges: Tensor | None = None,
    score_mod: Callable[[Tensor], Tensor] | None = None,
) -> MathResult:
    """Unfused attention and its gradients by autograd, results rounded to `dtype`.

    Operands are (B, H, length, D) tensors of any device and dtype, copied to the CPU; the further
    arguments are those of ``orchard::flash_attn_fwd``, and `score_mod`, which makes scores
    (B, Hq, L, S) of the scaled products, each of its own. With dtype float64 it is the reference;
    with the operands' own dtype it does as PyTorch's math path does (half precision is computed in
    float32 and the output rounded).
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32

    def leaf(x: Tensor) -> Tensor:
        return x.detach().cpu().to(compute).requires_grad_()

    q, k, v = leaf(query), leaf(key), leaf(value)
    q_len, kv_len, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k_all, v_all = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
    scores = torch.matmul(q, k_all.transpose(-1, -2)) * scale
    derivative = slope = torch.ones(())
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
        derivative = 1.0 - (scores.detach() / softcap) ** 2
    if score_mod is not None:
        products = scores.detach().requires_grad_()
        of_products = score_mod(products)
        if of_products.requires_grad:
            derivative = torch.autograd.grad(of_products.sum(), products)[0]
        # What a product's rounding, and dS, is multiplied by, which softcap never enlarges.
        slope = derivative.abs()
        scores = score_mod(scores)
    place = torch.arange(q_len) + diagonal
    if key_ranges is not None:
        place = key_ranges.cpu().long()[..., 2]
    ahead = torch.arange(kv_len) - place.unsqueeze(-1)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.cpu().to(compute).view(-1, q.shape[1], 1, 1) * ahead.abs()
    bias = None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~_by_batch(attn_mask.cpu(), q.shape[0]), -math.inf)
    elif attn_mask is not None:
        bias = leaf(attn_mask)
        scores = scores + _by_batch(bias, q.shape[0])
    hidden = _hidden(ahead, window_left, window_right, key_ranges)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    logits, sink = scores, None
    if sinks is not None:
        sink = leaf(sinks)
        column = sink.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        logits = torch.cat((scores, column), dim=-1)
    # A row without a key has weights of 0, and takes no part in any gradient.
    empty = (logits == -math.inf).all(dim=-1, keepdim=True)
    logits = logits.masked_fill(empty, 0.0)
    probabilities = torch.softmax(logits, dim=-1).masked_fill(empty, 0.0)
    weights = probabilities[..., :kv_len]
    # Not torch.logsumexp: the gradient of that loses the logarithm beside a large score.
    top = logits.detach().amax(dim=-1, keepdim=True) if logits.shape[-1] else torch.zeros(())
    lse = (top + torch.exp(logits - top).sum(dim=-1, keepdim=True).log()).squeeze(-1)
    lse = lse.masked_fill(empty.squeeze(-1), -math.inf)
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
        weights = weights.detach()
        score_terms = torch.matmul(q.abs(), k_all.abs().transpose(-1, -2)) * abs(scale) * slope
        dv_terms = torch.matmul(dropped.transpose(-1, -2), dout.cpu().to(compute).abs())
        # An error of delta is one of its whole row, and independent of the other rows'.
        terms = dropped.detach() * torch.matmul(dout.cpu().to(compute), v_all.detach().mT)
        row_spread = (terms**2).sum(-1, keepdim=True).sqrt()
        slopes = weights * derivative * scale
        dq_squares = (row_spread * torch.matmul(slopes, k_all.detach())) ** 2
        dk_squares = torch.matmul((slopes * row_spread).mT ** 2, q.detach() ** 2)
        dmask_squares = dsinks_squares = torch.zeros(())
        if bias is not None:
            of_rows = weights.sum(-1, keepdim=True) if bias.shape[-1] == 1 else weights
            dmask_squares = _sum_as(bias, (of_rows * row_spread) ** 2)
        if sink is not None:
            dsinks_squares = ((probabilities[..., kv_len:] * row_spread) ** 2).sum((0, 2))
        out_squares = torch.matmul(dropped.detach() ** 2, v_all.detach() ** 2)
        dv_squares = torch.matmul(dropped.detach().mT ** 2, dout.cpu().to(compute) ** 2)
        row_size = (dout.cpu().to(compute) * out).abs().sum(-1, keepdim=True)
        size = weights * row_size
        dq_size = torch.matmul(size * slope, k_all.abs()) * abs(scale)
        dk_size = torch.matmul((size * slope).transpose(-1, -2), q.abs()) * abs(scale)
        dmask_size = size if bias is None else _sum_as(bias, size)
        if bias is not None and sink is not None and bias.shape[-1] == 1:
            # A row's sum of dS is what its sink lacks, P_sink delta, and may be formed as that.
            of_sink = probabilities[..., kv_len:] * row_size
            dmask_size = torch.maximum(dmask_size, _sum_as(bias, of_sink))
        dsinks_cancelled = dsinks_size = size
        if sink is not None:
            delta = (dout.cpu().to(compute) * out).sum(-1, keepdim=True)
            if dlse is not None:
                delta = delta - dlse.cpu().to(compute).unsqueeze(-1)
            dsinks_cancelled, dsinks_size = (
                (probabilities[..., kv_len:] * x).sum((0, 2)) for x in (row_size, delta.abs())
            )
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return MathResult(
        out.detach().to(dtype),
        lse.detach().to(lse_dtype),
        dq,
        dk,
        dv,
        largest(dq_size),
        largest(dk_size.unflatten(1, (-1, group)).sum(2)),
        dmask,
        dsinks,
        largest(dmask_size),
        largest(dsinks_cancelled),
        largest((weights * (1.0 - weights) * score_terms).sum(-1)),
        largest(torch.matmul(dropped.detach(), v_all.detach().abs())),
        largest(dv_terms.unflatten(1, (-1, group)).sum(2)),
        largest((weights * score_terms).sum(-1)),
        largest(dsinks_size),
        _root_mean(out_squares),
        _root_mean(dv_squares.unflatten(1, (-1, group)).sum(2)),
        _root_mean(dq_squares),
        _root_mean(dk_squares.unflatten(1, (-1, group)).sum(2)),
        _root_mean(dmask_squares),
        _root_mean(dsinks_squares),
    )


def _root_mean(squares: Tensor) -> float:
    return math.sqrt(squares.mean().item()) if squares.numel() else 0.0


def largest(x: Tensor) -> float:
    """The largest absolute value, 0 of nothing."""
    return x.abs().max().item() if x.numel() else 0.0
