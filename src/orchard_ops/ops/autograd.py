"""The derivative of flash_attn_fwd, which is flash_attn_bwd; that has none of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.function import _SingleLevelFunction

from ..scoring import NO_BACKWARD, TENSORS, Scoring
from . import eager
from .schema import BACKWARD, FORWARD, ForwardArgs, library

_FIRST_TENSORS = 3 + len(TENSORS) - 1
"""Of the forward's arguments, those before the numbers; key_ranges stands behind them."""
assert (*Scoring._fields[: len(TENSORS) - 1], Scoring._fields[-1]) == TENSORS
_KEY_SPAN = 3 + Scoring._fields.index("key_span")


def _split(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The forward's arguments, first those that may be tensors, then a tuple of the others, in
    which None stands for key_ranges."""
    rest = args[_FIRST_TENSORS:]
    if args[-2] is not None:
        rest = (*rest[:-2], None, rest[-1])
    return (*args[:_FIRST_TENSORS], args[-2], rest)


def _join(tensors: tuple[Any, ...], key_ranges: Tensor | None, rest: tuple[Any, ...]) -> Any:
    """Arguments of an op: `tensors`, and behind them `rest` with key_ranges in its place."""
    if key_ranges is None:
        return (*tensors, *rest)
    return (*tensors, *rest[:-2], key_ranges, rest[-1])


_forward, _backward = FORWARD._op, BACKWARD._op
"""The same calls with one Python frame less, for eager code."""


def _refuse_tangents(op: str, args: Sequence[Any]) -> None:
    """Refuses forward-mode AD, which would take the result for a constant: tangents do not reach
    the kernels."""
    if forward_ad._current_level < 0:
        return
    for x in args:
        if isinstance(x, Tensor) and unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"orchard::{op}: forward-mode differentiation (jvp, jacfwd) is not implemented; "
                "use F.scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH)"
            )


def needs_grad(args: Sequence[Any]) -> bool:
    """Whether autograd would record an op with these arguments."""
    if torch.is_grad_enabled():
        for x in args:
            if isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


def without_backward(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The forward's arguments, saying that no backward will use its results: the plan may then
    choose another kernel (prefers_decode in native/plan/decode.h)."""
    return (*args[:_KEY_SPAN], NO_BACKWARD, *args[_KEY_SPAN + 1 :])


def _operands_need_grad(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    )


def _below_transform() -> AbstractContextManager:
    """Surrounds the call of an op inside of an autograd.Function under torch.func.

    The function has switched gradients off, those of forward mode too. They are on again in the
    block, because a torch.func transform further out must record the op as well.
    """
    stack = ExitStack()
    stack.enter_context(torch._C._AutoDispatchBelowAutograd())
    stack.enter_context(torch.enable_grad())
    stack.enter_context(forward_ad._set_fwd_grad_enabled(True))
    return stack


def _below_autograd(op: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Calls an op from an autograd.Function, which has entered autograd for it."""
    if torch._C._are_functorch_transforms_active():
        with _below_transform():
            return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


class _Formula(_SingleLevelFunction):
    """An autograd.Function for calls from an Autograd kernel.

    torch.func's transforms are entered for the op before that, and a `torch.autograd.Function`
    would fail by entering them a second time.
    """

    apply: Callable[..., Any]

    @classmethod
    def record(cls, *args: Any) -> Any:
        if not torch._C._are_functorch_transforms_active():
            return cls.apply(*args)
        with enable_single_level_autograd_function():
            return cls.apply(*args)


def _of_operands(ctx: Any, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """What the backward of a function of query, key and value first, and of nothing else that has
    a gradient, returns for dq, dk and dv."""
    needed = ctx.needs_input_grad
    own = tuple(x if needs else None for x, needs in zip(grads, needed[:3], strict=True))
    return (*own, *(None,) * (len(needed) - 3))


def _compute(tensors: tuple[Any, ...], rest: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Calls FORWARD below autograd, with what `_split` makes of its arguments."""
    args = _join(tensors[:-1], tensors[-1], rest)
    if torch._C._are_functorch_transforms_active():
        with _below_transform():
            return FORWARD(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward(*args)


class _FlashAttention(_Formula):
    """Computes out and row_stats by flash_attn_fwd, with flash_attn_bwd as the derivative.

    Arguments that cannot be tensors come in one tuple, since autograd spends time on every
    argument. It would on a setup_context, too.
    """

    @staticmethod
    def forward(ctx: Any, *parts: Any) -> tuple[Tensor, Tensor]:
        results = _compute(parts[:-1], parts[-1])
        ctx.save_for_backward(*parts[:3], *results, *parts[3:-1])  # in the backward's order
        ctx.rest = parts[-1]
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, drow_stats: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        query_too, key_too, value_too, mask_too, _, sinks_too, *_ = ctx.needs_input_grad
        if dout is None and drow_stats is None:
            return (None,) * len(ctx.needs_input_grad)
        dlse = None
        if drow_stats is not None:
            # lse is the sum of both numbers, so they have the same gradient.
            dlse = drow_stats[..., 1] / saved_call(saved, ctx.rest).scoring.unit
        if dout is None:
            dout = torch.zeros_like(saved[3])
        dq, dk, dv, dmask, dsinks = differentiate((dout, dlse, *saved), ctx.rest, mask_too)
        return (
            dq if query_too else None,
            dk if key_too else None,
            dv if value_too else None,
            dmask if mask_too else None,
            None,
            dsinks if sinks_too else None,
            None,
            None,
            None,
        )


def saved_call(saved: tuple[Any, ...], rest: tuple[Any, ...]) -> ForwardArgs:
    """The forward's arguments, from the tensors and the rest that it saved for its backward."""
    query, key, value, _, _, *others, key_ranges = saved
    return ForwardArgs.read(_join((query, key, value, *others), key_ranges, rest))


class _FlashAttentionBackward(_Formula):
    """Computes flash_attn_bwd and refuses its derivative, for which torch would return wrong
    gradients."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _below_autograd(BACKWARD, args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise NotImplementedError(
            "orchard::flash_attn_bwd: double backward is not implemented; use "
            "F.scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH) for second "
            "derivatives"
        )


def _refuse_trainable_slopes(alibi_slopes: Tensor | None) -> None:
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            "orchard::flash_attn: alibi_slopes has no gradient; got slopes that require grad: "
            "detach them"
        )


def _forward_kernel(*args: Any) -> tuple[Tensor, Tensor]:
    _refuse_tangents("flash_attn_fwd", args)
    call = ForwardArgs.read(args)
    _refuse_trainable_slopes(call.scoring.alibi_slopes)
    args = call.flat()
    recorded = needs_grad(args)
    span = call.scoring.key_span
    if recorded and type(span) is int and span == NO_BACKWARD:  # an inner transform has said so
        args = (*args[:_KEY_SPAN], 0, *args[_KEY_SPAN + 1 :])
    *tensors, rest = _split(args)
    if recorded:
        return _FlashAttention.record(*tensors, rest)
    return _compute(tuple(tensors), rest)


def _backward_kernel(*args: Any) -> tuple[Tensor, ...]:
    _refuse_tangents("flash_attn_bwd", args)
    function = _FlashAttentionBackward
    return (function.record if needs_grad(args) else function.forward)(*args)


library.impl("flash_attn_fwd", _forward_kernel, "Autograd")
library.impl("flash_attn_bwd", _backward_kernel, "Autograd")


record = _FlashAttention.apply


def attend(args: tuple[Any, ...], record: Callable[..., Any] = record) -> tuple[Tensor, Tensor]:
    """Calls FORWARD. In the usual case it goes to `_forward_kernel` without the dispatcher, and
    `record` says how autograd differentiates it."""
    parts = _split(args)
    tensors = parts[:-1]
    alibi_slopes = parts[4]
    short = eager.nothing_between(tensors)
    if alibi_slopes is not None or not short:
        alone = not (needs_grad(tensors) if short else torch.is_grad_enabled())
        return FORWARD(*without_backward(args) if alone else args)
    if needs_grad(tensors):
        return record(*parts)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward(*without_backward(args))


def attend_operands(
    args: tuple[Any, ...], record: Callable[..., Any] = record
) -> tuple[Tensor, Tensor]:
    """As `attend`, in less time: for plain operands, with no other tensor than a seed."""
    if not eager.no_layer_between():
        return FORWARD(*args if torch.is_grad_enabled() else without_backward(args))
    if _operands_need_grad(*args[:3]):
        return record(*args[:_FIRST_TENSORS], None, args[_FIRST_TENSORS:])
    with torch._C._AutoDispatchBelowAutograd():
        return _forward(*without_backward(args))


def differentiate(
    tensors: tuple[Tensor | None, ...], rest: tuple[Any, ...], mask_grad: bool
) -> tuple[Tensor, ...]:
    """Calls BACKWARD, in the way that `attend` calls FORWARD: with its tensors in their order,
    key_ranges the last, and the forward's `rest`."""
    *first, key_ranges = tensors
    *numbers, _, impl = rest
    args = (*first, *numbers, key_ranges, mask_grad, impl)
    if torch.is_grad_enabled() or not eager.nothing_between(tensors):
        return BACKWARD(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return _backward(*args)
