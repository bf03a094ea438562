"""The compilers: clang 19 for kernels and the runtime, ld to link, llvm-symbolizer for reports."""

import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

ENGINE = Path(__file__).resolve().parent
INCLUDE = ENGINE / "include"
RUNTIME = ENGINE / "runtime"

CLANG = os.environ.get("SIMULATOR_CLANG", "clang-19")
LINKER = os.environ.get("SIMULATOR_LD", "ld")  # for one object several times as fast as lld
SYMBOLIZER = os.environ.get("SIMULATOR_SYMBOLIZER", "llvm-symbolizer-19")

# The same code, and so the same numbers, on every machine that has AVX2, FMA and F16C.
TARGET = ["-march=x86-64-v3", "-fPIC"]


def run(command: Sequence[str], text: str | None = None) -> subprocess.CompletedProcess:
    """Runs a tool of ours that is not expected to fail."""
    result = run_unchecked(command, text)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result


def run_unchecked(command: Sequence[str], text: str | None = None) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise RuntimeError(f"{command[0]} is needed to run Metal sources: {error}") from None


@functools.cache
def fingerprint() -> str:
    """Changes with every file of the engine, with its place, and with the compiler."""
    digest = hashlib.sha256(str(ENGINE).encode())
    for path in sorted(ENGINE.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md":
            digest.update(str(path.relative_to(ENGINE)).encode())
            digest.update(path.read_bytes())
    for tool in (CLANG, LINKER):
        found = shutil.which(tool)
        if found:
            stat = os.stat(found)
            digest.update(f"{os.path.realpath(found)} {stat.st_size} {stat.st_mtime}".encode())
    return digest.hexdigest()[:16]
