"""The ops' schemas and handles, and their arguments by name.

``native/module.cpp`` adds the MPS kernels, ``attention.py`` flash_attn itself. Arguments are
positional throughout: torch.library's helpers and the stable ABI handle keyword-only arguments
unevenly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import cache, calls, namespace, scoring, watch
from ..scoring import Scoring

_FORWARD = f"Tensor query, Tensor key, Tensor value, {scoring.SCHEMA}"
_BACKWARD = (
    "Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor row_stats, {scoring.SCHEMA}, bool mask_grad"
)
_RESULTS = "(Tensor out, Tensor row_stats)"
_DECODED = "(Tensor out, Tensor lse)"
_GRADIENTS = "(Tensor dq, Tensor dk, Tensor dv, Tensor dmask, Tensor dsinks)"
_PLAN = (
    "(str refusal, str detail, str advice, str[] families, str[] names, str[] instantiations, "
    "str[] tiles, str[] tile_names, str[] alternatives, int[] launches, int scratch_bytes)"
)
_FLEX = (
    "Tensor query, Tensor key, Tensor value, {}Tensor[] captures, Tensor? block_states, "
    "int block_q, int block_kv, str score, str mask, float scale, str impl"
)
_FLEX_FORWARD = _FLEX.format("")
_FLEX_BACKWARD = "Tensor dout, Tensor? dlse, " + _FLEX.format("Tensor out, Tensor row_stats, ")
_FLEX_GRADIENTS = "(Tensor dq, Tensor dk, Tensor dv)"
INTERFACE = (
    f"orchard_ops interface 4: flash_attn_fwd({_FORWARD}, str impl) -> {_RESULTS}; "
    f"flash_attn_bwd({_BACKWARD}, str impl) -> {_GRADIENTS}; "
    f"flash_attn_plan({_FORWARD}, str impl) -> {_PLAN}; "
    f"flash_attn_decode({cache.DECODE_SCHEMA}) -> {_DECODED}; "
    f"flash_attn_append({cache.APPEND_SCHEMA}) -> (); "
    f"flash_attn_decode_plan({cache.DECODE_SCHEMA}) -> {_PLAN}; "
    f"flash_attn_append_plan({cache.APPENDED_SCHEMA}) -> {_PLAN}; "
    f"flex_attn_fwd({_FLEX_FORWARD}) -> {_RESULTS}; "
    f"flex_attn_bwd({_FLEX_BACKWARD}) -> {_FLEX_GRADIENTS}; "
    f"flex_attn_plan({_FLEX_FORWARD}) -> {_PLAN}"
)
"""What ``native/module.cpp`` must answer to be the library of this package."""

library = torch.library.Library(namespace.NAME, "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
for _schema in (
    "flash_attn(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, "
    "float dropout_p=0.0, bool is_causal=False, *, float? scale=None, bool enable_gqa=False, "
    "int window_left=-1, int window_right=-1, float softcap=0.0, Tensor? alibi_slopes=None, "
    "Tensor? sinks=None, Tensor? key_ranges=None) -> Tensor",
    f'flash_attn_fwd({_FORWARD}, str impl="auto") -> {_RESULTS}',
    f'flash_attn_bwd({_BACKWARD}, str impl="auto") -> {_GRADIENTS}',
    # The MPS kernels call these when Metal refuses or fails, with the reason: the same text for any
    # numbers, since reasons are counted.
    f"flash_attn_fwd_reference({_FORWARD}, str impl, str reason) -> {_RESULTS}",
    f"flash_attn_bwd_reference({_BACKWARD}, str impl, str reason) -> {_GRADIENTS}",
    f'flash_attn_decode({cache.DECODE_SCHEMA}="auto") -> {_DECODED}',
    f'flash_attn_append({cache.APPEND_SCHEMA}="auto") -> ()',
    f"flash_attn_append_reference({cache.APPEND_SCHEMA}, str reason) -> ()",
    f"flash_attn_decode_reference({cache.DECODE_SCHEMA}, str reason) -> {_DECODED}",
    f'flex_attn_fwd({_FLEX_FORWARD}="auto") -> {_RESULTS}',
    f'flex_attn_bwd({_FLEX_BACKWARD}="auto") -> {_FLEX_GRADIENTS}',
):
    library.define(_schema, tags=_TAGS)


_CANNOT = "the Metal kernels cannot run this call"
_REMEDY = (
    ": outside of torch.compile (torch.compiler.disable) orchard_ops.flex_attention takes the "
    "reference for it"
)


def _raising_what_was_raised(op: Any) -> Any:
    """The handle `op`, whose calls raise the very exception of a fallback to the reference.

    From there it passes through the native library, which knows RuntimeError alone. The calls are
    also what `report` watches.
    """
    call = op._op
    name = str(op).split(".")[1]  # of orchard.flash_attn_fwd.default

    def call_and_tell(*args: Any, **kwargs: Any) -> Any:
        try:
            if watch.watchers:
                return watch.call(name, call, args, kwargs)
            return call(*args, **kwargs) if kwargs else call(*args)
        except RuntimeError as error:
            original = calls.take_pending(str(error))
            if original is None and name.startswith("flex_") and _CANNOT in str(error):
                # Compiled code comes here: eager code asks first, and takes the reference.
                raise RuntimeError(f"{str(error).rstrip()}{_REMEDY}") from None
            if original is None:
                raise
            raise original from None

    op._op = call_and_tell
    return op


FORWARD = _raising_what_was_raised(namespace.OPS.flash_attn_fwd.default)
"""``orchard::flash_attn_fwd``, see `ForwardArgs`; out and row_stats."""
BACKWARD = _raising_what_was_raised(namespace.OPS.flash_attn_bwd.default)
"""``orchard::flash_attn_bwd``, see `BackwardArgs`; dq, dk, dv, dmask and dsinks."""
DECODE = _raising_what_was_raised(namespace.OPS.flash_attn_decode.default)
"""``orchard::flash_attn_decode``, see `CacheCall`; out and lse."""
APPEND = _raising_what_was_raised(namespace.OPS.flash_attn_append.default)
"""``orchard::flash_attn_append``, see `AppendCall`; it returns nothing."""
FLEX_FORWARD = _raising_what_was_raised(namespace.OPS.flex_attn_fwd.default)
"""``orchard::flex_attn_fwd``, see `flex.FlexCall`; out and row_stats."""
FLEX_BACKWARD = _raising_what_was_raised(namespace.OPS.flex_attn_bwd.default)
"""``orchard::flex_attn_bwd``, see `flex.FlexGradientCall`; dq, dk and dv."""
for _packet in (
    namespace.OPS.flash_attn_fwd,
    namespace.OPS.flash_attn_bwd,
    namespace.OPS.flash_attn_decode,
    namespace.OPS.flash_attn_append,
    namespace.OPS.flex_attn_fwd,
    namespace.OPS.flex_attn_bwd,
):
    _raising_what_was_raised(_packet)


class ForwardArgs(NamedTuple):
    """The arguments of ``orchard::flash_attn_fwd``."""

    query: Any
    key: Any
    value: Any
    scoring: Scoring
    impl: str

    @classmethod
    def read(cls, args: Sequence[Any]) -> ForwardArgs:
        """From the flat list; the dispatcher leaves out a trailing argument with its default."""
        end = 3 + len(Scoring._fields)
        return cls._make((*args[:3], Scoring._make(args[3:end]), *(args[end:] or ("auto",))))

    def flat(self) -> tuple[Any, ...]:
        return (self.query, self.key, self.value, *self.scoring, self.impl)


class BackwardArgs(NamedTuple):
    """The arguments of ``orchard::flash_attn_bwd``."""

    dout: Any
    dlse: Any
    query: Any
    key: Any
    value: Any
    out: Any
    row_stats: Any
    scoring: Scoring
    mask_grad: bool
    impl: str

    @classmethod
    def read(cls, args: Sequence[Any]) -> BackwardArgs:
        """From the flat list; the dispatcher leaves out a trailing argument with its default."""
        end = 7 + len(Scoring._fields)
        mask_grad, *impl = args[end:]
        scoring = Scoring._make(args[7:end])
        return cls._make((*args[:7], scoring, mask_grad, *(impl or ("auto",))))

    def flat(self) -> tuple[Any, ...]:
        return (*self[:7], *self.scoring, self.mask_grad, self.impl)


def stats_dtype(query: Tensor) -> torch.dtype:
    """The dtype of row_stats and lse."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def public_lse(row_stats: Tensor, unit: float) -> Tensor:
    """(B, Hq, L): the natural logarithm of the softmax's denominator, from the pair (see below).

    row_stats (B, Hq, L, 2) holds the number that a row's exponentials count from and the logarithm
    of their sum; `Scoring.unit` is what 1 is there. Side by side they lose nothing: their sum does,
    where the first is large, so the backward takes them apart.

    The result is unit * (origin + log_sum) rounded once, to within 0.505 units in the last place of
    a normal number. A sum and a product would round twice: what they lose is added, as a constant,
    so that the derivative is that of the sum and the product.
    """
    total = row_stats.sum(-1)
    if unit == 1.0:
        return total
    lse = total * unit
    return lse + _lost(row_stats.detach(), total.detach(), lse.detach())


_LN2_START = 0.5 + 0.25 - 0.0625
_LN2_REST = 0.005647180559945309417  # ln 2 = start + rest


def _lost(row_stats: Tensor, total: Tensor, lse: Tensor) -> Tensor:
    """ln 2 * (origin + log_sum) - lse, 0 where these are infinite; 12 operations a row.

    lse and total times the start of ln 2 are so near each other that the differences on the way are
    exact (Sterbenz), and the rest is small enough for one that is rounded.
    """
    origin, log_sum = row_stats.unbind(-1)
    # What `total` lacks, after Knuth: it is exact whichever of the two is larger.
    rounded = total - origin
    lacking = (origin - (total - rounded)) + (log_sum - rounded)
    beyond = lse.sub(total, alpha=0.5).sub(total, alpha=0.25).add(total, alpha=0.0625)
    lost = total * _LN2_REST - beyond
    return lost.add(lacking, alpha=_LN2_START + _LN2_REST).nan_to_num()
