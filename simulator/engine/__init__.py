"""Runs Metal Shading Language sources, unmodified, on the CPU.  See README.md.

>>> library = engine.compile(source, check=True)
>>> library.launch("kernel_name", (1000, 1, 1), (256, 1, 1), {0: engine.Buffer(address, nbytes)})
"""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from .compiler import Options, build, compile_many
from .counters import Counters
from .errors import CompileError, KernelError
from .library import Buffer, Library

__all__ = [
    "Buffer",
    "CompileError",
    "Counters",
    "KernelError",
    "Library",
    "compile",
    "compile_many",
]

_libraries: dict[tuple[str, Options], Library] = {}
_lock = threading.Lock()


def compile(
    source: str,
    *,
    check: bool = False,
    include_dirs: Sequence[Path] = (),
    defines: Sequence[str] = (),
    function_constants: Mapping[str | int, object] | None = None,
    only: Sequence[str] | None = None,
) -> Library:
    """Compiles a Metal source, or takes it from the cache.

    ``check`` adds the checks of memory accesses, races and divergence.  ``defines`` are "NAME" or
    "NAME=value".  ``function_constants`` maps names or indices to values.  ``only`` restricts the
    library to the kernels whose names match one of the glob patterns, which saves the time of
    compiling the others.  Raises CompileError.
    """
    constants = {str(key): value for key, value in (function_constants or {}).items()}
    folders = tuple(str(path) for path in include_dirs)
    options = Options(
        check, folders, tuple(defines), tuple(sorted(constants.items())), tuple(only or ("*",))
    )
    with _lock:
        library = _libraries.get((source, options))
    if library is None:
        library = Library(build(source, options), check)
        with _lock:
            library = _libraries.setdefault((source, options), library)
    return library
