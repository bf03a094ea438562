"""``orchard::flex_attn_fwd`` and ``orchard::flex_attn_bwd``: attention whose scores and masks are
given as Metal text (`orchard_ops.flex`), with their fake kernels and the derivative.

They run on Metal alone: where that is not possible, `orchard_ops.flex` computes the functions
themselves and does not call them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import native
from ..checks import check_impl, check_problem
from ..layout import empty_in_order_of
from ..namespace import NAME, OPS
from .autograd import _below_autograd, _Formula, _of_operands, _refuse_tangents, needs_grad
from .schema import FLEX_BACKWARD, FLEX_FORWARD, library, public_lse, stats_dtype


class FlexScoring(NamedTuple):
    """What a call says of its scores, in the order of the schema."""

    captures: Sequence[Tensor]
    """The tensors that the texts read, as they count them."""
    block_states: Tensor | None
    """(1 or B, 1 or Hq, blocks of queries, blocks of keys) uint8: 0 where a block of pairs is
    hidden, 1 where `mask` is asked, 2 where all is seen whatever it says. None asks everywhere."""
    block_q: int
    block_kv: int
    score: str
    """``struct ScoreMod``, or an empty text: scores are the scaled products."""
    mask: str
    """``struct MaskMod``, or an empty text: what block_states let through is seen."""
    scale: float

    @property
    def unit(self) -> float:
        """The factor that makes the logarithms in row_stats natural ones (`Scoring.unit`)."""
        return 1.0 if self.score else math.log(2.0)

    def check(self, op: str, query: Tensor, key: Tensor) -> None:
        for n, capture in enumerate(self.captures):
            if capture.device != query.device:
                raise ValueError(
                    f"{op}: captured tensors must be on {query.device}; "
                    f"number {n} is on {capture.device}"
                )
            if capture.numel() == 0:
                raise ValueError(
                    f"{op}: captured tensors must have elements; "
                    f"number {n} has shape {tuple(capture.shape)}"
                )
        states = self.block_states
        if states is None:
            return
        if states.dtype != torch.uint8 or states.device != query.device or states.dim() != 4:
            raise ValueError(
                f"{op}: block_states must be a 4-D uint8 tensor on {query.device}; got "
                f"{states.dtype} of shape {tuple(states.shape)} on {states.device}"
            )
        if self.block_q < 1 or self.block_kv < 1:
            raise ValueError(
                f"{op}: block sizes must be positive; got {self.block_q} and {self.block_kv}"
            )
        batches, heads, rows, cols = states.shape
        batch, num_heads, q_len, _ = query.shape
        if batches not in (1, batch) or heads not in (1, num_heads):
            raise ValueError(
                f"{op}: block_states must have 1 or {batch} batches and 1 or {num_heads} heads; "
                f"got shape {tuple(states.shape)}"
            )
        if rows * self.block_q < q_len or cols * self.block_kv < key.shape[2]:
            raise ValueError(
                f"{op}: block_states covers {rows * self.block_q} queries and "
                f"{cols * self.block_kv} keys; got {q_len} and {key.shape[2]}: create the block "
                "mask for these lengths"
            )


def _fields(args: Sequence[Any], tensors: int) -> tuple[Any, ...]:
    """The fields of a call from the flat list, which begins with that many tensors. The dispatcher
    leaves out a trailing argument with its default."""
    end = tensors + len(FlexScoring._fields)
    scoring = FlexScoring._make(args[tensors:end])
    return (*args[:tensors], scoring, *(args[end:] or ("auto",)))


class FlexCall(NamedTuple):
    """The arguments of ``orchard::flex_attn_fwd``."""

    query: Tensor
    key: Tensor
    value: Tensor
    scoring: FlexScoring
    impl: str

    @classmethod
    def read(cls, args: Sequence[Any]) -> FlexCall:
        return cls._make(_fields(args, 3))

    def check(self, op: str) -> None:
        check_impl(op, self.impl)
        check_problem(op, self.query, self.key, self.value)
        self.scoring.check(op, self.query, self.key)


class FlexGradientCall(NamedTuple):
    """The arguments of ``orchard::flex_attn_bwd``."""

    dout: Tensor
    dlse: Tensor | None
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    row_stats: Tensor
    scoring: FlexScoring
    impl: str

    @classmethod
    def read(cls, args: Sequence[Any]) -> FlexGradientCall:
        return cls._make(_fields(args, 7))

    def check(self, op: str) -> None:
        FlexCall(self.query, self.key, self.value, self.scoring, self.impl).check(op)


# ---- shapes, and where there is no Metal --------------------------------------------------------


@torch.library.register_fake(f"{NAME}::flex_attn_fwd", lib=library)
def _forward_shapes(*args: Any) -> tuple[Tensor, Tensor]:
    call = FlexCall.read(args)
    call.check("orchard::flex_attn_fwd")
    query = call.query
    stats = query.new_empty((*query.shape[:3], 2), dtype=stats_dtype(query))
    return empty_in_order_of(query, call.value.shape[-1]), stats


@torch.library.register_fake(f"{NAME}::flex_attn_bwd", lib=library)
def _backward_shapes(*args: Any) -> tuple[Tensor, ...]:
    call = FlexGradientCall.read(args)
    call.check("orchard::flex_attn_bwd")
    return tuple(empty_in_order_of(x) for x in (call.query, call.key, call.value))


def _refuse_device(op: str, query: Tensor) -> Any:
    why = native.why_not() if query.device.type == "mps" else f"got {query.device.type}"
    raise NotImplementedError(
        f"orchard::{op}: this op runs on mps alone: {why}; orchard_ops.flex_attention computes the "
        "same on every device"
    )


def _forward_elsewhere(*args: Any) -> tuple[Tensor, Tensor]:
    return _refuse_device("flex_attn_fwd", FlexCall.read(args).query)


def _backward_elsewhere(*args: Any) -> tuple[Tensor, ...]:
    return _refuse_device("flex_attn_bwd", FlexGradientCall.read(args).query)


library.impl("flex_attn_fwd", _forward_elsewhere, "CompositeExplicitAutograd")
library.impl("flex_attn_bwd", _backward_elsewhere, "CompositeExplicitAutograd")


# ---- the derivative -----------------------------------------------------------------------------


class _FlexAttention(_Formula):
    """Computes out and row_stats, with flex_attn_bwd as the derivative. Captured tensors come one
    by one, since autograd saves no lists."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        states: Tensor | None,
        rest: tuple[Any, ...],
        *captures: Tensor,
    ) -> tuple[Tensor, Tensor]:
        results = _below_autograd(FLEX_FORWARD, (query, key, value, list(captures), states, *rest))
        ctx.save_for_backward(query, key, value, *results, states, *captures)
        ctx.rest = rest
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, drow_stats: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if dout is None and drow_stats is None:
            return (None,) * len(ctx.needs_input_grad)
        query, key, value, out, row_stats, states, *captures = ctx.saved_tensors
        scoring = FlexScoring(captures, states, *ctx.rest[:-1])
        dlse = None
        if drow_stats is not None:
            # lse is the sum of both numbers, so they have the same gradient.
            dlse = drow_stats[..., 1] / scoring.unit
        if dout is None:
            dout = torch.zeros_like(out)
        grads = FLEX_BACKWARD(dout, dlse, query, key, value, out, row_stats, *scoring, ctx.rest[-1])
        return _of_operands(ctx, grads)


class _FlexAttentionBackward(_Formula):
    """Computes flex_attn_bwd and refuses its derivative, for which torch would return wrong
    gradients."""

    @staticmethod
    def forward(ctx: Any, captures: tuple[Tensor, ...], *args: Any) -> tuple[Tensor, ...]:
        return _below_autograd(FLEX_BACKWARD, (*args[:7], list(captures), *args[7:]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise NotImplementedError(
            "orchard::flex_attn_bwd: double backward is not implemented; compute the attention "
            "with torch.softmax for second derivatives"
        )


def _refuse_trainable(captures: Sequence[Tensor]) -> None:
    if not torch.is_grad_enabled():
        return
    for n, capture in enumerate(captures):
        if capture.requires_grad:
            raise NotImplementedError(
                "orchard::flex_attn_fwd: captured tensors have no gradient; number "
                f"{n} requires grad: detach it, or call orchard_ops.flex_attention"
            )


def _forward_kernel(*args: Any) -> tuple[Tensor, Tensor]:
    call = FlexCall.read(args)
    captures = call.scoring.captures
    _refuse_tangents("flex_attn_fwd", (*args[:3], *captures))
    call.check("orchard::flex_attn_fwd")
    _refuse_trainable(captures)
    if needs_grad(args[:3]):
        _, states, *numbers = call.scoring
        rest = (*numbers, call.impl)
        return _FlexAttention.record(*args[:3], states, rest, *captures)
    return _below_autograd(FLEX_FORWARD, args)


def _backward_kernel(*args: Any) -> tuple[Tensor, ...]:
    call = FlexGradientCall.read(args)
    _refuse_tangents("flex_attn_bwd", args[:7])
    call.check("orchard::flex_attn_bwd")
    if needs_grad(args[:7]):
        captures, *numbers = call.scoring
        return _FlexAttentionBackward.record(tuple(captures), *args[:7], *numbers, call.impl)
    return _below_autograd(FLEX_BACKWARD, args)


library.impl("flex_attn_fwd", _forward_kernel, "Autograd")
library.impl("flex_attn_bwd", _backward_kernel, "Autograd")


# ---- what orchard_ops.flex calls ----------------------------------------------------------------


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captures: Sequence[Tensor],
    block_states: Tensor | None,
    block_q: int,
    block_kv: int,
    score: str,
    mask: str,
    scale: float,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """out and lse, (B, Hq, L) with natural logarithms; differentiable in query, key and value."""
    scoring = FlexScoring(list(captures), block_states, block_q, block_kv, score, mask, scale)
    out, row_stats = FLEX_FORWARD(query, key, value, *scoring, impl)
    return out, public_lse(row_stats, scoring.unit)


def why_not_metal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captures: Sequence[Tensor],
    block_states: Tensor | None,
    block_q: int,
    block_kv: int,
    score: str,
    mask: str,
    scale: float,
    impl: str = "auto",
) -> str:
    """Why Metal cannot run such a call of `attend`, or an empty text. Runs nothing."""
    if query.device.type != "mps":
        return f"the tensors are on {query.device.type}, not on mps"
    missing = native.why_not()
    if missing:
        return missing
    scoring = FlexScoring(list(captures), block_states, block_q, block_kv, score, mask, scale)
    refusal, detail, *_ = OPS.flex_attn_plan(query, key, value, *scoring, impl)
    return f"{refusal} ({detail})" if detail else refusal
