"""``orchard::flex_attn_known_fwd`` and ``orchard::flex_attn_known_bwd``: calls whose mods the fixed
kernels know, if the numbers of the block mask's lists and of the documents allow it.

A compiled graph has no numbers when it is made. It has these ops, which look at them when they run,
once for each list, as eager code does, and call either ``flash_attn_fwd`` or ``flex_attn_fwd``. The
forward says by `choice` which it was, so that the backward follows it whatever has been written to
the lists since.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import Call, prepare
from ..layout import empty_in_order_of
from ..namespace import NAME, OPS
from ..ops.autograd import (
    _below_autograd,
    _Formula,
    _of_operands,
    _refuse_tangents,
    needs_grad,
    without_backward,
)
from ..ops.flex import FlexScoring
from ..ops.kernels import no_autocast
from ..ops.schema import (
    BACKWARD,
    FLEX_BACKWARD,
    FLEX_FORWARD,
    FORWARD,
    library,
    public_lse,
    stats_dtype,
)
from .block_lists import Said, lists_follow
from .block_mask import Blocks
from .known import RangeRule

_FIXED, _FLEX = 1, 0

_OPERANDS = "Tensor query, Tensor key, Tensor value"
_CALL = (
    "Tensor[] captures, Tensor[] lists, int block_q, int block_kv, str score, str mask, "
    "float scale, Tensor? attn_mask, Tensor? alibi_slopes, float softcap, int[] windows, "
    "str ranges, Tensor? source, int number, bool lse, bool alone"
)
_SAVED = "Tensor out, Tensor row_stats, Tensor choice"
library.define(
    f"flex_attn_known_fwd({_OPERANDS}, {_CALL}) -> ({_SAVED}, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
library.define(
    f"flex_attn_known_bwd(Tensor dout, Tensor? dlse, {_OPERANDS}, {_SAVED}, {_CALL}) -> "
    "(Tensor dq, Tensor dk, Tensor dv)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


class KnownCall(NamedTuple):
    """What a call says besides its operands, in the order of the schema."""

    captures: Sequence[Tensor]
    lists: Sequence[Tensor]
    """Those of the block mask that are there: two or four, or none where all blocks are asked."""
    block_q: int
    block_kv: int
    score: str
    mask: str
    """The texts of the mods, which read `captures`."""
    scale: float
    attn_mask: Tensor | None
    alibi_slopes: Tensor | None
    softcap: float
    windows: Sequence[int]
    """Left and right of both mods together, the same of mask_mod, and whether mask_mod has the
    ranges (else score_mod)."""
    ranges: str
    source: Tensor | None
    number: int
    """A `RangeRule`; an empty kind is none."""
    lse: bool
    """Whether lse is asked for."""
    alone: bool
    """Whether no backward will use the results. Where autograd records the op, it says no."""

    def blocks(self) -> Blocks | None:
        if not self.lists:
            return None
        first, second, *full = self.lists
        return Blocks((first, second, *(full or (None, None))), self.block_q, self.block_kv)

    def fixed(self, query: Tensor, key: Tensor, value: Tensor) -> Call | None:
        """The call of `flash_attn`, if it sees the same."""
        left, right, mask_left, mask_right, in_mask = self.windows
        ranges = rule = None
        if self.ranges:
            rule = RangeRule(self.ranges, self.source, self.number)
            ranges = rule.key_ranges(query, key)
            if ranges is None:
                return None
        blocks = self.blocks()
        if blocks is not None:
            of_mask = ranges if in_mask else None
            said = Said.of(mask_left, mask_right, of_mask, rule)
            if not lists_follow(blocks, said, (*query.shape[:3], key.shape[2])):
                return None
        with no_autocast(query):
            return prepare(
                query,
                key,
                value,
                self.attn_mask,
                scale=self.scale,
                enable_gqa=query.shape[1] != key.shape[1],
                window_left=left,
                window_right=right,
                softcap=self.softcap,
                alibi_slopes=self.alibi_slopes,
                key_ranges=ranges,
            )

    def flex(self, query: Tensor, key: Tensor) -> FlexScoring:
        blocks = self.blocks()
        states = None if blocks is None else blocks.states(query.shape[2], key.shape[2])
        sizes = (self.block_q, self.block_kv)
        return FlexScoring(list(self.captures), states, *sizes, self.score, self.mask, self.scale)


def _forward(*args: Any) -> tuple[Tensor, ...]:
    query, key, value = args[:3]
    call = KnownCall(*args[3:])
    fixed = call.fixed(query, key, value)
    if fixed is not None:
        flat = fixed.flat()
        out, row_stats = FORWARD(*(without_backward(flat) if call.alone else flat))
        unit = fixed.scoring.unit
    else:
        scoring = call.flex(query, key)
        out, row_stats = FLEX_FORWARD(query, key, value, *scoring, "auto")
        unit = scoring.unit
    choice = torch.full((1,), _FLEX if fixed is None else _FIXED, dtype=torch.uint8, device="cpu")
    lse = public_lse(row_stats, unit) if call.lse else row_stats.new_empty((0,))
    return out, row_stats, choice, lse


def _backward(*args: Any) -> tuple[Tensor, ...]:
    dout, dlse, query, key, value, out, row_stats, choice = args[:8]
    call = KnownCall(*args[8:])
    if int(choice) == _FLEX:  # it is on the CPU
        scoring = call.flex(query, key)
        given = (dout, dlse, query, key, value, out, row_stats)
        return FLEX_BACKWARD(*given, *scoring, "auto")
    fixed = call._replace(lists=()).fixed(query, key, value)
    if fixed is None:
        raise RuntimeError(
            "orchard::flex_attn_known_bwd: the documents that the mask_mod captured are no longer "
            "in ascending order; got a tensor that was written to after the forward: call backward "
            "before it is changed"
        )
    given = (dout, dlse, *fixed.operands, out, row_stats)
    return BACKWARD(*given, *fixed.scoring, False, fixed.impl)[:3]


@torch.library.register_fake(f"{NAME}::flex_attn_known_fwd", lib=library)
def _forward_shapes(*args: Any) -> tuple[Tensor, ...]:
    query, _, value = args[:3]
    call = KnownCall(*args[3:])
    rows, dtype = query.shape[:3], stats_dtype(query)
    return (
        empty_in_order_of(query, value.shape[-1]),
        query.new_empty((*rows, 2), dtype=dtype),
        torch.empty((1,), dtype=torch.uint8, device="cpu"),
        query.new_empty(rows if call.lse else (0,), dtype=dtype),
    )


@torch.library.register_fake(f"{NAME}::flex_attn_known_bwd", lib=library)
def _backward_shapes(*args: Any) -> tuple[Tensor, ...]:
    return tuple(empty_in_order_of(x) for x in args[2:5])


library.impl("flex_attn_known_fwd", _forward, "CompositeExplicitAutograd")
library.impl("flex_attn_known_bwd", _backward, "CompositeExplicitAutograd")

FORWARD_OP = OPS.flex_attn_known_fwd.default
BACKWARD_OP = OPS.flex_attn_known_bwd.default


# ---- the derivative -----------------------------------------------------------------------------


def _parted(call: KnownCall) -> tuple[tuple[int, int], tuple[Tensor | None, ...], KnownCall]:
    """How many captures and lists there are, all tensors one by one, since autograd saves no lists,
    and the rest."""
    tensors = (*call.captures, *call.lists, call.attn_mask, call.alibi_slopes, call.source)
    nothing = call._replace(captures=(), lists=(), attn_mask=None, alibi_slopes=None, source=None)
    return (len(call.captures), len(call.lists)), tensors, nothing


def _joined(counts: tuple[int, int], tensors: Sequence[Any], rest: KnownCall) -> KnownCall:
    captures, lists = counts
    attn_mask, alibi_slopes, source = tensors[-3:]
    return rest._replace(
        captures=list(tensors[:captures]),
        lists=list(tensors[captures : captures + lists]),
        attn_mask=attn_mask,
        alibi_slopes=alibi_slopes,
        source=source,
    )


class _KnownAttention(_Formula):
    """Computes the forward, with flex_attn_known_bwd as the derivative."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        counts: tuple[int, int],
        rest: KnownCall,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        call = _joined(counts, tensors, rest)
        results = _below_autograd(FORWARD_OP, (query, key, value, *call))
        out, row_stats, choice = results[:3]
        ctx.mark_non_differentiable(row_stats, choice)
        ctx.save_for_backward(query, key, value, out, row_stats, choice, *tensors)
        ctx.counts, ctx.rest = counts, rest
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
        *_, dlse = others
        if dout is None and dlse is None:
            return (None,) * len(ctx.needs_input_grad)
        query, key, value, out, row_stats, choice, *tensors = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        call = _joined(ctx.counts, tensors, ctx.rest)
        grads = BACKWARD_OP(dout, dlse, query, key, value, out, row_stats, choice, *call)
        return _of_operands(ctx, grads)


class _KnownAttentionBackward(_Formula):
    """Computes flex_attn_known_bwd and refuses its derivative."""

    @staticmethod
    def forward(
        ctx: Any, counts: tuple[int, int], rest: KnownCall, *tensors: Any
    ) -> tuple[Tensor, ...]:
        return _below_autograd(BACKWARD_OP, (*tensors[:8], *_joined(counts, tensors[8:], rest)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise NotImplementedError(
            "orchard::flex_attn_known_bwd: double backward is not implemented; compute the "
            "attention with torch.softmax for second derivatives"
        )


def _forward_kernel(*args: Any) -> tuple[Tensor, ...]:
    call = KnownCall(*args[3:])
    counts, tensors, rest = _parted(call)
    _refuse_tangents("flex_attn_known_fwd", (*args[:3], *tensors))
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise NotImplementedError(
            "orchard::flex_attn_known_fwd: captured tensors have no gradient; got one that "
            "requires grad: detach it, or call orchard_ops.flex_attention"
        )
    if needs_grad(args[:3]):
        return _KnownAttention.record(*args[:3], counts, rest._replace(alone=False), *tensors)
    return _below_autograd(FORWARD_OP, args)


def _backward_kernel(*args: Any) -> tuple[Tensor, ...]:
    _refuse_tangents("flex_attn_known_bwd", args[:8])
    if needs_grad(args[:8]):
        counts, tensors, rest = _parted(KnownCall(*args[8:]))
        return _KnownAttentionBackward.record(counts, rest, *args[:8], *tensors)
    return _below_autograd(BACKWARD_OP, args)


library.impl("flex_attn_known_fwd", _forward_kernel, "Autograd")
library.impl("flex_attn_known_bwd", _backward_kernel, "Autograd")
