"""The disk cache.  Its files are never changed once they have their final name, so that any number
of processes may fill and read it at once."""

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from .toolchain import ENGINE, fingerprint


@functools.cache
def directory() -> Path:
    """$SIMULATOR_CACHE/engine, or build/simulator/engine of the repository. Each version of the
    engine has a folder there."""
    root = os.environ.get("SIMULATOR_CACHE")
    base = Path(root) / "engine" if root else ENGINE.parents[1] / "build" / "simulator" / "engine"
    path = base.resolve() / fingerprint()
    path.mkdir(parents=True, exist_ok=True)
    return path


def get(name: str, make: Callable[[Path], None]) -> Path:
    """The cached file of that name; ``make`` writes it under a temporary name if it is missing."""
    path = directory() / name
    if path.exists():
        return path
    handle, temporary = tempfile.mkstemp(prefix="tmp-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        make(Path(temporary))
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path
