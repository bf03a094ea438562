"""The kernels of ``aten::scaled_dot_product_attention``, and which calls they leave to PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from .. import attention as op
from .. import calls, native, plan
from ..arguments import prepare
from ..environment import switched_on
from ..ops import eager
from . import double_backward

NAME = "scaled_dot_product_attention"
OPERATOR = torch.ops.aten.scaled_dot_product_attention.default

_functorch = torch._C._functorch
_WIDEST = plan.WIDEST_HEAD_DIM
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_TRACED = (FakeTensor, FunctionalTensor)
"""The subclasses in which a compiler sees plain tensors."""

on = False
"""Whether the kernels below take calls. They stay registered for a while where they do not."""

_Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None, float, bool, float | None, bool]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel for tensors of mps, in torch.func too, where it sees those of other devices."""
    arguments = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if query.device.type != "mps" or not on:
        return _pytorch(arguments)
    if not _is_plain(query, key, value, attn_mask, is_causal):
        reason = why_left_to_pytorch(query, key, value, attn_mask, is_causal)
        if reason is not None:
            calls.record_left_to_pytorch(reason, arguments)
            return _pytorch(arguments)
    reason = why_not_metal(query, value)
    if reason is not None and not calls.strict():
        return _pytorch_instead(arguments, reason)
    if (
        attn_mask is None
        and op.usual_numbers(dropout_p, scale)
        and op.is_usual(query, key, value, enable_gqa)
    ):  # in less time, what the rest of this function would do
        return op.attend_usual(
            query, key, value, dropout_p, is_causal, scale, record=double_backward.record
        )[0]
    try:
        call = prepare(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    except (TypeError, ValueError, NotImplementedError):
        if calls.strict():
            raise
        return _pytorch_instead(arguments, "flash_attn does not take such arguments")
    return op.run(call, record=double_backward.record)


def attention_under_vmap(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel for calls inside of torch.vmap, on any device.

    PyTorch would take the operator apart there before the other kernels see it.
    """
    arguments = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if query.device.type != "mps" or not on:
        return _pytorch(arguments)
    if dropout_p > 0.0 and _vmap_randomness() != "different":
        reason = "vmap asks for one dropout mask for all samples"
        calls.record_left_to_pytorch(reason, arguments)
        return _pytorch(arguments)
    return attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _pytorch(arguments: _Arguments) -> Tensor:
    """PyTorch's own kernel, past the dispatcher."""
    *leading, scale, enable_gqa = arguments
    return OPERATOR.decompose(*leading, scale=scale, enable_gqa=enable_gqa)


def _pytorch_instead(arguments: _Arguments, reason: str) -> Tensor:
    """PyTorch's own kernel for a call that was meant to be ours. It may refuse the call too, in its
    own words."""
    out = _pytorch(arguments)
    calls.record_left_to_pytorch(reason, arguments, warn=True)
    return out


# ---- which calls are PyTorch's ------------------------------------------------------------------


def _is_plain(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool
) -> bool:
    """True only where `why_left_to_pytorch` would find no reason, in less time."""
    return (
        torch._C._get_flash_sdp_enabled()
        and (key.is_mps and value.is_mps)
        and (attn_mask is None or (attn_mask.is_mps and not is_causal))
        and eager.nothing_between((query, key, value, attn_mask))
    )


def why_left_to_pytorch(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool
) -> str | None:
    """The reason why a call is none for `flash_attn`, if there is one.

    The reasons are the program's own wishes, so that nobody is warned of them.
    """
    if not torch._C._get_flash_sdp_enabled():
        return (
            "sdpa_kernel or torch.backends.cuda.enable_flash_sdp does not allow "
            "SDPBackend.FLASH_ATTENTION"
        )
    tensors = [x for x in (query, key, value, attn_mask) if x is not None]
    if any(x.device.type != "mps" for x in tensors):
        return "the tensors are not all on mps"
    if any(x.is_nested or x.layout != torch.strided for x in tensors):
        return "a tensor is nested or sparse"
    if any(_has_own_dispatch(x) for x in tensors):
        return "a tensor is of a subclass that sees PyTorch's operators"
    if attn_mask is not None and is_causal:
        return "attn_mask and is_causal are given together"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if _differentiated_twice(tensors):
        return "nested transforms of torch.func may differentiate twice"
    return None


def why_not_metal(query: Tensor, value: Tensor) -> str | None:
    """The reason why no Metal kernel takes such a call, if there is one.

    `flash_attn` would run it on the reference, which is made to agree and not to be fast.
    """
    if native.why_not() is not None:
        return native.why_not()
    if switched_on("ORCHARD_DISABLE_METAL"):
        return "ORCHARD_DISABLE_METAL is set"
    if query.dtype not in _DTYPES:
        return "the dtype is not float16, bfloat16 or float32"
    if query.shape[-1] > _WIDEST or value.shape[-1] > _WIDEST:
        return f"head_dim is above {_WIDEST}"
    return None


def _has_own_dispatch(x: Tensor) -> bool:
    kind = type(x)
    return (
        kind not in eager.PLAIN
        and not isinstance(x, _TRACED)
        and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
    )


def _differentiated_twice(tensors: list[Tensor]) -> bool:
    """Whether more than one level of torch.func, with plain autograd as one, wants gradients.

    A gradient of torch.func can always be differentiated again, so that only these levels tell
    whether somebody may.
    """
    if not torch._C._are_functorch_transforms_active():
        return False
    levels = set()
    for x in tensors:
        while _functorch.is_functorch_wrapped_tensor(x):
            if _functorch.is_gradtrackingtensor(x) and x.requires_grad:
                levels.add(_functorch.maybe_get_level(x))
            x = _functorch.get_unwrapped(x)
        if x.requires_grad:
            levels.add(0)
    return len(levels) > 1


def _vmap_randomness() -> str:
    """The `randomness` of the innermost torch.vmap, in whose call this is."""
    from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_current_functorch_interpreter

    interpreter = retrieve_current_functorch_interpreter()
    return interpreter.randomness() if isinstance(interpreter, VmapInterpreter) else "error"
