"""Which path each call took, and why: counters, logs, and the one warning per reason.

`logging.getLogger("orchard_ops")` gets a record for each distinct call that the reference or, under
`sdpa`, PyTorch runs: a WARNING where an mps call fell back, DEBUG where the program asked for it or
the tensors are elsewhere. It has a NullHandler, so that a program without logging sees the Python
warning alone.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import native, watch
from .descriptions import Description, describe_sdpa
from .environment import switched_on

logger = logging.getLogger("orchard_ops")
logger.addHandler(logging.NullHandler())

_functorch = torch._C._functorch
_lock = threading.Lock()
_reference: Counter[tuple[str, str]] = Counter()
_left_to_pytorch: Counter[str] = Counter()
_warned: set[str] = set()
_logged: set[tuple[str, str, Description]] = set()
_MOST_LOGGED = 1000
"""Distinct calls that are logged: a program whose lengths never repeat must not fill the memory."""
_metal_before_reset = dict.fromkeys(native.COUNTED, 0)
_ALWAYS_SAID = ("flash_attn_fwd", "flash_attn_bwd")
"""The ops whose counter `stats` has even at 0."""

_OURS = (
    f"{Path(__file__).parent}/",
    f"{Path(torch.__file__).parent}/",
    "<",  # torch.fx's generated code and Python's import machinery
)
_COMPILED = "torchinductor"  # in the names of files that torch.compile writes


class OrchardFallbackWarning(UserWarning):
    """Warns that an mps call ran on the reference kernels, once for each reason in a process."""


@dataclass(frozen=True)
class Stats:
    """Calls since import or the last `reset_stats`, by op name."""

    metal: dict[str, int] = field(default_factory=dict)
    """Calls that ran as Metal kernels."""
    reference: dict[str, dict[str, int]] = field(default_factory=dict)
    """Calls that ran on the reference: reason -> op -> count."""

    left_to_pytorch: dict[str, int] = field(default_factory=dict)
    """Calls of F.scaled_dot_product_attention under `sdpa` that PyTorch's own path took: reason ->
    count. One that compiled code holds counts when it is traced."""

    @property
    def fallbacks(self) -> int:
        """Calls on mps tensors that did not run as Metal kernels."""
        return sum(
            count
            for reason, ops in self.reference.items()
            if not reason.startswith(NOT_MPS)
            for count in ops.values()
        )


NOT_MPS = "the tensors are on "


def debug_enabled() -> bool:
    """ORCHARD_DEBUG=1, or the older name ORCHARD_DEBUG_FLASHATN=1."""
    return switched_on("ORCHARD_DEBUG") or switched_on("ORCHARD_DEBUG_FLASHATN")


def looks_at_numbers(*numbers: Tensor | int | None) -> bool:
    """Whether ORCHARD_DEBUG asks to look at the numbers of the sequences, and there are some: what
    a compiler traces has none yet, and under torch.vmap a tensor has those of all samples."""
    if not debug_enabled() or torch.compiler.is_compiling():
        return False
    given = tuple(x for x in numbers if isinstance(x, Tensor))
    return not watch.traced(given) and not any(map(_is_mapped, given))


def _is_mapped(x: Tensor) -> bool:
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return False


def strict() -> bool:
    """ORCHARD_STRICT=1: a call on mps that Metal cannot run raises instead of falling back."""
    return switched_on("ORCHARD_STRICT")


def insists_on_metal(device_type: str, impl: str) -> bool:
    """Whether a call that Metal cannot run raises instead of falling back."""
    return impl == "metal" or (device_type == "mps" and impl == "auto" and strict())


def _users_level() -> int:
    """The stacklevel at which this function's caller warns about the user's line.

    A backward may run on a thread of torch, which has no line of the user's; then the outermost
    frame is taken.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_OURS) and _COMPILED not in name:
            break
        level, frame = level + 1, frame.f_back
    return level


def _is_new(op: str, reason: str, call: Description) -> bool:
    """Whether a call is to be logged. The caller holds the lock."""
    if (op, reason, call) in _logged or len(_logged) >= _MOST_LOGGED:
        return False
    _logged.add((op, reason, call))
    return True


def record_reference(op: str, reason: str, call: Description, impl: str) -> None:
    """Counts a call that will run on the reference. Raises if the caller insisted on Metal."""
    if insists_on_metal(call.device, impl):
        raise RuntimeError(f"orchard::{op}: the Metal kernels cannot run this call: {reason}")
    if debug_enabled():
        print(f"[orchard] {op}: reference ({reason})", file=sys.stderr)
    unasked = call.device == "mps" and impl == "auto"
    if unasked and reason not in _warned:
        warnings.warn(
            f"orchard::{op} runs on the reference kernels: {reason}. Results are the same, slower. "
            "orchard_ops.explain(...) shows the path of a call, orchard_ops.report() that of every "
            "call; ORCHARD_STRICT=1 turns this into an error.",
            OrchardFallbackWarning,
            stacklevel=_users_level(),
        )
    with _lock:  # only now: a filter may have turned the warning into an error
        _reference[op, reason] += 1
        if unasked:
            _warned.add(reason)
        new = _is_new(op, reason, call)
    watch.note_reference(reason)
    if new:
        level = logging.WARNING if unasked else logging.DEBUG
        logger.log(level, "orchard::%s runs on the reference: %s; %s", op, reason, call)


def record_left_to_pytorch(reason: str, arguments: tuple[Any, ...], warn: bool = False) -> None:
    """Counts a call of F.scaled_dot_product_attention that PyTorch's own path takes.

    Args:
        reason: why.
        arguments: those of the operator, all of them in its order.
        warn: whether the program did not ask for it.
    """
    op = "scaled_dot_product_attention"
    if debug_enabled():
        print(f"[orchard] {op}: PyTorch's own path ({reason})", file=sys.stderr)
    if warn and reason not in _warned:
        warnings.warn(
            f"{op} runs on PyTorch's own path: {reason}. Results are as without orchard_ops; "
            "ORCHARD_STRICT=1 turns this into an error.",
            OrchardFallbackWarning,
            stacklevel=_users_level(),
        )
    call = describe_sdpa(*arguments)
    with _lock:
        _left_to_pytorch[reason] += 1
        if warn:
            _warned.add(reason)
        new = _is_new(op, reason, call)
    watch.tell(op, arguments, reason)
    if new:
        level = logging.WARNING if warn else logging.DEBUG
        logger.log(level, "%s runs on PyTorch's own path: %s; %s", op, reason, call)


def stats() -> Stats:
    """Calls of this process by path and reason, see `Stats`."""
    metal = native.metal_calls()
    with _lock:
        counts = {op: n - _metal_before_reset[op] for op, n in metal.items()}
        reference: dict[str, dict[str, int]] = {}
        for (op, reason), count in _reference.items():
            reference.setdefault(reason, {})[op] = count
        return Stats(
            {op: n for op, n in counts.items() if n or op in _ALWAYS_SAID},
            reference,
            dict(_left_to_pytorch),
        )


def reset_stats() -> None:
    """Sets every counter to 0; each fallback reason warns and each call is logged again."""
    metal = native.metal_calls()
    with _lock:
        _reference.clear()
        _left_to_pytorch.clear()
        _warned.clear()
        _logged.clear()
        _metal_before_reset.update(metal)


# ---- exceptions on their way through the native library -----------------------------------------

_pending = threading.local()


@contextmanager
def kept_pending() -> Iterator[None]:
    """Remembers the exception that leaves the block, of which the native library makes a
    RuntimeError."""
    try:
        yield
    except BaseException as error:
        _pending.exception = error
        raise


def take_pending(message: str) -> BaseException | None:
    """The exception of this thread's last block under `kept_pending`, if `message` is about it."""
    exception = getattr(_pending, "exception", None)
    _pending.exception = None
    if exception is None or type(exception).__name__ not in message:
        return None
    return exception
