"""The native plugin (Metal kernels): found and loaded once at import, or the reason why not."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

from . import _ops

_LIBRARY_NAME = "liborchard_ops.dylib" if sys.platform == "darwin" else "liborchard_ops.so"
_why_not: str | None = "the native library has not been looked for"


def _library_path() -> Path:
    """ORCHARD_NATIVE_LIBRARY if set (development builds), else the file inside the package."""
    override = os.environ.get("ORCHARD_NATIVE_LIBRARY")
    return Path(override) if override else Path(__file__).parent / _LIBRARY_NAME


def _open(path: Path) -> str | None:
    """Loads the library and has it register its ops; None, or why not.

    Loading registers nothing, so that another library, or one for another version of this package,
    is told apart before PyTorch knows of it.
    """
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the native library {path.name} does not load: {error}"
    try:
        interface, register = library.orchard_library_interface, library.orchard_register_ops
    except AttributeError:
        return f"{path.name} is not a native library of orchard_ops"
    interface.restype = register.restype = ctypes.c_char_p
    if interface().decode() != _ops.INTERFACE:
        return f"the native library {path.name} is of another version of orchard_ops; reinstall it"
    failure = register()
    return (
        f"the native library {path.name} cannot register: {failure.decode()}" if failure else None
    )


def load() -> None:
    """Loads the plugin, which registers the MPS kernels. Never raises: see `why_not`."""
    global _why_not
    path = _library_path()
    if not path.exists():
        _why_not = (
            f"the native library {path.name} is missing"
            if sys.platform == "darwin" or "ORCHARD_NATIVE_LIBRARY" in os.environ
            else "this installation has no Metal kernels (they need macOS on Apple silicon)"
        )
        return
    _why_not = _open(path)


def why_not() -> str | None:
    """None when the plugin is loaded, else the reason why it is not."""
    return _why_not


def metal_calls() -> dict[str, int]:
    """Calls that have run as Metal kernels in this process, by op."""
    forward, backward = (0, 0) if _why_not else torch.ops.orchard.metal_calls()
    return {"flash_attn_fwd": forward, "flash_attn_bwd": backward}
