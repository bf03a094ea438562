"""`torch.vmap` over the functional ops: the mapped dimension becomes part of the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..cache import CacheCall
from ..namespace import NAME
from ..scoring import Scoring
from .flex import FlexGradientCall
from .schema import BACKWARD, DECODE, FLEX_BACKWARD, FORWARD, BackwardArgs, ForwardArgs, library


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
    _no_mapped_sinks(None if scoring.sinks is None else dims.sinks)  # type: ignore[arg-type]
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


def _no_mapped_sinks(sinks_dim: int | None) -> None:
    if sinks_dim is not None:
        raise NotImplementedError(
            "orchard::flash_attn: vmap over sinks is not implemented; got sinks that differ "
            "between samples: call flash_attn for each sample in a loop"
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


@torch.library.register_vmap(f"{NAME}::flex_attn_bwd", lib=library)
def _flex_backward_rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """Of several gradients of one output, as jacrev has them: one by one,
    since a mod may tell the samples of a batch apart."""
    if info.batch_size == 0:
        operands = FlexGradientCall.read(args)[2:5]
        return tuple(x.new_empty((0, *x.shape)) for x in operands), (0, 0, 0)
    leaves, shape = tree_flatten(args)
    dims = tree_flatten(in_dims, is_leaf=lambda x: x is None or isinstance(x, int))[0]

    def sample(n: int) -> Any:
        own = [x if d is None else x.select(d, n) for x, d in zip(leaves, dims, strict=True)]
        return tree_unflatten(own, shape)

    grads = [FLEX_BACKWARD(*sample(n)) for n in range(info.batch_size)]
    return tuple(torch.stack(g) for g in zip(*grads)), (0, 0, 0)


def _refuse_batched_gradients(*args: Any) -> tuple[Tensor, ...]:
    raise NotImplementedError(
        "orchard::flex_attn_bwd: is_grads_batched=True is not implemented; got gradients that "
        "torch.autograd.grad has batched: use torch.vmap of torch.func.vjp, or a loop over them"
    )


# The key of autograd's own batching, which is older than torch.vmap's and knows no lists.
library.impl("flex_attn_bwd", _refuse_batched_gradients, "Batched")


# ---- caches -------------------------------------------------------------------------------------


@torch.library.register_vmap(f"{NAME}::flash_attn_decode", lib=library)
def _decode_rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """A cache that all samples share stays one; caches of their own lie one behind another."""
    size, call, dims = info.batch_size, CacheCall(*args), CacheCall(*in_dims)
    _no_mapped_sinks(None if call.sinks is None else dims.sinks)  # type: ignore[arg-type]
    batch = _batch(call.query, dims.query)  # type: ignore[arg-type]

    def of_sequences(name: str) -> Tensor | None:
        return _fold(getattr(call, name), getattr(dims, name), size)

    entries, table = of_sequences("cache_batch_idx"), of_sequences("block_table")
    key, value = call.key, call.value
    if dims.key is None and dims.value is None:
        if entries is None and table is None:
            own = torch.arange(batch, dtype=torch.int32, device=key.device)
            entries = own.repeat(size)
    else:
        count = key.shape[0 if dims.key is None or dims.key > 0 else 1]
        key, value = (_fold(x, d, size) for x, d in ((key, dims.key), (value, dims.value)))  # type: ignore[arg-type,assignment]
        first = torch.arange(size, device=key.device).repeat_interleave(batch) * count
        if entries is not None:
            entries = (entries.clamp(0, count - 1) + first).int()
        if table is not None:
            table = (table.clamp(0, count - 1) + first.unsqueeze(1)).int()
    folded = call._replace(
        query=_fold(call.query, dims.query, size),  # type: ignore[arg-type]
        key=key,
        value=value,
        cache_seqlens=of_sequences("cache_seqlens"),
        cache_batch_idx=entries,
        cache_leftpad=of_sequences("cache_leftpad"),
        block_table=table,
        alibi_slopes=_fold_slopes(call.alibi_slopes, dims.alibi_slopes, size, batch),  # type: ignore[arg-type]
    )
    return tuple(x.unflatten(0, (size, batch)) for x in DECODE(*folded)), (0, 0)


@torch.library.register_vmap(f"{NAME}::flash_attn_append", lib=library)
def _append_rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    raise NotImplementedError(
        "orchard::flash_attn_append: vmap over a change of a cache in place is not implemented; "
        f"got {info.batch_size} samples: make the samples part of the batch, or append the keys "
        "of each in a loop"
    )
