"""Where a call may take the short way: straight to the autograd formula, past the dispatcher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality  # for every device
TENSORS = frozenset((Tensor, Parameter))
"""The types of tensors that are no subclass which must see the op."""
PLAIN = TENSORS | {type(None)}
"""The same, and that of an operand which is not given."""

# Each look-up of an attribute takes as long as what is asked then.
_is_compiling = torch.compiler.is_dynamo_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_has_function_mode = torch._C._is_torch_function_mode_enabled
_has_transform = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded


def nothing_between(tensors: tuple[Any, ...]) -> bool:
    """Whether a call of an op would go straight to its autograd kernel.

    That is so in eager PyTorch with plain tensors: no subclass, mode, transform, tracer, compiler
    or forward-mode level that has to see the op first, and not below autograd, as in the body of
    another operator, where the dispatcher passes over that kernel.
    """
    return no_layer_between() and PLAIN.issuperset(map(type, tensors))


def no_layer_between() -> bool:
    """As `nothing_between`, for operands that are known to be plain."""
    return (
        not _is_compiling()
        and forward_ad._current_level < 0
        and not _dispatch_modes()
        and not _has_function_mode()
        and not _has_transform()
        and _tracing_state() is None
        and not _is_excluded(_AUTOGRAD)
    )
