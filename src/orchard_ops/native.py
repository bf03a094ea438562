"""The native library (Metal kernels): found and loaded once at import, or the reason why not."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from . import gpu
from .namespace import INSTALLED, NAME, OPS

_LIBRARY_NAME = "liborchard_ops.dylib" if sys.platform == "darwin" else "liborchard_ops.so"
_INTERFACE = "orchard_library_interface"
COUNTED = (
    "flash_attn_fwd",
    "flash_attn_bwd",
    "flash_attn_decode",
    "flex_attn_fwd",
    "flex_attn_bwd",
)
"""The ops whose calls the library counts, in its order."""
_why_not: str | None = "the native library has not been looked for"


def is_overridden() -> bool:
    """Whether ORCHARD_NATIVE_LIBRARY names another library than the package's."""
    return bool(os.environ.get("ORCHARD_NATIVE_LIBRARY"))


def is_expected() -> bool:
    """Whether this installation should have a library: a Mac's, or one that is told of one."""
    return sys.platform == "darwin" or "ORCHARD_NATIVE_LIBRARY" in os.environ


def _library_path() -> Path:
    """The path in ORCHARD_NATIVE_LIBRARY (for development builds), or the file inside the
    package."""
    override = os.environ.get("ORCHARD_NATIVE_LIBRARY") if INSTALLED else None
    return Path(override) if override else Path(__file__).parent / _LIBRARY_NAME


def _difference(theirs: str, ours: str) -> str:
    """The first difference of two interfaces, in words for a message."""
    common = next((n for n, (x, y) in enumerate(zip(theirs, ours)) if x != y), 0)
    start = ours.rfind(",", 0, common) + 1
    there, here = (text[start : start + 40].strip() for text in (theirs, ours))
    return f"the library has '{there} ...', the package '{here} ...'"


def _open(path: Path, interface: str) -> str | None:
    """Loads the library and has it register its ops. Returns None, or the reason why it could not.

    Loading registers nothing, so a library for another version of this package is recognised before
    PyTorch knows of it. Libraries of old versions register their ops as soon as they are loaded.
    They are recognised by their file, in which the name of the interface function does not occur.
    """
    stranger = (
        f"{path.name} is not a native library of orchard_ops, or one of another version; "
        "reinstall it"
    )
    try:
        # A Mac's library lists its exports as a prefix tree, which may hold the "orchard_" that
        # they share apart from the rest of each name. So the search is for the rest.
        if _INTERFACE.removeprefix("orchard_").encode() not in path.read_bytes():
            return stranger
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the native library {path.name} does not load: {error}"
    try:
        ask, register = getattr(library, _INTERFACE), library.orchard_register_ops
    except AttributeError:
        return stranger
    ask.restype = register.restype = ctypes.c_char_p
    theirs = ask().decode(errors="replace")
    if theirs != interface:
        return (
            f"the native library {path.name} is of another version of orchard_ops "
            f"({_difference(theirs, interface)}); reinstall it"
        )
    register.argtypes = [ctypes.c_char_p]
    failure = register(NAME.encode())
    if failure:
        why = failure.decode(errors="replace")
        return f"the native library {path.name} cannot register its ops: {why}"
    found = gpu.here()
    OPS.set_machine(found.cores, found.scratch_mb << 20)
    return None


def load(interface: str) -> None:
    """Loads the library of this interface, which registers the MPS kernels.

    It never raises: `why_not` tells what failed.
    """
    global _why_not
    path = _library_path()
    try:
        exists = path.exists()
    except OSError as error:  # a name that no file can have
        _why_not = f"the native library of ORCHARD_NATIVE_LIBRARY does not load: {error.strerror}"
        return
    if exists:
        _why_not = _open(path, interface)
    elif is_expected():
        _why_not = f"the native library {path.name} is missing"
    else:
        _why_not = "this installation has no Metal kernels (they need macOS on Apple silicon)"


def why_not() -> str | None:
    """None when the library is loaded, else the reason why it is not."""
    return _why_not


def metal_calls() -> dict[str, int]:
    """Calls that have run as Metal kernels in this process, by op."""
    return dict(zip(COUNTED, (0,) * len(COUNTED) if _why_not else OPS.metal_calls(), strict=True))
