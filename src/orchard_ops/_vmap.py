"""`torch.vmap` over the functional ops: the mapped dimension becomes part of the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _ops

_NUM_FORWARD, _NUM_BACKWARD = 3, 7  # tensor operands before the scoring arguments


def _lead(x: Tensor, dim: int | None, size: int) -> Tensor:
    """(..., V at dim, ...) or unmapped -> (V, ...)."""
    return x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _fold(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """(V, B, ...) -> (V * B, ...)."""
    return None if x is None else _lead(x, dim, size).flatten(0, 1)


def _fold_mask(mask: Tensor | None, dim: int | None, size: int, batch: int) -> Tensor | None:
    """As `_fold`; a mask that broadcasts over V and B goes on doing so."""
    if mask is None or (dim is None and mask.shape[0] == 1):
        return mask
    mask = _lead(mask, dim, size)
    return mask.expand(size, batch, *mask.shape[2:]).flatten(0, 1)


def _fold_slopes(slopes: Tensor | None, dim: int | None, size: int, batch: int) -> Tensor | None:
    """(Hq) or (B, Hq), maybe mapped -> (Hq) or (V * B, Hq)."""
    if slopes is None or (dim is None and slopes.dim() == 1):
        return slopes
    slopes = _lead(slopes, dim, size)
    slopes = slopes.unsqueeze(1) if slopes.dim() == 2 else slopes
    return slopes.expand(size, batch, slopes.shape[-1]).flatten(0, 1)


def _fold_scoring(size: int, dims: tuple[Any, ...], scoring: list[Any], batch: int) -> list[Any]:
    mask, slopes, sinks, seed, *rest = scoring
    mask_dim, slopes_dim, sinks_dim, seed_dim = dims[:4]
    if sinks is not None and sinks_dim is not None:
        raise NotImplementedError("orchard::flash_attn: vmap over sinks is not supported")
    if seed_dim is not None:  # the batch index makes the masks differ; one seed serves all
        seed = seed.movedim(seed_dim, 0)[0]
    mask = _fold_mask(mask, mask_dim, size, batch)
    slopes = _fold_slopes(slopes, slopes_dim, size, batch)
    return [mask, slopes, sinks, seed, *rest]


def _unfold(x: Tensor, size: int) -> Tensor:
    return x.unflatten(0, (size, -1))


@torch.library.register_vmap("orchard::flash_attn_fwd", lib=_ops.library)
def _forward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    size, count = info.batch_size, _NUM_FORWARD
    operands = [_fold(x, d, size) for x, d in zip(args[:count], in_dims[:count])]
    batch = operands[0].shape[0] // size  # type: ignore[union-attr]
    if args[count + 4] > 0.0 and info.randomness != "different":
        raise NotImplementedError(
            "orchard::flash_attn: vmap with dropout needs randomness='different'; "
            f"got {info.randomness!r}"
        )
    scoring = _fold_scoring(size, in_dims[count:], list(args[count:]), batch)
    out, lse = _ops.forward(*operands, *scoring)
    return (_unfold(out, size), _unfold(lse, size)), (0, 0)


def _backward_one_by_one(size: int, dims: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
    def sample(n: int) -> list[Any]:
        return [x if d is None else x.select(d, n) for x, d in zip(args, dims)]

    grads = [_ops.backward(*sample(n)) for n in range(size)]
    return tuple(torch.stack(g) for g in zip(*grads)), (0,) * 5


@torch.library.register_vmap("orchard::flash_attn_bwd", lib=_ops.library)
def _backward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    size, count = info.batch_size, _NUM_BACKWARD
    lse_dim, dropout_p = in_dims[6], args[count + 4]
    if dropout_p > 0.0 and lse_dim is None:
        # Only the gradients are mapped: folding them would change the batch index that the masks
        # of the one forward were drawn with.
        return _backward_one_by_one(size, in_dims, args)
    operands = [_fold(x, d, size) for x, d in zip(args[:count], in_dims[:count])]
    batch = operands[0].shape[0] // size  # type: ignore[union-attr]
    mask, sinks, mask_grad = args[count], args[count + 2], args[count + 10]
    if sinks is not None or (mask is not None and mask_grad):
        raise NotImplementedError(
            "orchard::flash_attn: vmap over the gradient of attn_mask or sinks is not supported"
        )
    scoring = _fold_scoring(size, in_dims[count:], list(args[count:]), batch)
    dq, dk, dv, *empty = _ops.backward(*operands, *scoring)
    return (*(_unfold(x, size) for x in (dq, dk, dv)), *empty), (0, 0, 0, None, None)
