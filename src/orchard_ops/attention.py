"""`flash_attn`: the public function and the op ``torch.ops.orchard.flash_attn``.

Both bring a call into the one form that the functional pair takes: 4-D operands, a float scale, a
drawn seed, and causality as a window that ends at a diagonal.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _ops, checks

_OP = "orchard::flash_attn"


class Call(NamedTuple):
    """A call in the form of ``orchard::flash_attn_fwd``, and the shape its results go back to."""

    operands: tuple[Tensor, Tensor, Tensor]
    scoring: tuple[Any, ...]
    batch_shape: torch.Size

    def restore(self, x: Tensor) -> Tensor:
        """(B, ...) -> (*batch_shape, ...)."""
        if len(self.batch_shape) == 1:
            return x
        return x.reshape(*self.batch_shape, *x.shape[1:]) if self.batch_shape else x.squeeze(0)


def _to_4d(x: Tensor) -> Tensor:
    if x.dim() == 4:
        return x
    return x.unsqueeze(0) if x.dim() == 3 else x.flatten(0, x.dim() - 4)


def _mask_to_4d(mask: Tensor, batch_shape: torch.Size) -> Tensor:
    """Leading dimensions of 1 where the mask has none; several batch dimensions become one."""
    wanted = len(batch_shape) + 3
    if mask.dim() > wanted:
        raise ValueError(
            f"{_OP}: attn_mask must have at most {wanted} dimensions for this query; "
            f"got shape {tuple(mask.shape)}"
        )
    mask = mask[(None,) * (wanted - mask.dim())]
    if len(batch_shape) == 0:
        return mask.unsqueeze(0)
    if len(batch_shape) > 1:
        if any(size != 1 for size in mask.shape[: len(batch_shape)]):
            mask = mask.expand(*batch_shape, *mask.shape[len(batch_shape) :])
        mask = mask.flatten(0, len(batch_shape) - 1)
    return mask


def _autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Casts as autocast does for F.scaled_dot_product_attention."""
    device_type = tensors[0].device.type  # type: ignore[union-attr]
    available = torch.amp.is_autocast_available(device_type)
    if not available or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    lower = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(t.to(dtype) if t is not None and t.dtype in lower else t for t in tensors)


def _draw_seed(dropout_p: float) -> Tensor | None:
    """A seed if there is dropout; a probability outside [0, 1) is left to the checks."""
    if not 0.0 < dropout_p < 1.0:
        return None
    # The cpu generator: activation checkpointing restores its state, not that of mps.
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")


def _is_usual(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """True only for operands that `prepare` would find right and leave as they are."""
    return (
        isinstance(query, Tensor)
        and isinstance(key, Tensor)
        and isinstance(value, Tensor)
        and query.is_mps
        and checks.plainly_right(query, key, value)
        and (not torch.is_autocast_enabled("mps") or query.dtype == torch.get_autocast_dtype("mps"))
    )


def _check_any_rank(query: Tensor, key: Tensor, value: Tensor) -> torch.Size:
    """The batch dimensions of operands that have any number of them."""
    checks.check_inputs(_OP, query, key, value)
    batch_shape = query.shape[:-3]
    if key.shape[:-3] != batch_shape or value.shape[:-3] != batch_shape:
        raise ValueError(
            f"{_OP}: query, key and value must have the same batch dimensions; got "
            f"{tuple(batch_shape)}, {tuple(key.shape[:-3])} and {tuple(value.shape[:-3])}"
        )
    return batch_shape


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    impl: str,
) -> Call:
    """Checks a call of `flash_attn` and brings it into the functional ops' form. Draws the seed."""
    checks.check_tensors(_OP, query, key, value)
    query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    if checks.plainly_right(query, key, value):
        batch_shape = query.shape[:1]
    else:
        batch_shape = _check_any_rank(query, key, value)
        query, key, value = _to_4d(query), _to_4d(key), _to_4d(value)
        checks.check_problem(_OP, query, key, value)
    if attn_mask is not None:
        attn_mask = _mask_to_4d(attn_mask, batch_shape)
    seed = _draw_seed(dropout_p)
    checks.check_scoring(
        _OP, query, key, attn_mask, alibi_slopes, sinks, seed, dropout_p,
        window_left, window_right, 0, softcap, impl,
    )  # fmt: skip
    if is_causal:
        window_right = 0
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    scoring = (
        attn_mask, alibi_slopes, sinks, seed, dropout_p, scale,
        window_left, window_right, 0, softcap, impl,
    )  # fmt: skip
    return Call((query, key, value), scoring, batch_shape)


def flash_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact scaled dot product attention in memory linear in the lengths, forward and backward.

    softmax(scale * query @ key^T + attn_mask) @ value, with the leading arguments and the meaning
    of `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: (..., Hq, L, D) float16, bfloat16, float32 (or float64, on the reference). 3-D inputs
            are one batch; any strides.
        key: (..., Hkv, S, D). Hq must be a multiple of Hkv: query head h uses key head h // (Hq /
            Hkv).
        value: (..., Hkv, S, Dv).
        attn_mask: broadcastable to (..., Hq, L, S). bool: True takes part. float: added to the
            scores, may require grad.
        dropout_p: probability of dropping an attention weight, in [0, 1); rounded to a multiple of
            2^-16. The mask follows torch's cpu generator (`torch.manual_seed`).
        is_causal: query i sees keys 0..i (top-left aligned, as in PyTorch). Combines with
            attn_mask.
        scale: factor on the scores; 1 / sqrt(D) by default.
        enable_gqa: accepted for compatibility; grouping follows from the head counts.
        window_left, window_right: query i sees keys i - window_left ... i + window_right; -1 is
            open.
        softcap: c > 0 replaces a score s by c * tanh(s / c).
        alibi_slopes: (Hq) or (B, Hq); -slope * |i - j| is added to the scores. No gradient.
        sinks: (Hq); a logit per head that takes probability and has no value. May require grad.
        return_lse: also return the logarithm of the softmax's denominator.
        impl: None chooses per call; "metal" raises with the reason where Metal cannot run it;
            "reference" never uses Metal.

    Returns:
        out (..., Hq, L, Dv) in the query's dtype and stride order. Rows without a key are 0. With
        return_lse also lse (..., Hq, L) float32, natural logarithm, -inf for a row without a key;
        differentiable.

    Raises:
        ValueError, TypeError: a malformed call; the message says what was wrong and what came.
        RuntimeError: impl="metal" or ORCHARD_STRICT=1 and Metal cannot run the call.

    Reference: T. Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work
    Partitioning", https://arxiv.org/abs/2307.08691.
    """
    if (
        (attn_mask is None and alibi_slopes is None and sinks is None and impl is None)
        and (0.0 <= dropout_p < 1.0 and softcap == 0.0)
        and (window_left >= -1 and window_right >= -1)
        and _is_usual(query, key, value)
    ):  # as `prepare` would bring it, in less time
        out, lse = _ops.attend(
            query, key, value, None, None, None, _draw_seed(dropout_p), dropout_p,
            1.0 / math.sqrt(query.shape[-1]) if scale is None else scale,
            window_left, 0 if is_causal else window_right, 0, 0.0, "auto",
        )  # fmt: skip
        return (out, lse) if return_lse else out
    call = prepare(
        query, key, value, attn_mask, dropout_p, is_causal, scale,
        window_left, window_right, softcap, alibi_slopes, sinks, impl or "auto",
    )  # fmt: skip
    out, lse = _ops.attend(*call.operands, *call.scoring)
    return (call.restore(out), call.restore(lse)) if return_lse else call.restore(out)


# The second key: vmap decomposes too, into the functional ops and their rules (_vmap.py).
for _key in ("CompositeImplicitAutograd", "FuncTorchBatchedDecomposition"):
    _ops.library.impl("flash_attn", flash_attn, _key)
