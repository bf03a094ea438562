"""The ops: schemas, shapes (fake kernels), the reference kernels and the autograd formula.

``native/module.cpp`` adds the MPS kernels of flash_attn_fwd and flash_attn_bwd; ``attention.py``
adds flash_attn itself. Arguments are positional throughout: torch.library's helpers and the stable
ABI handle keyword-only arguments unevenly.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.forward_ad import unpack_dual
from torch.nn import Parameter

from . import _calls, _native, reference
from .checks import check_problem, check_scoring
from .layout import empty_in_order_of

_SCORING = (
    "Tensor? attn_mask, Tensor? alibi_slopes, Tensor? sinks, Tensor? dropout_seed, "
    "float dropout_p, float scale, int window_left, int window_right, int diagonal, float softcap"
)
_FORWARD = f"Tensor query, Tensor key, Tensor value, {_SCORING}"
_BACKWARD = (
    "Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    f"{_SCORING}, bool mask_grad"
)
_GRADIENTS = "(Tensor dq, Tensor dk, Tensor dv, Tensor dmask, Tensor dsinks)"

library = torch.library.Library("orchard", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
for _schema in (
    "flash_attn(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, "
    "float dropout_p=0.0, bool is_causal=False, *, float? scale=None, bool enable_gqa=False, "
    "int window_left=-1, int window_right=-1, float softcap=0.0, Tensor? alibi_slopes=None, "
    "Tensor? sinks=None) -> Tensor",
    f'flash_attn_fwd({_FORWARD}, str impl="auto") -> (Tensor out, Tensor lse)',
    f'flash_attn_bwd({_BACKWARD}, str impl="auto") -> {_GRADIENTS}',
    # What the MPS kernels call when Metal refuses or fails, with the reason.
    f"flash_attn_fwd_reference({_FORWARD}, str impl, str reason) -> (Tensor out, Tensor lse)",
    f"flash_attn_bwd_reference({_BACKWARD}, str impl, str reason) -> {_GRADIENTS}",
):
    library.define(_schema, tags=_TAGS)

forward = torch.ops.orchard.flash_attn_fwd.default
backward = torch.ops.orchard.flash_attn_bwd.default

_NUM_SCORING = 10
_NUM_TENSORS = 7  # leading arguments of the forward that may be tensors
_NUM_BACKWARD_TENSORS = 11


def _check_forward(op: str, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> None:
    scoring, impl = rest[:_NUM_SCORING], rest[_NUM_SCORING]
    mask, alibi_slopes, sinks, seed, dropout_p, _, left, right, diagonal, softcap = scoring
    check_problem(op, query, key, value)
    check_scoring(
        op,
        query,
        key,
        mask,
        alibi_slopes,
        sinks,
        seed,
        dropout_p,
        left,
        right,
        diagonal,
        softcap,
        impl,
    )


def _check_backward(
    op: str,
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *rest: Any,
) -> None:
    scoring, impl = rest[:_NUM_SCORING], rest[_NUM_SCORING + 1]
    _check_forward(op, query, key, value, *scoring, impl)
    out_shape = (*query.shape[:3], value.shape[3])
    lse_dtype = _lse_dtype(query)
    for name, x, shape, dtype in (
        ("dout", dout, out_shape, query.dtype),
        ("out", out, out_shape, query.dtype),
        ("lse", lse, query.shape[:3], lse_dtype),
        ("dlse", dlse, query.shape[:3], lse_dtype),
    ):
        if x is None:
            continue
        if tuple(x.shape) != tuple(shape):
            raise ValueError(f"{op}: {name} must have shape {tuple(shape)}; got {tuple(x.shape)}")
        if x.dtype != dtype:
            raise TypeError(f"{op}: {name} must be {dtype}; got {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"{op}: {name} must be on {query.device}; got {x.device}")


def _with_impl(args: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """The dispatcher leaves out a trailing argument that has its default value."""
    return (*args, "auto") if len(args) == count else args


def _lse_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


# ---- shapes -------------------------------------------------------------------------------------


@torch.library.register_fake("orchard::flash_attn_fwd", lib=library)
def _forward_fake(*args: Any):
    _check_forward("orchard::flash_attn_fwd", *_with_impl(args, 3 + _NUM_SCORING))
    query, value = args[0], args[2]
    out = empty_in_order_of(query, value.shape[-1])
    return out, query.new_empty(query.shape[:3], dtype=_lse_dtype(query))


@torch.library.register_fake("orchard::flash_attn_bwd", lib=library)
def _backward_fake(*args: Any):
    _check_backward("orchard::flash_attn_bwd", *_with_impl(args, 8 + _NUM_SCORING))
    query, key, value = args[2:5]
    mask, sinks, mask_grad = args[7], args[9], args[7 + _NUM_SCORING]
    return (
        empty_in_order_of(query),
        empty_in_order_of(key),
        empty_in_order_of(value),
        mask.new_empty(mask.shape) if mask is not None and mask_grad else query.new_empty(0),
        sinks.new_empty(sinks.shape) if sinks is not None else query.new_empty(0),
    )


# ---- reference kernels --------------------------------------------------------------------------


def _why_not_metal(query: Tensor, impl: str) -> str:
    """Why the dispatcher chose the reference: it only does so where no MPS kernel is registered."""
    if query.device.type != "mps":
        return f"{_calls.NOT_MPS}{query.device.type}, not on mps"
    if impl == "reference":
        return 'impl="reference" was asked for'
    return _native.why_not() or "the dispatcher did not choose the MPS kernel"


def _no_autocast(query: Tensor) -> AbstractContextManager:
    """The reference chooses its own precision."""
    device_type = query.device.type
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _forward_reference(*args: Any) -> tuple[Tensor, Tensor]:
    *inputs, impl, reason = args
    _check_forward("orchard::flash_attn_fwd", *inputs, impl)
    _calls.record_reference("flash_attn_fwd", reason, inputs[0].device.type, impl)
    query, key, value, *scoring = inputs
    with _no_autocast(query):
        return reference.forward(query, key, value, reference.Scoring(*scoring))


def _backward_reference(*args: Any) -> tuple[Tensor, ...]:
    *inputs, mask_grad, impl, reason = args
    _check_backward("orchard::flash_attn_bwd", *inputs, mask_grad, impl)
    _calls.record_reference("flash_attn_bwd", reason, inputs[2].device.type, impl)
    tensors, scoring = inputs[:7], inputs[7:]
    with _no_autocast(tensors[2]):
        return reference.backward(
            *tensors, scoring=reference.Scoring(*scoring), mask_grad=mask_grad
        )


def _forward_kernel(*args: Any) -> tuple[Tensor, Tensor]:
    *inputs, impl = _with_impl(args, 3 + _NUM_SCORING)
    return _forward_reference(*inputs, impl, _why_not_metal(inputs[0], impl))


def _backward_kernel(*args: Any) -> tuple[Tensor, ...]:
    *inputs, impl = _with_impl(args, 8 + _NUM_SCORING)
    return _backward_reference(*inputs, impl, _why_not_metal(inputs[2], impl))


library.impl("flash_attn_fwd", _forward_kernel, "CompositeExplicitAutograd")
library.impl("flash_attn_bwd", _backward_kernel, "CompositeExplicitAutograd")
library.impl("flash_attn_fwd_reference", _forward_reference, "CompositeExplicitAutograd")
library.impl("flash_attn_bwd_reference", _backward_reference, "CompositeExplicitAutograd")


# ---- autograd -----------------------------------------------------------------------------------


def _refuse_tangents(op: str, args: Sequence[Any]) -> None:
    """Forward-mode AD would otherwise see a constant: its tangents do not reach the kernels."""
    if forward_ad._current_level < 0:
        return
    for x in args:
        if isinstance(x, Tensor) and unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"orchard::{op}: forward-mode differentiation (jvp, jacfwd) is not implemented; "
                "use F.scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH)"
            )


def _needs_grad(args: Sequence[Any]) -> bool:
    if torch.is_grad_enabled():
        for x in args:
            if isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


class _Formula(torch.autograd.Function):
    """An autograd.Function called from an Autograd kernel.

    There torch.func's transforms have already been entered for the op itself; `Function.apply`
    would enter them a second time (and fail), so `record` calls what it wraps.
    """

    @classmethod
    def record(cls, *args: Any) -> Any:
        apply = super(torch.autograd.Function, cls).apply  # type: ignore[misc]
        if not torch._C._are_functorch_transforms_active():
            return apply(*args)
        with enable_single_level_autograd_function():
            return apply(*args)


class _FlashAttention(_Formula):
    """out, lse of flash_attn_fwd with flash_attn_bwd as the derivative.

    What cannot be a tensor comes as one tuple, since autograd spends time on every argument.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        *tensors, rest = args
        with torch._C._AutoDispatchBelowAutograd():
            return forward(*tensors, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, mask, alibi_slopes, sinks, seed, rest = inputs
        ctx.save_for_backward(query, key, value, *output, mask, alibi_slopes, sinks, seed)
        ctx.rest = rest
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, mask, alibi_slopes, sinks, seed = ctx.saved_tensors
        *scoring, impl = ctx.rest
        needed = ctx.needs_input_grad
        if needed[4]:
            raise NotImplementedError(
                "orchard::flash_attn: alibi_slopes has no gradient; detach it"
            )
        if dout is None and dlse is None:
            return (None,) * len(needed)
        dq, dk, dv, dmask, dsinks = differentiate(
            torch.zeros_like(out) if dout is None else dout, dlse, query, key, value, out, lse,
            mask, alibi_slopes, sinks, seed, *scoring, needed[3], impl,
        )  # fmt: skip
        return (
            dq if needed[0] else None,
            dk if needed[1] else None,
            dv if needed[2] else None,
            dmask if needed[3] else None,
            None,
            dsinks if needed[5] else None,
            None,
            None,
        )


class _FlashAttentionBackward(_Formula):
    """flash_attn_bwd, whose own derivative is refused: else torch returns wrong gradients."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return backward(*args)

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


def _forward_autograd(*args: Any) -> tuple[Tensor, Tensor]:
    args = _with_impl(args, 3 + _NUM_SCORING)
    _refuse_tangents("flash_attn_fwd", args)
    formula = _FlashAttention.record if _needs_grad(args) else _FlashAttention.forward
    return formula(*args[:_NUM_TENSORS], args[_NUM_TENSORS:])


def _backward_autograd(*args: Any) -> tuple[Tensor, ...]:
    args = _with_impl(args, 8 + _NUM_SCORING)
    _refuse_tangents("flash_attn_bwd", args)
    function = _FlashAttentionBackward
    return (function.record if _needs_grad(args) else function.forward)(*args)


library.impl("flash_attn_fwd", _forward_autograd, "Autograd")
library.impl("flash_attn_bwd", _backward_autograd, "Autograd")


# ---- the short way ------------------------------------------------------------------------------

# As _Formula.record, where no transform is active.
_record = super(torch.autograd.Function, _FlashAttention).apply
_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality  # of every device
_PLAIN = frozenset((Tensor, Parameter, type(None)))


def _nothing_between(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a call of an op would go straight to its autograd kernel above.

    That is so in eager PyTorch with plain tensors: no subclass, mode, transform, tracer, compiler
    or forward-mode level that has to see the op first, and not below autograd, as in the body of
    another operator, where the dispatcher passes over that kernel.
    """
    return (
        not torch.compiler.is_dynamo_compiling()
        and _PLAIN.issuperset(map(type, tensors))
        and forward_ad._current_level < 0
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_torch_function_mode_enabled()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and not torch._C._dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD)
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """`forward`; in the usual case without the dispatcher's way round to `_forward_autograd`."""
    tensors = (query, key, value, mask, alibi_slopes, sinks, seed)
    if not _nothing_between(tensors):
        return forward(*tensors, *rest)
    if _needs_grad(tensors):
        return _record(*tensors, rest)
    with torch._C._AutoDispatchBelowAutograd():
        return forward(*tensors, *rest)


def differentiate(*args: Any) -> tuple[Tensor, ...]:
    """`backward`, as `attend`."""
    if torch.is_grad_enabled() or not _nothing_between(args[:_NUM_BACKWARD_TENSORS]):
        return backward(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return backward(*args)
