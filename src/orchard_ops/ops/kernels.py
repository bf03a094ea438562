"""Fake kernels (shapes alone) and the reference kernels of the functional ops."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import calls, native, reference
from ..checks import check_impl, check_problem
from ..descriptions import Description, describe
from ..layout import empty_in_order_of
from ..namespace import NAME
from .schema import BackwardArgs, ForwardArgs, library, stats_dtype


def _check_forward(op: str, args: ForwardArgs | BackwardArgs) -> None:
    check_impl(op, args.impl)
    check_problem(op, args.query, args.key, args.value)
    args.scoring.check(op, args.query, args.key)


def _check_backward(op: str, args: BackwardArgs) -> None:
    _check_forward(op, args)
    query = args.query
    out_shape, stats = (*query.shape[:3], args.value.shape[3]), stats_dtype(query)
    for name, x, shape, dtype in (
        ("dout", args.dout, out_shape, query.dtype),
        ("out", args.out, out_shape, query.dtype),
        ("row_stats", args.row_stats, (*query.shape[:3], 2), stats),
        ("dlse", args.dlse, query.shape[:3], stats),
    ):
        if x is None:
            continue
        if tuple(x.shape) != tuple(shape):
            raise ValueError(f"{op}: {name} must have shape {tuple(shape)}; got {tuple(x.shape)}")
        if x.dtype != dtype:
            raise TypeError(f"{op}: {name} must be {dtype}; got {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"{op}: {name} must be on {query.device}; got {x.device}")


# ---- shapes -------------------------------------------------------------------------------------


@torch.library.register_fake(f"{NAME}::flash_attn_fwd", lib=library)
def _forward_shapes(*args: Any) -> tuple[Tensor, Tensor]:
    call = ForwardArgs.read(args)
    _check_forward("orchard::flash_attn_fwd", call)
    out = empty_in_order_of(call.query, call.value.shape[-1])
    stats_shape = (*call.query.shape[:3], 2)
    return out, call.query.new_empty(stats_shape, dtype=stats_dtype(call.query))


@torch.library.register_fake(f"{NAME}::flash_attn_bwd", lib=library)
def _backward_shapes(*args: Any) -> tuple[Tensor, ...]:
    call = BackwardArgs.read(args)
    _check_backward("orchard::flash_attn_bwd", call)
    mask, sinks = call.scoring.attn_mask, call.scoring.sinks
    nothing = (0,)
    return (
        empty_in_order_of(call.query),
        empty_in_order_of(call.key),
        empty_in_order_of(call.value),
        mask.new_empty(mask.shape)
        if mask is not None and call.mask_grad
        else call.query.new_empty(nothing),
        sinks.new_empty(sinks.shape) if sinks is not None else call.query.new_empty(nothing),
    )


# ---- reference kernels --------------------------------------------------------------------------


def why_not_metal(query: Tensor, impl: str) -> str:
    """The reason for a call that the dispatcher sent here because no MPS kernel is registered."""
    if query.device.type != "mps":
        return f"{calls.NOT_MPS}{query.device.type}, not on mps"
    if impl == "reference":
        return 'impl="reference" was asked for'
    return native.why_not() or "the dispatcher did not choose the MPS kernel"


def no_autocast(query: Tensor) -> AbstractContextManager:
    """Switches autocast off, because the reference chooses its own precision."""
    device_type = query.device.type
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _described(args: ForwardArgs | BackwardArgs) -> Description:
    return describe(args.query, args.key, args.value, args.scoring)


def _run_forward(args: ForwardArgs, reason: str) -> tuple[Tensor, Tensor]:
    _check_forward("orchard::flash_attn_fwd", args)
    calls.record_reference("flash_attn_fwd", reason, _described(args), args.impl)
    with no_autocast(args.query):
        return reference.forward(args.query, args.key, args.value, args.scoring)


def _run_backward(args: BackwardArgs, reason: str) -> tuple[Tensor, ...]:
    _check_backward("orchard::flash_attn_bwd", args)
    calls.record_reference("flash_attn_bwd", reason, _described(args), args.impl)
    with no_autocast(args.query):
        return reference.backward(*args[:7], scoring=args.scoring, mask_grad=args.mask_grad)


def _forward_by_dispatcher(*args: Any) -> tuple[Tensor, Tensor]:
    call = ForwardArgs.read(args)
    return _run_forward(call, why_not_metal(call.query, call.impl))


def _backward_by_dispatcher(*args: Any) -> tuple[Tensor, ...]:
    call = BackwardArgs.read(args)
    return _run_backward(call, why_not_metal(call.query, call.impl))


def _forward_by_native(*args: Any) -> tuple[Tensor, Tensor]:
    *rest, reason = args
    with calls.kept_pending():
        return _run_forward(ForwardArgs.read(rest), reason)


def _backward_by_native(*args: Any) -> tuple[Tensor, ...]:
    *rest, reason = args
    with calls.kept_pending():
        return _run_backward(BackwardArgs.read(rest), reason)


for _name, _kernel in (
    ("flash_attn_fwd", _forward_by_dispatcher),
    ("flash_attn_bwd", _backward_by_dispatcher),
    ("flash_attn_fwd_reference", _forward_by_native),
    ("flash_attn_bwd_reference", _backward_by_native),
):
    library.impl(_name, _kernel, "CompositeExplicitAutograd")
