"""Which path each call took, and why: counters, the debug log, and the one warning per reason."""

from __future__ import annotations

import sys
import threading
import warnings
from collections import Counter
from dataclasses import dataclass, field

from . import _native
from .environment import switched_on

_lock = threading.Lock()
_reference: Counter[tuple[str, str]] = Counter()
_warned: set[str] = set()
_metal_before_reset = {"flash_attn_fwd": 0, "flash_attn_bwd": 0}


class OrchardFallbackWarning(UserWarning):
    """An mps call ran on the reference kernels. Raised once per reason and process."""


@dataclass(frozen=True)
class Stats:
    """Calls since import or the last `reset_stats`, by op name."""

    metal: dict[str, int] = field(default_factory=dict)
    """Calls that ran as Metal kernels."""
    reference: dict[str, dict[str, int]] = field(default_factory=dict)
    """Calls that ran on the reference: reason -> op -> count."""

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


def strict() -> bool:
    """ORCHARD_STRICT=1: a call on mps that Metal cannot run raises instead of falling back."""
    return switched_on("ORCHARD_STRICT")


def record_reference(op: str, reason: str, device_type: str, impl: str) -> None:
    """Counts a call about to run on the reference; raises where the caller insisted on Metal."""
    on_mps = device_type == "mps"
    if impl == "metal" or (on_mps and impl == "auto" and strict()):
        raise RuntimeError(f"orchard::{op}: the Metal kernels cannot run this call: {reason}")
    if debug_enabled():
        print(f"[orchard] {op}: reference ({reason})", file=sys.stderr)
    unasked = on_mps and impl == "auto"
    if unasked and reason not in _warned:
        warnings.warn(
            f"orchard::{op} runs on the reference kernels: {reason}. Results are the same, slower. "
            "orchard_ops.explain(...) shows the path of a call, orchard_ops.stats() counts them; "
            "ORCHARD_STRICT=1 turns this into an error.",
            OrchardFallbackWarning,
            stacklevel=2,
        )
    with _lock:  # after the warning, which a filter may have turned into an error
        _reference[op, reason] += 1
        if unasked:
            _warned.add(reason)


def stats() -> Stats:
    """Calls of this process by path and reason, see `Stats`."""
    metal = _native.metal_calls()
    with _lock:
        reference: dict[str, dict[str, int]] = {}
        for (op, reason), count in _reference.items():
            reference.setdefault(reason, {})[op] = count
        return Stats({op: n - _metal_before_reset[op] for op, n in metal.items()}, reference)


def reset_stats() -> None:
    """Sets every counter to 0 and lets each fallback reason warn again."""
    metal = _native.metal_calls()
    with _lock:
        _reference.clear()
        _warned.clear()
        _metal_before_reset.update(metal)
