"""The environment variables that change how attention runs, as far as they are set."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ..environment import gpu_cores, scratch_mb, switched_on
from .findings import FAULT, GOOD, NOTE, Finding

_SWITCHES = {
    "ORCHARD_DEBUG": "each call's path is printed",
    "ORCHARD_DEBUG_FLASHATN": "each call's path is printed",
    "ORCHARD_STRICT": "a call on mps that Metal cannot run is an error",
    "ORCHARD_DISABLE_METAL": "every call runs on the reference",
}
_VALUES = {
    "ORCHARD_BACKWARD_SCRATCH_MB": "MiB that a backward may take for speed",
    "ORCHARD_GPU_CORES": "cores that kernels are planned for instead of the GPU's",
    "ORCHARD_TILES": "another tile of the forward",
    "ORCHARD_NATIVE_LIBRARY": "the library that is loaded",
}
KNOWN = (*_SWITCHES, *_VALUES)
_OF_TORCH = "PYTORCH_MPS_FAST_MATH"
_OURS = "ORCHARD_"


def findings() -> Iterator[Finding]:
    """One for each variable that is set, and one if none is."""
    found = [name for name in os.environ if name.startswith(_OURS)]
    if os.environ.get(_OF_TORCH, "") not in ("", "0"):
        yield Finding(
            _OF_TORCH,
            FAULT,
            "set: shaders then compile without infinities, which masks need, and every call runs "
            "on the reference",
            f"unset {_OF_TORCH}",
        )
    elif not found:
        yield Finding("environment", GOOD, "no variable that changes attention is set")
    for name in sorted(found):
        yield _finding(name)


def _finding(name: str) -> Finding:
    value = os.environ[name]
    if name in _SWITCHES:
        problem = _problem(lambda: switched_on(name))
        if problem:
            return Finding(name, FAULT, problem, f"set {name} to 1 or 0")
        if not switched_on(name):
            return Finding(name, NOTE, "off")
        if name == "ORCHARD_DISABLE_METAL":
            return Finding(name, FAULT, _SWITCHES[name], f"unset {name}")
        return Finding(name, NOTE, f"on: {_SWITCHES[name]}")
    if name == "ORCHARD_BACKWARD_SCRATCH_MB":
        problem = _problem(scratch_mb)
        if problem:
            return Finding(name, FAULT, problem, f"set {name} to 256, or to 0 to do without")
    if name == "ORCHARD_GPU_CORES":
        problem = _problem(gpu_cores)
        if problem:
            return Finding(name, FAULT, problem, f"unset {name}")
    if name == "ORCHARD_NATIVE_LIBRARY":
        value = Path(value).name  # its folder is nobody's business in an issue
    if name in _VALUES:
        return Finding(name, NOTE, f"{value!r}: {_VALUES[name]}")
    near = difflib.get_close_matches(name, KNOWN, n=1)
    meant = f"; {near[0]} is" if near else ""
    return Finding(name, NOTE, f"no variable of orchard_ops{meant}")


def _problem(read: Callable[[], object]) -> str:
    try:
        read()
    except RuntimeError as error:
        return str(error).partition(": ")[2]
    return ""
