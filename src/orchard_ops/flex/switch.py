"""PyTorch's own `flex_attention` on mps through ours, for as long as somebody asks for it.

Programs import the function by its name, so that the function object itself has to answer: it gets
another code object. A call that runs keeps the one it began with. torch.compile compares the code
objects of functions that it has traced, so that compiled code follows the switch too.
"""

from __future__ import annotations

import inspect
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import flex_attention as pytorch

from . import attention

_lock = threading.RLock()
_holders = 0
_TAKEN_OVER = pytorch.flex_attention
_ENTRANCE = "_orchard_flex_attention"
"""The name under which PyTorch's module finds `_answer`."""


def _copy(function: Any) -> Callable[..., Any]:
    """The function as it is now, whatever becomes of its code."""
    copy = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_original = _copy(_TAKEN_OVER)
_original_code = _TAKEN_OVER.__code__


def _answer(query: Any, *args: Any, **kwargs: Any) -> Any:
    """What PyTorch's function calls while it is taken over."""
    if isinstance(query, torch.Tensor) and query.device.type == "mps":
        return attention.flex_attention(query, *args, **kwargs)
    return _original(query, *args, **kwargs)


def _entrance(
    query,
    key,
    value,
    score_mod=None,
    block_mask=None,
    scale=None,
    enable_gqa=False,
    return_lse=False,
    kernel_options=None,
    *,
    return_aux=None,
):  # type: ignore[no-untyped-def]
    """Its code is that of PyTorch's function while that is taken over: it runs among the globals of
    PyTorch's module."""
    return _orchard_flex_attention(  # type: ignore[name-defined] # noqa: F821
        query,
        key,
        value,
        score_mod,
        block_mask,
        scale,
        enable_gqa,
        return_lse,
        kernel_options,
        return_aux=return_aux,
    )


def _begin() -> None:
    ours, theirs = (
        [(p.name, p.kind) for p in inspect.signature(f).parameters.values()]
        for f in (_entrance, _original)
    )
    if ours != theirs:
        raise NotImplementedError(
            "orchard_ops.flex: flex_attention of this PyTorch has other arguments than those that "
            f"are taken over; got {', '.join(name for name, _ in theirs)}: call "
            "orchard_ops.flex_attention"
        )
    setattr(pytorch, _ENTRANCE, _answer)
    _TAKEN_OVER.__code__ = _entrance.__code__  # type: ignore[attr-defined]


def hold() -> None:
    global _holders
    with _lock:
        if _holders == 0:
            _begin()
        _holders += 1


def release() -> None:
    global _holders
    with _lock:
        _holders -= 1
        if _holders == 0:
            # A call of another thread may be about to look _ENTRANCE up, so that the name stays.
            _TAKEN_OVER.__code__ = _original_code  # type: ignore[attr-defined]


def active() -> bool:
    """Whether PyTorch's flex_attention on mps is taken over now."""
    return _holders > 0


@contextmanager
def flex() -> Iterator[None]:
    """Within the block, PyTorch's flex_attention on mps runs as `orchard_ops.flex_attention`.

    By any name, imported before or after, training too, in eager code and under torch.compile:
    what was compiled outside of the block is compiled again inside, and found again after it. Other
    devices are not affected.

    Blocks nest, and an exception ends them like a return. The takeover holds for all threads of the
    process until the last block is left, and `disable` called if `enable` was. The backward belongs
    into the block too where activations are checkpointed.
    """
    hold()
    try:
        yield
    finally:
        release()
