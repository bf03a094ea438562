"""Compiles the simulated device (device/*.cpp) once, and says how to compile an extension.

The result is cached in $SIMULATOR_CACHE, or else in build/simulator/device of the repository,
under a name made of everything it depends on: sources, flags, compiler, torch. Processes that
need it at the same time wait for the one that compiles.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

DEVICE_SOURCES = Path(__file__).parent / "device"
REPOSITORY = Path(__file__).parents[1]

# This file is a library of its own, which is loaded on request (see set_arg_bytes.cpp).
SET_ARG_BYTES = "set_arg_bytes.cpp"


def compile_flags() -> list[str]:
    """Flags for g++ or clang++ to build an extension library against the installed torch.

    The aoti_torch_mps_* functions and the Metal classes stay undefined in it, and bind to the
    simulated device when the extension is loaded after ``simulator.enable()``.
    """
    import torch

    root = Path(torch.__file__).parent
    return [
        "-std=c++20",
        "-fPIC",
        "-shared",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-I{root / 'include'}",
        f"-I{root / 'include' / 'torch' / 'csrc' / 'api' / 'include'}",
        f"-L{root / 'lib'}",
        "-Wl,--no-as-needed",
        "-ltorch_cpu",
        "-lc10",
        f"-Wl,-rpath,{root / 'lib'}",
    ]


def compiler() -> str:
    """The C++ compiler: $CXX, or the first of the usual ones."""
    candidates = ["g++", "clang++", "clang++-19"]
    if os.environ.get("CXX"):
        candidates.insert(0, os.environ["CXX"])
    for candidate in candidates:
        if found := shutil.which(candidate):
            return found
    raise RuntimeError(
        f"simulator: no C++ compiler (looked for {', '.join(candidates)}). "
        "Install g++ 12 or later, or set CXX."
    )


def device_library() -> Path:
    """The simulated device as a shared library, compiled if need be."""
    sources = sorted(path for path in DEVICE_SOURCES.glob("*.cpp") if path.name != SET_ARG_BYTES)
    return _compiled("device", sources)


def set_arg_bytes_library() -> Path:
    return _compiled("set_arg_bytes", [DEVICE_SOURCES / SET_ARG_BYTES])


def cache_directory() -> Path:
    chosen = os.environ.get("SIMULATOR_CACHE")
    return Path(chosen) if chosen else REPOSITORY / "build" / "simulator" / "device"


def _compiled(name: str, sources: list[Path]) -> Path:
    command = [compiler(), "-O1", "-Wall", *compile_flags()]
    cache = cache_directory()
    library = cache / f"{name}-{_digest(command)}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    with _only_process(cache / f"{name}.lock"):
        if not library.exists():
            _compile(command, sources, library)
    return library


def _compile(command: list[str], sources: list[Path], library: Path) -> None:
    print(f"simulator: compiling {library.name} (once) ...", file=sys.stderr, flush=True)
    # One translation unit that includes all others: the torch headers are by far the largest
    # part of each, so this takes a fraction of the time of compiling the files one by one.
    unit = library.with_suffix(f".{os.getpid()}.cpp")
    unfinished = library.with_suffix(f".{os.getpid()}.tmp")
    unit.write_text("".join(f'#include "{path}"\n' for path in sources))
    try:
        result = subprocess.run(
            [*command, str(unit), "-o", str(unfinished)], capture_output=True, text=True
        )
        if result.returncode != 0:
            raise RuntimeError(
                f"simulator: {command[0]} could not compile the device for this torch:\n"
                f"{result.stderr}"
            )
        os.replace(unfinished, library)
    finally:
        unit.unlink(missing_ok=True)
        unfinished.unlink(missing_ok=True)


def _digest(command: list[str]) -> str:
    import torch

    digest = hashlib.sha256()
    digest.update("\0".join([torch.__version__, *command]).encode())
    for path in sorted(DEVICE_SOURCES.iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _only_process(lock: Path):
    with open(lock, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # released when the file closes, or the process dies
        yield
