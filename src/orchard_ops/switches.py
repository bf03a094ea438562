"""Environment variables that switch something on or off; ``native/`` reads them alike."""

from __future__ import annotations

import os

_OFF = ("", "0", "false", "no", "off")
_ON = ("1", "true", "yes", "on")


def is_on(name: str) -> bool:
    """Whether the variable switches on.

    Raises:
        ValueError: it holds none of 1, true, yes, on, 0, false, no and off.
    """
    text = os.environ.get(name, "")
    word = text.strip().lower()
    if word in _OFF:
        return False
    if word in _ON:
        return True
    raise ValueError(
        f"orchard::flash_attn: {name} must be 1, true, yes or on, or 0, false, no or off; "
        f"got {text!r}"
    )


def debug() -> bool:
    """ORCHARD_DEBUG=1, or the older name ORCHARD_DEBUG_FLASHATN=1: every call says its path."""
    return is_on("ORCHARD_DEBUG") or is_on("ORCHARD_DEBUG_FLASHATN")


def strict() -> bool:
    """ORCHARD_STRICT=1: a call on mps that Metal cannot run raises instead of falling back."""
    return is_on("ORCHARD_STRICT")


def metal_disabled() -> bool:
    """ORCHARD_DISABLE_METAL=1: the reference runs everything."""
    return is_on("ORCHARD_DISABLE_METAL")
