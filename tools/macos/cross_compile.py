"""Builds the macOS library on Linux: `cross_compile.py OUTPUT`.

clang as Zig packages it compiles (it brings the headers of macOS's C library and of libc++), LLVM's
ld64 links and signs. No macOS SDK takes part: the libraries to link against are stubs written from
the committed symbol lists, so the linker already refuses a name that no list has.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mach_o import EXPORTS, INSTALL_NAME, RPATH
from symbol_lists import MACOS, WEAK, Library, system_list, torch_lists

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "macos"
LINKER = "ld64.lld-19"
CACHE = WORK / "zig-cache"
COMPILER = (
    "env",
    f"ZIG_GLOBAL_CACHE_DIR={CACHE}",
    f"ZIG_LOCAL_CACHE_DIR={CACHE}",
    sys.executable,
    "-m",
    "ziglang",
    "c++",
    "-target",
    f"aarch64-macos.{MACOS}",
    "-mcpu=apple_m1",
    "-g0",  # debug information would hold this machine's paths
    "-fno-sized-deallocation",  # torch's libraries have no operator delete(void*, size_t) either
)

sys.path.insert(0, str(ROOT / "native"))
import build as native_build  # noqa: E402


def stub(install_name: str, library: Library) -> str:
    """A text-based stub (.tbd): what a linker needs to know of a library."""

    def names(kind: str, wanted: bool) -> str:
        chosen = [f"'{symbol}'" for symbol, text in library.items() if (text == WEAK) == wanted]
        return f"    {kind}: [ {', '.join(sorted(chosen))} ]\n" if chosen else ""

    return (
        "--- !tapi-tbd\ntbd-version: 4\ntargets: [ arm64-macos ]\n"
        f"install-name: '{install_name}'\nexports:\n  - targets: [ arm64-macos ]\n"
        f"{names('symbols', False)}{names('weak-symbols', True)}...\n"
    )


def write_stubs(directory: Path) -> list[Path]:
    """Stubs of torch (whatever any release exports: abi_check.py judges each) and of macOS."""
    libraries: dict[str, Library] = {}
    for symbols in [*torch_lists(), system_list()]:
        for install_name, library in symbols.libraries.items():
            libraries.setdefault(install_name, {}).update(library)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for install_name, library in libraries.items():
        if library:
            path = directory / f"{Path(install_name).stem}.tbd"
            path.write_text(stub(install_name, library), encoding="ascii")
            paths.append(path)
    return paths


def link(objects: Sequence[Path], output: Path, *extra: str) -> None:
    """Links and ad-hoc signs a library that exports its two entry points (native/module.cpp)."""
    stubs = write_stubs(output.parent / "stubs")
    command = [
        LINKER,
        *f"-dylib -arch arm64 -platform_version macos {MACOS} {MACOS} -dead_strip".split(),
        *("-install_name", INSTALL_NAME, "-rpath", RPATH),
        *(word for name in EXPORTS for word in ("-exported_symbol", name)),
        *extra,
        *map(str, objects),
        *map(str, stubs),
        "-o",
        str(output),
    ]
    subprocess.run(command, check=True)


def fingerprint() -> str:
    """Changes whenever the library could: sources, flags, tools, headers, symbol lists."""
    digest = hashlib.sha256()
    tools = Path(__file__).resolve().parent
    for directory in (
        ROOT / "native",
        ROOT / "native" / "plan",
        ROOT / "shaders",
        tools,
        tools / "symbols",
    ):
        for path in sorted(path for path in directory.iterdir() if path.is_file()):
            digest.update(f"\0{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    for distribution in ("torch", "ziglang"):
        digest.update(importlib.metadata.version(distribution).encode() + b"\0")
    linker = subprocess.run([LINKER, "--version"], check=True, capture_output=True)
    digest.update(linker.stdout)
    return digest.hexdigest()[:16]


def build() -> Path:
    """The library, compiled unless it is there already; concurrent callers wait for one build."""
    output = WORK / fingerprint() / "liborchard_ops.dylib"
    output.parent.mkdir(parents=True, exist_ok=True)
    with (WORK / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            with tempfile.TemporaryDirectory(dir=WORK) as scratch:
                objects = native_build.compile_sources(list(COMPILER), Path(scratch))
                linked = Path(scratch, output.name)
                link(objects, linked)
                linked.replace(output)
    return output


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(build().read_bytes())
    print(target)
