"""Builds the macOS wheel on Linux: `pack_wheel.py [DIRECTORY]` (dist/ by default).

setup.py makes the wheel, as in `pip install .`, from a copy of the sources and the library that
cross_compile.py built. A library that fails a check is not packed. The same sources and tools give
the same bytes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import abi_check
import cross_compile
import mach_o
from cross_compile import ROOT

SOURCES = ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
SOURCE_DIRECTORIES = ("native", "shaders", "src")
EPOCH = "315532800"  # 1980-01-01, the oldest date that a zip file can hold
BUILD_WHEEL = "import sys, setuptools.build_meta as b; b.build_wheel(sys.argv[1])"


def copy_sources(target: Path) -> None:
    """What the source distribution is made of, with the same file modes on every machine."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "liborchard_ops.*")
    for name in SOURCES:
        if (ROOT / name).exists():
            shutil.copyfile(ROOT / name, target / name)
    for name in SOURCE_DIRECTORIES:
        shutil.copytree(ROOT / name, target / name, ignore=ignore, copy_function=shutil.copyfile)


def pack(library: Path, directory: Path) -> Path:
    """The wheel of the package with `library` in it."""
    with tempfile.TemporaryDirectory() as scratch:
        sources, output = Path(scratch, "sources"), Path(scratch, "wheel")
        sources.mkdir()
        output.mkdir()
        environment = {
            **os.environ,
            "ORCHARD_PREBUILT_LIBRARY": str(library.resolve()),
            "SOURCE_DATE_EPOCH": os.environ.get("SOURCE_DATE_EPOCH", EPOCH),
        }
        previous = os.umask(0o022)
        try:
            copy_sources(sources)
            command = [sys.executable, "-c", BUILD_WHEEL, str(output)]
            done = subprocess.run(
                command, cwd=sources, env=environment, capture_output=True, text=True
            )
            if done.returncode != 0:
                raise SystemExit(done.stdout + done.stderr)
        finally:
            os.umask(previous)
        (wheel,) = output.glob("*.whl")
        directory.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(wheel, directory / wheel.name))


def content_problems(wheel: Path) -> list[str]:
    """The files that the wheel lacks, and those that it should not have."""
    package = ROOT / "src" / "orchard_ops"
    modules = {f"orchard_ops/{path.relative_to(package)}" for path in package.rglob("*.py")}
    wanted = modules | {"orchard_ops/py.typed", "orchard_ops/liborchard_ops.dylib"}
    metadata = (
        r"orchard_ops-[^/]+\.dist-info/(METADATA|WHEEL|RECORD|top_level.txt|licenses/LICENSE)"
    )
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    described = {name for name in names if re.fullmatch(metadata, name)}
    problems = [f"{wheel.name} lacks {name}" for name in sorted(wanted - names)]
    if len(described) != 5:
        problems.append(f"{wheel.name} has the metadata {sorted(described)}")
    return problems + [f"{wheel.name} holds {name}" for name in sorted(names - wanted - described)]


def build(directory: Path) -> Path:
    """Compiles, checks and packs; fails on the first library or wheel that is not in order."""
    library = cross_compile.build()
    problems = mach_o.problems(library) + abi_check.check_file(library).problems
    if problems:
        raise SystemExit("\n".join(problems))
    wheel = pack(library, directory)
    problems = content_problems(wheel)
    if problems:
        raise SystemExit("\n".join(problems))
    return wheel


if __name__ == "__main__":
    print(build(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "dist"))
