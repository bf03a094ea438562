"""`torch.vmap` over the functional ops: the mapped dimension becomes part of the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..namespace import NAME
from ..scoring import Scoring
from .schema import BACKWARD, FORWARD, BackwardArgs, ForwardArgs, library


def _lead(x: Tensor, dim: int | None, size: int) -> Tensor:
    """(..., V at dim, ...) or unmapped -> (V, ...)."""
    return x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _fold(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """(V, B, ...) -> (V * B, ...)."""
    return None if x is None else _lead(x, dim, size).flatten(0, 1)


def _batch(query: Tensor, dim: int | None) -> int:
    """The batch size of one sample."""
    return query.shape[0] if dim is None or dim > 0 else query.shape[1]


def _fold_mask(mask: Tensor | None, dim: int | None, size: int, batch: int) -> Tensor | None:
    """Folds V into a mask's batch. One that is the same for all of V and of the outer batch
    stays."""
    if mask is None or (dim is None and mask.shape[0] == 1):
        return mask
    mask = _lead(mask, dim, size)
    if mask.dim() == 6:
        inner = mask.shape[2]
        if inner == 1:  # (V, outer, 1, ...)
            return mask.flatten(0, 1)
        return mask.expand(size, batch // inner, *mask.shape[2:]).flatten(0, 2)
    return mask.expand(size, batch, *mask.shape[2:]).flatten(0, 1)


def _fold_slopes(slopes: Tensor | None, dim: int | None, size: int, batch: int) -> Tensor | None:
    """(Hq) or (B, Hq), maybe mapped -> (Hq) or (V * B, Hq)."""
    if slopes is None or (dim is None and slopes.dim() == 1):
        return slopes
    slopes = _lead(slopes, dim, size)
    slopes = slopes.unsqueeze(1) if slopes.dim() == 2 else slopes
    return slopes.expand(size, batch, slopes.shape[-1]).flatten(0, 1)


def _fold_ranges(ranges: Tensor | None, dim: int | None, size: int, batch: int) -> Tensor | None:
    """(1 or B, ...), maybe mapped -> (1 or V * B, ...)."""
    if ranges is None or (dim is None and ranges.shape[0] == 1):
        return ranges
    ranges = _lead(ranges, dim, size)
    return ranges.expand(size, batch, *ranges.shape[2:]).flatten(0, 1)


def _fold_scoring(scoring: Scoring, dims: Scoring, size: int, batch: int) -> Scoring:
    if scoring.sinks is not None and dims.sinks is not None:
        raise NotImplementedError(
            "orchard::flash_attn: vmap over sinks is not implemented; got sinks that differ "
            "between samples: call flash_attn for each sample in a loop"
        )
    seed = scoring.dropout_seed
    if seed is not None and dims.dropout_seed is not None:
        # One seed serves all samples, whose masks differ by the batch index.
        seed = seed.select(dims.dropout_seed, 0) if size else seed.new_zeros(())  # type: ignore[arg-type]
    return scoring._replace(
        attn_mask=_fold_mask(scoring.attn_mask, dims.attn_mask, size, batch),  # type: ignore[arg-type]
        alibi_slopes=_fold_slopes(scoring.alibi_slopes, dims.alibi_slopes, size, batch),  # type: ignore[arg-type]
        dropout_seed=seed,
        key_ranges=_fold_ranges(scoring.key_ranges, dims.key_ranges, size, batch),  # type: ignore[arg-type]
    )


@torch.library.register_vmap(f"{NAME}::flash_attn_fwd", lib=library)
def _forward_rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    size, call, dims = info.batch_size, ForwardArgs.read(args), ForwardArgs.read(in_dims)
    if call.scoring.dropout_p > 0.0 and info.randomness != "different":
        raise NotImplementedError(
            "orchard::flash_attn: vmap with dropout needs randomness='different'; "
            f"got {info.randomness!r}"
        )
    batch = _batch(call.query, dims.query)
    operands = [_fold(x, d, size) for x, d in zip(call[:3], dims[:3])]
    scoring = _fold_scoring(call.scoring, dims.scoring, size, batch)
    results = FORWARD(*operands, *scoring, call.impl)
    return tuple(x.unflatten(0, (size, batch)) for x in results), (0, 0)


def _one_by_one(size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    def sample(n: int) -> list[Any]:
        return [x if d is None else x.select(d, n) for x, d in zip(args, in_dims)]

    grads = [BACKWARD(*sample(n)) for n in range(size)]
    return tuple(torch.stack(g) for g in zip(*grads)), (0,) * 5


@torch.library.register_vmap(f"{NAME}::flash_attn_bwd", lib=library)
def _backward_rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    size, call, dims = info.batch_size, BackwardArgs.read(args), BackwardArgs.read(in_dims)
    scoring = call.scoring
    if size and scoring.dropout_p > 0.0 and dims.row_stats is None:
        # Only the gradients are mapped. Folding them into the batch would change the batch index
        # with which the dropout masks of the one forward were drawn.
        return _one_by_one(size, in_dims, args)
    if scoring.sinks is not None or (scoring.attn_mask is not None and call.mask_grad):
        raise NotImplementedError(
            "orchard::flash_attn: vmap over the gradient of attn_mask or sinks is not implemented; "
            "got a mapped gradient of out: differentiate each sample in a loop"
        )
    batch = _batch(call.query, dims.query)
    operands = [_fold(x, d, size) for x, d in zip(call[:7], dims[:7])]
    scoring = _fold_scoring(scoring, dims.scoring, size, batch)
    *grads, dmask, dsinks = BACKWARD(*operands, *scoring, call.mask_grad, call.impl)
    grads = [x.unflatten(0, (size, batch)) for x in grads]
    return (*grads, dmask, dsinks), (0, 0, 0, None, None)
