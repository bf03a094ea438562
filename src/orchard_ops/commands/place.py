"""The device that a command runs on, and what it really is."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Place:
    """A device and what it really is."""

    device: torch.device
    kind: str
    """"apple_gpu", "simulated" or "cpu"."""
    description: str
    """A description for the reader, with what the run's figures do not say."""


def find_place(requested: str) -> Place:
    """The place for --device auto, mps or cpu.

    Raises:
        ValueError: mps was asked for and there is none.
    """
    available = torch.backends.mps.is_available()
    if requested == "mps" and not available:
        raise ValueError(
            'there is no "mps" device here: it needs macOS on Apple silicon and a torch built with '
            "MPS (torch.backends.mps.is_available() is False); --device cpu runs the reference"
        )
    if requested == "cpu" or not available:
        why = "as asked for" if requested == "cpu" else "there is no Apple GPU here"
        return Place(
            torch.device("cpu"),
            "cpu",
            f"reference on the CPU ({why}): no Metal kernel runs, so this checks the "
            "reference's mathematics only",
        )
    if sys.platform != "darwin":  # only a simulation offers mps on another system
        return Place(
            torch.device("mps"),
            "simulated",
            "simulated mps device (every GPU thread executed on the CPU: its tokens/s says "
            "nothing about a Mac)",
        )
    return Place(torch.device("mps"), "apple_gpu", f"Apple GPU {torch.backends.mps.get_name()}")
