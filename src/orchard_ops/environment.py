"""The environment variables that are on or off, by the rule of ``native/environment.cpp``."""

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
