"""Ops are registered once in a process: a second import takes the first one's modules, or
raises."""

from __future__ import annotations

import sys
from pathlib import Path

from .namespace import NAME, OPS

_MARK = "_orchard_ops_modules"


def _ours() -> dict[str, object]:
    package = __package__ or ""
    return {
        name: module
        for name, module in sys.modules.items()
        if name.startswith(f"{package}.") and name != __name__
    }


def take_up() -> None:
    """Puts the modules of an earlier import back, so that there is one state in the process.

    Raises:
        ImportError: the earlier import was of another copy of this package.
    """
    first = getattr(OPS, _MARK, None)
    if first is None:
        return
    here, there = Path(__file__).parent, first["directory"]
    if here != there:
        raise ImportError(
            f"orchard_ops: {here} cannot be imported into a process that has imported {there}: "
            f"both register torch.ops.{NAME}; keep one of them on sys.path"
        )
    sys.modules.update(first["modules"])


def remember() -> None:
    """Called when the import has succeeded."""
    mark = {"directory": Path(__file__).parent, "modules": _ours()}
    setattr(OPS, _MARK, mark)
