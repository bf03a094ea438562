"""What `doctor` finds, look by look."""

from __future__ import annotations

from dataclasses import dataclass

GOOD, FAULT, NOTE = "ok", "FAULT", "note"


@dataclass(frozen=True)
class Finding:
    """What one look found."""

    name: str
    state: str
    """`GOOD`, `FAULT`, or `NOTE`: it is no fault, and somebody may want to know."""
    found: str
    remedy: str = ""
