"""The native plugin (Metal kernels): found and loaded once at import, or the reason why not."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

_LIBRARY_NAME = "liborchard_ops.dylib" if sys.platform == "darwin" else "liborchard_ops.so"
_why_not: str | None = "the native library has not been looked for"


def _library_path() -> Path:
    """ORCHARD_NATIVE_LIBRARY if set (development builds), else the file inside the package."""
    override = os.environ.get("ORCHARD_NATIVE_LIBRARY")
    return Path(override) if override else Path(__file__).parent / _LIBRARY_NAME


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
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        _why_not = f"the native library {path.name} does not load: {error.__cause__ or error}"
    else:
        _why_not = None


def why_not() -> str | None:
    """None when the plugin is loaded, else the reason why it is not."""
    return _why_not


def metal_calls() -> dict[str, int]:
    """Calls that have run as Metal kernels in this process, by op."""
    forward, backward = (0, 0) if _why_not else torch.ops.orchard.metal_calls()
    return {"flash_attn_fwd": forward, "flash_attn_bwd": backward}
