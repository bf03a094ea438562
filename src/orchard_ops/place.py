"""Where the model under test runs, said plainly."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Place:
    """A device and what it really is."""

    device: torch.device
    kind: str
    """"apple_gpu", "simulated" or "cpu"."""
    description: str
    """For the reader, with what the run's figures do not say."""


def find_place(requested: str) -> Place:
    """The place for --device auto, mps or cpu.

    Raises:
        ValueError: mps was asked for and there is none.
    """
    available = torch.backends.mps.is_available()
    if requested == "mps" and not available:
        raise ValueError(
            'there is no "mps" device here: it needs macOS on Apple silicon and a torch built with '
            "MPS (torch.backends.mps.is_available() is False)"
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


def sysctl(name: str) -> str:
    """A value of macOS, or "" if it has none of this name."""
    done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def chip() -> str:
    """As the maker calls it: "Apple M2 Pro", or the model of the CPU."""
    if sys.platform == "darwin":
        return sysctl("machdep.cpu.brand_string") or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def system() -> str:
    """ "macOS 15.5"; elsewhere the name alone, as a kernel's release names a host."""
    return f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.system()


def environment(place: Place) -> dict[str, str | int]:
    """What a reader needs to compare this run with another one."""
    import orchard_ops

    return {
        "orchard_ops": orchard_ops.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": system(),
        "machine": platform.machine(),
        "cpu": chip(),
        "cpu_threads": torch.get_num_threads(),
        "device": str(place.device),
        "kind": place.kind,
        "description": place.description,
    }
