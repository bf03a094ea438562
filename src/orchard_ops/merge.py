"""`merge_attentions`: attention over all keys from attention over parts of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_OP = "orchard_ops.merge_attentions"
_REMEDY = "pass out and lse as flash_attn(..., return_lse=True) gives them"


def merge_attentions(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over a set of keys, from the results for parts of it that have no key in common.

    lse = log(sum_i exp(lse_i)) and out = sum_i exp(lse_i - lse) * out_i: what flash-decoding and
    ring attention do with their parts. Plain tensor operations, so it works on every device, under
    torch.compile, torch.vmap and torch.func, and is differentiable in all its arguments; the
    gradients of q, k and v through it are those of attention over all keys.

    Args:
        outs: one (..., L, Dv) tensor per part: what `flash_attn` returns as out, for the same
            queries. Where the lse of a row is -inf, whatever stands here is not used.
        lses: one (..., L) tensor per part: the natural logarithm of the part's softmax denominator,
            -inf for a row that saw no key. Not +inf, which FlashAttention-2 has for such rows on
            CUDA.

    A sink (`flash_attn(..., sinks=)`) is one more logit of a row: give it to one of the parts only.
    The scale, softcap, slopes, masks and positions of a key must be the same as in one call;
    dropout draws its mask by the place of a key within its part.

    Returns:
        out (..., L, Dv) in the dtype that those of `outs` promote to, and lse (..., L) float32
        (float64 where one of the arguments is). A row that saw no key in any part has out 0, lse
        -inf, and gradients of 0. The sums are float32 at least.

    Raises:
        ValueError, TypeError: no parts, as many outs as lses, or shapes, dtypes or devices that do
            not belong together.

    Source: the online softmax of M. Milakov and N. Gimelshein, https://arxiv.org/abs/1805.02867;
    H. Liu et al., "Ring Attention with Blockwise Transformers", https://arxiv.org/abs/2310.01889.
    """
    outs, lses = list(outs), list(lses)
    _check(outs, lses)
    dtype = torch.float32
    for x in (*outs, *lses):
        dtype = torch.promote_types(dtype, x.dtype)
    out_dtype = outs[0].dtype
    for x in outs[1:]:
        out_dtype = torch.promote_types(out_dtype, x.dtype)

    logs = torch.stack([x.to(dtype) for x in lses])  # (parts, ..., L)
    blind = logs == -math.inf
    empty = blind.all(dim=0)
    # A row without any key counts as if each part had one: its outs are 0, and nothing is NaN.
    logs = logs.masked_fill(empty, 0.0)
    origin = logs.detach().amax(dim=0)
    sums = torch.exp(logs - origin)
    total = sums.sum(dim=0)
    # Not torch.logsumexp, whose gradient loses the logarithm beside a large origin.
    lse = (origin + torch.log(total)).masked_fill(empty, -math.inf)
    out = torch.zeros((), dtype=dtype, device=logs.device)
    for part, weight, unseen in zip(outs, sums / total, blind):
        rows = part.to(dtype).masked_fill(unseen.unsqueeze(-1), 0.0)
        out = out + weight.unsqueeze(-1) * rows
    return out.to(out_dtype), lse


def _check(outs: list[Tensor], lses: list[Tensor]) -> None:
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"{_OP}: outs and lses must be as many, and at least one; got {len(outs)} outs and "
            f"{len(lses)} lses: {_REMEDY}"
        )
    for name, parts in (("outs", outs), ("lses", lses)):
        for n, x in enumerate(parts):
            if not isinstance(x, Tensor):
                raise TypeError(f"{_OP}: {name}[{n}] must be a tensor; got a {type(x).__name__}")
            if not x.dtype.is_floating_point:
                raise TypeError(f"{_OP}: {name}[{n}] must be floating point; got {x.dtype}")
            if x.device != outs[0].device:
                raise ValueError(
                    f"{_OP}: {name}[{n}] must be on the device of outs[0], {outs[0].device}; "
                    f"got {x.device}"
                )
    shape = tuple(outs[0].shape)
    for n, (out, lse) in enumerate(zip(outs, lses)):
        if tuple(out.shape) != shape:
            raise ValueError(
                f"{_OP}: outs[{n}] must have the shape of outs[0], {shape}; got {tuple(out.shape)}"
            )
        if tuple(lse.shape) != shape[:-1] or not shape:
            raise ValueError(
                f"{_OP}: lses[{n}] must have the shape of outs[{n}] without its last dimension, "
                f"{shape[:-1]}; got {tuple(lse.shape)}: {_REMEDY}; an out of (B, L, H, D) goes in "
                "as out.transpose(1, 2)"
            )
