"""Fake kernel and reference kernels of flash_attn_decode. It has no derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import calls, reference
from ..cache import CacheCall
from ..descriptions import describe
from ..layout import empty_in_order_of
from ..namespace import NAME
from .kernels import no_autocast, why_not_metal
from .schema import DECODE, library, public_lse, stats_dtype

_OP = "orchard::flash_attn_decode"


@torch.library.register_fake(f"{NAME}::flash_attn_decode", lib=library)
def _shapes(*args: Any) -> tuple[Tensor, Tensor]:
    call = CacheCall(*args)
    call.check(_OP)
    query = call.query
    out = empty_in_order_of(query, call.value.shape[-1])
    return out, query.new_empty(query.shape[:3], dtype=stats_dtype(query))


def _run(call: CacheCall, reason: str) -> tuple[Tensor, Tensor]:
    call.check(_OP)
    described = describe(call.query, call.key, call.value, call.scoring)
    calls.record_reference("flash_attn_decode", reason, described, call.impl)
    with no_autocast(call.query):
        query, key, value, scoring = call.as_forward()
        # What no query may see can be anything, and a weight of 0 would not hide a NaN.
        begins, ends = (x.view(-1, 1, 1, 1) for x in call.bounds())
        slots = torch.arange(call.capacity, device=query.device).view(-1, 1)
        unused = (slots < begins) | (slots >= ends)
        key, value = (x.masked_fill(unused, 0.0) for x in (key, value))
        out, row_stats = reference.forward(query, key, value, scoring)
        return out, public_lse(row_stats, scoring.unit)


def _by_dispatcher(*args: Any) -> tuple[Tensor, Tensor]:
    call = CacheCall(*args)
    return _run(call, why_not_metal(call.query, call.impl))


def _by_native(*args: Any) -> tuple[Tensor, Tensor]:
    *rest, reason = args
    with calls.kept_pending():
        return _run(CacheCall(*rest), reason)


for _name, _kernel in (
    ("flash_attn_decode", _by_dispatcher),
    ("flash_attn_decode_reference", _by_native),
):
    library.impl(_name, _kernel, "CompositeExplicitAutograd")


def _refuse_gradients(*args: Any) -> tuple[Tensor, Tensor]:
    """It would otherwise return results that silently have none."""
    for name, x in zip(CacheCall._fields, args):
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                f"{_OP}: attention to a cache has no gradient; got a {name} that requires grad: "
                "call it under torch.no_grad(), or use flash_attn on the keys and values themselves"
            )
    with torch._C._AutoDispatchBelowAutograd():
        return DECODE(*args)


library.impl("flash_attn_decode", _refuse_gradients, "Autograd")
