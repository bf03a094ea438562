"""Who has asked for the takeover, and its registration while somebody has.

It is a matter of the process and not of a thread: the recomputation of activation checkpointing
runs on a thread of the autograd engine and must take the same attention as the forward did.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch.library import Library

from .._version import __version__
from ..flex import switch as flex_switch
from ..namespace import NAME
from . import kernels

_lock = threading.Lock()
_holders = 0
_enabled = False
_registration: Library | None = None
_WAITING_PACKAGES = sys.stdlib_module_names | {"execnet", "ipykernel", "tornado", "zmq"}
_WAITING_MODULES = {"torch._inductor.compile_worker.subproc_pool"}
_WAITS = {
    "_read_thread", "_recv", "_recv_msg", "_worker", "accept", "poll", "read", "recv", "select",
    "wait",
}  # fmt: skip
_TAG = f"{NAME}-{__version__}-sdpa"


def _begin() -> None:
    global _registration
    # It loads torch._dynamo, which takes about as long as torch. Ctrl-C meanwhile changes nothing.
    from . import causal_bias

    if _registration is None:
        _registration = _register()
        _forget_resolved_kernels()
    kernels.on = True
    # torch.compile's caches on disk go by the model's graph, in which nothing tells the takeover.
    config = torch.compiler.config
    config.cache_key_tag += _TAG
    causal_bias.begin()


def _register() -> Library:
    library = Library("aten", "IMPL")
    with warnings.catch_warnings():
        # The dispatcher remarks that torch.vmap's own entry is replaced.
        warnings.filterwarnings("ignore", message=".*[Oo]verrid.*", category=UserWarning)
        # With AutogradMPS alone inference_mode would pass by, and with MPS alone torch.compile
        # would lose the gradients. Within torch.func.grad the tensors of mps have AutogradOther.
        for key in ("AutogradMPS", "MPS", "AutogradOther"):
            library.impl(kernels.NAME, kernels.attention, key)
        library.impl(kernels.NAME, kernels.attention_under_vmap, "FuncTorchVmapMode")
    return library


def _end() -> None:
    global _registration
    from . import causal_bias

    causal_bias.end()
    kernels.on = False
    config = torch.compiler.config
    config.cache_key_tag = config.cache_key_tag.replace(_TAG, "", 1)
    # The dispatcher frees a kernel whose registration ends, also one that another thread is about
    # to call. So our kernels stay while one may be, and pass its calls to PyTorch's own.
    if not _another_thread_may_call():
        _registration = None  # which ends the registration
        _forget_resolved_kernels()


def _another_thread_may_call() -> bool:
    """Whether another thread may be in the dispatcher, where it does not hold Python's lock. One
    whose innermost function is such that waits for something else is not."""
    if torch.compiler.is_compiling():  # nothing below can be traced
        return True
    own = threading.get_ident()
    return any(
        not _waits(frame) for thread, frame in sys._current_frames().items() if thread != own
    )


def _waits(frame: FrameType) -> bool:
    module = frame.f_globals.get("__name__", "")
    known = module.partition(".")[0] in _WAITING_PACKAGES or module in _WAITING_MODULES
    return known and frame.f_code.co_name in _WAITS


def _forget_resolved_kernels() -> None:
    """torch.compile remembers which kernel of an operator serves a dispatch key."""
    kernels.OPERATOR._dispatch_cache.clear()


def _hold() -> None:
    global _holders
    with _lock:
        if _holders == 0:
            _begin()
        _holders += 1


def _release() -> None:
    global _holders
    with _lock:
        _holders -= 1
        if _holders == 0:
            _end()


def active() -> bool:
    """Whether F.scaled_dot_product_attention on mps is taken over now."""
    return _holders > 0


@contextmanager
def sdpa() -> Iterator[None]:
    """Within the block, F.scaled_dot_product_attention on mps runs as `flash_attn`.

    Every way to the operator is meant: F.scaled_dot_product_attention by any name, imported before
    or after, nn.MultiheadAttention, nn.Transformer, torch.ops.aten, and code that torch.compile
    compiles within the block. Other devices are not affected. What PyTorch does and `flash_attn`
    does not goes to PyTorch's own path as if there were no block; docs/sdpa.md lists it.

    Blocks nest, and an exception ends them like a return. The takeover holds for all threads of
    the process until the last block is left, and `disable` called if `enable` was. The backward
    belongs into the block too, where activations are checkpointed.
    """
    _hold()
    try:
        yield
    finally:
        _release()


def enable() -> None:
    """PyTorch's attention on mps runs on this package until `disable`.

    F.scaled_dot_product_attention as `flash_attn`, see `sdpa`, and FlexAttention as
    `orchard_ops.flex_attention`, see `flex`. A second call changes nothing.
    """
    global _enabled
    with _lock:
        if _enabled:
            return
        _enabled = True
    try:
        _hold()
    except BaseException:  # Ctrl-C: the next call begins anew
        _enabled = False
        raise
    flex_switch.hold()


def disable() -> None:
    """Undoes `enable`. Blocks of `sdpa` and `flex` that have not ended keep their takeover until
    they do."""
    global _enabled
    with _lock:
        if not _enabled:
            return
        _enabled = False
    _release()
    flex_switch.release()


# ---- PyTorch's own switch -----------------------------------------------------------------------


class _Handle:
    """What `torch.nn.attention.restore_flash_attention_impl` ends. torch 2.10 has no such function,
    and so nothing ends it there."""

    def __init__(self) -> None:
        self._held = True
        _hold()

    def remove(self) -> None:
        if self._held:
            self._held = False
            _release()


def register_with_pytorch() -> bool:
    """Makes `activate_flash_attention_impl("orchard")` known, where this torch has it.

    The name is that of the ops' namespace, so that a copy of the package has its own.
    """
    register = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if register is None:
        return False
    register(NAME, register_fn=_Handle)
    return True
