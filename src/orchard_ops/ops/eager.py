"""Where a call may take the short way: straight to the autograd formula, past the dispatcher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality  # for every device
PLAIN = frozenset((Tensor, Parameter, type(None)))
"""The types of operands, None included, that are no subclass which must see the op."""


def nothing_between(tensors: tuple[Any, ...]) -> bool:
    """Whether a call of an op would go straight to its autograd kernel.

    That is so in eager PyTorch with plain tensors: no subclass, mode, transform, tracer, compiler
    or forward-mode level that has to see the op first, and not below autograd, as in the body of
    another operator, where the dispatcher passes over that kernel.
    """
    return (
        not torch.compiler.is_dynamo_compiling()
        and PLAIN.issuperset(map(type, tensors))
        and forward_ad._current_level < 0
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_torch_function_mode_enabled()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and not torch._C._dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD)
    )
