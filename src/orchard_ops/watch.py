"""Who watches the ops: `report` sees each call that runs, on any thread, and its path.

Calls of F.scaled_dot_product_attention that are left to PyTorch are told, too.

While nobody watches, a call costs one look at an empty tuple.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Watcher = Callable[[str, tuple[Any, ...], "str | None"], None]
"""It takes an op's name, the flat arguments, and why Metal did not run them, or None."""

watchers: tuple[Watcher, ...] = ()
_lock = threading.Lock()


@dataclass
class _Frame:
    """One call of an op's handle under way on a thread."""

    reference: str | None = None
    counted: bool = False
    """Whether a call inside of this one is what really ran, or nothing ran."""


class _Thread(threading.local):
    frame: _Frame | None = None
    asked: Callable[[str, tuple[Any, ...], dict[str, Any]], Any] | None = None
    """Answers in place of the ops, see `answering`."""


_thread = _Thread()


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Tells `watcher` of each call on every thread while the block runs."""
    global watchers
    with _lock:
        watchers = (*watchers, watcher)
    try:
        yield
    finally:
        with _lock:
            last = len(watchers) - 1 - watchers[::-1].index(watcher)
        watchers = watchers[:last] + watchers[last + 1 :]


@contextmanager
def answering(answer: Callable[[str, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
    """On this thread, while the block runs, `answer` gets the calls of the ops, and none runs."""
    outer, _thread.asked = _thread.asked, answer
    try:
        with watching(_ignore):  # so that the handles of the ops come here
            yield
    finally:
        _thread.asked = outer


def _ignore(name: str, args: tuple[Any, ...], reason: str | None) -> None:
    """Of calls on other threads."""


def note_reference(reason: str) -> None:
    """Called by the reference kernels, inside the call of the op that they serve."""
    if _thread.frame is not None:
        _thread.frame.reference = reason


def traced(args: tuple[Any, ...]) -> bool:
    """Whether nothing is computed: the operands stand for others, as a compiler's do, or are on
    meta."""
    return any(
        isinstance(x, Tensor)
        and (
            isinstance(x, (FakeTensor, FunctionalTensor))
            or x.device.type == "meta"
            or torch._is_functional_tensor(x)
            or is_traceable_wrapper_subclass(x)
        )
        for x in args
    )


def call(name: str, op: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls the op and tells the watchers when it has run.

    On its way through autograd, transforms and modes a call passes the op's handle more than once.
    The innermost passage is the one that is told.
    """
    if _thread.asked is not None:
        return _thread.asked(name, args, kwargs)
    outer, frame = _thread.frame, _Frame()
    _thread.frame = frame
    try:
        result = op(*args, **kwargs)
    finally:
        _thread.frame = outer
    if outer is not None:
        outer.counted = True
    if frame.counted or traced(args):
        return result
    tell(name, args, frame.reference)
    return result


def tell(name: str, args: tuple[Any, ...], reason: str | None) -> None:
    """Tells the watchers of a call that has run."""
    if watchers:
        with torch._C._DisableTorchDispatch():  # what a watcher asks is not the program's
            for watcher in watchers:
                watcher(name, args, reason)
