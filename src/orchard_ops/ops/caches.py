"""The ops for caches of keys and values: fake and reference kernels. They have no derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import calls, reference
from ..cache import AppendCall, CacheCall
from ..descriptions import describe, describe_cache
from ..layout import empty_in_order_of
from ..namespace import NAME
from ..scoring import Scoring
from .kernels import no_autocast, why_not_metal
from .schema import APPEND, DECODE, library, public_lse, stats_dtype

_DECODE = "orchard::flash_attn_decode"
_APPEND = "orchard::flash_attn_append"


@torch.library.register_fake(f"{NAME}::flash_attn_decode", lib=library)
def _shapes(*args: Any) -> tuple[Tensor, Tensor]:
    call = CacheCall(*args)
    call.check(_DECODE)
    query = call.query
    out = empty_in_order_of(query, call.value.shape[-1])
    return out, query.new_empty(query.shape[:3], dtype=stats_dtype(query))


def _run(call: CacheCall, reason: str) -> tuple[Tensor, Tensor]:
    call.check(_DECODE)
    calls.record_reference("flash_attn_decode", reason, describe_cache(call), call.impl)
    with no_autocast(call.query):
        query, key, value, scoring = call.as_forward()
        out, row_stats = reference.forward(query, key, value, scoring)
        return out, public_lse(row_stats, scoring.unit)


def _by_dispatcher(*args: Any) -> tuple[Tensor, Tensor]:
    call = CacheCall(*args)
    return _run(call, why_not_metal(call.query, call.impl))


def _by_native(*args: Any) -> tuple[Tensor, Tensor]:
    *rest, reason = args
    with calls.kept_pending():
        return _run(CacheCall(*rest), reason)


def _fill(call: AppendCall, reason: str) -> None:
    call.check(_APPEND)
    described = describe(call.key, call.key_cache, call.value_cache, Scoring())
    calls.record_reference("flash_attn_append", reason, described, call.impl)
    call.fill()


@torch.library.register_fake(f"{NAME}::flash_attn_append", lib=library)
def _no_shapes(*args: Any) -> None:
    AppendCall(*args).check(_APPEND)


def _fill_by_dispatcher(*args: Any) -> None:
    call = AppendCall(*args)
    _fill(call, why_not_metal(call.key, call.impl))


def _fill_by_native(*args: Any) -> None:
    *rest, reason = args
    with calls.kept_pending():
        _fill(AppendCall(*rest), reason)


for _name, _kernel in (
    ("flash_attn_decode", _by_dispatcher),
    ("flash_attn_decode_reference", _by_native),
    ("flash_attn_append", _fill_by_dispatcher),
    ("flash_attn_append_reference", _fill_by_native),
):
    library.impl(_name, _kernel, "CompositeExplicitAutograd")


# ---- gradients, which would otherwise silently be none ------------------------------------------


def _refuse_gradients(op: str, call: CacheCall | AppendCall) -> None:
    if not torch.is_grad_enabled():
        return
    for name, x in call._asdict().items():
        if isinstance(x, Tensor) and x.requires_grad:
            raise NotImplementedError(
                f"{op}: attention to a cache has no gradient; got a {name} that requires grad: "
                "call it under torch.no_grad(), or use flash_attn on the keys and values themselves"
            )


def _decode_kernel(*args: Any) -> tuple[Tensor, Tensor]:
    _refuse_gradients(_DECODE, CacheCall(*args))
    with torch._C._AutoDispatchBelowAutograd():
        return DECODE(*args)


def _append_kernel(*args: Any) -> None:
    _refuse_gradients(_APPEND, AppendCall(*args))
    with torch._C._AutoDispatchBelowAutograd():
        APPEND(*args)


library.impl("flash_attn_decode", _decode_kernel, "Autograd")
library.impl("flash_attn_append", _append_kernel, "Autograd")


# ---- a change in place, which autograd hears of in inference mode too ---------------------------


def _change_in_place(keys: torch._C.DispatchKeySet, *args: Any) -> None:
    """Runs wherever PyTorch's own operators in place count: below autograd, or without it."""
    call = AppendCall(*args)
    caches = {"key_cache": call.key_cache, "value_cache": call.value_cache}
    for name, cache in caches.items():
        if cache.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{_APPEND}: {name} must not be an inference tensor outside of inference mode; got "
                "one that torch.inference_mode() made: call this in inference mode too, or "
                f"allocate {name} outside of it"
            )
    APPEND.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args)
    torch.autograd.graph.increment_version(caches.values())


library.impl("flash_attn_append", _change_in_place, "ADInplaceOrView", with_keyset=True)
