"""The environment variables that are switches or numbers, by the rules of
``native/environment.cpp``."""

from __future__ import annotations

import os

_ON = ("1", "true", "yes", "on")
_OFF = ("", "0", "false", "no", "off")


def switched_on(name: str) -> bool:
    """Whether a variable is on: 1, true, yes or on. Unset, empty, 0, false, no and off are off.

    Capitals and spaces around make no difference. The variable is read anew each time: programs
    change it as they run.

    Raises:
        RuntimeError: the variable is anything else.
    """
    value = os.environ.get(name)
    if not value:
        return False
    word = value.strip().lower()
    if word in _ON:
        return True
    if word in _OFF:
        return False
    raise RuntimeError(
        f"orchard::flash_attn: {name} must be 1, true, yes or on, or 0, false, no or off; "
        f"got '{value}'"
    )


def whole_number(name: str, least: int, wanted: str) -> int | None:
    """A variable as a number of decimal digits, spaces around left out; None if it is not set, or
    blank. It is read anew each time.

    Args:
        least: the least that it may be.
        wanted: what it must be, for the message.

    Raises:
        RuntimeError: the variable is anything else, less than `least`, or 2^40 or more.
    """
    value = os.environ.get(name, "")
    digits = value.strip()
    if not digits:
        return None
    if digits.isascii() and digits.isdecimal() and least <= int(digits) < 1 << 40:
        return int(digits)
    raise RuntimeError(f"orchard::flash_attn: {name} must be {wanted}; got '{value}'")


def scratch_mb() -> int | None:
    """ORCHARD_BACKWARD_SCRATCH_MB; None where the machine's default holds."""
    return whole_number(
        "ORCHARD_BACKWARD_SCRATCH_MB", 0, "a whole number of MiB, from 0 to below 2^40"
    )


def gpu_cores() -> int | None:
    """ORCHARD_GPU_CORES; None where the machine's number holds."""
    return whole_number("ORCHARD_GPU_CORES", 1, "a whole number, from 1 to below 2^40")
