"""C++ functions of a package that write Metal text, made into a program that prints it."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .packages import Package

_COMPILER = "clang++-19"


def program(
    package: Package, name: str, main: str, sources: Sequence[str], headers: dict[str, str]
) -> Path:
    """``main`` and some of the package's sources; ``headers`` stand for what only a Mac has.

    What ``main`` does not reach is left out: it may need functions of files that need a Mac.
    """
    folder = package.file("csrc")
    identity = hashlib.sha256(repr((main, sources, headers)).encode()).hexdigest()[:12]
    built = package.folder / f"{name}-{identity}"
    if built.exists():
        return built
    own = package.folder / f"{name}-headers"
    for path, text in {"main.cpp": main, **headers}.items():
        (own / path).parent.mkdir(parents=True, exist_ok=True)
        (own / path).write_text(text)
    command = [_COMPILER, "-std=c++17", "-w", "-ffunction-sections", f"-I{own}", f"-I{folder}"]
    # Standard headers that its files get from others on a Mac.
    command += ["-include", "string", "-include", "vector"]
    command += [str(own / "main.cpp"), *(str(folder / source) for source in sources)]
    command += ["-Wl,--gc-sections", "-o", f"{built}.part"]
    subprocess.run(command, check=True, capture_output=True)
    Path(f"{built}.part").replace(built)
    return built


def text(built: Path, numbers: Sequence[int], head: str, new_head: str) -> str:
    """What it prints for these arguments, ``head`` of its one kernel replaced; bytes above ASCII,
    which stand in comments, are dropped."""
    printed = subprocess.run([built, *map(str, numbers)], check=True, capture_output=True)
    found = printed.stdout.decode("ascii", "ignore")
    if found.count(head) != 1:
        raise ValueError(f"{built.name} prints {found.count(head)} kernels with {head!r}, not one")
    return found.replace(head, new_head)
