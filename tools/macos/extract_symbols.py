"""Regenerates symbols/ from macOS wheels of torch: `extract_symbols.py WHEEL...`, all of them at once.

For each supported release:
    pip download --no-deps --only-binary=:all: --python-version 3.12 \
        --platform macosx_14_0_arm64 --platform macosx_11_0_arm64 torch==2.13.0
"""

from __future__ import annotations

import io
import re
import sys
import zipfile
from pathlib import Path

import lief
from symbol_lists import MACOS, SYMBOLS, Library, SymbolList

# The headers of the stable C interface, of its Metal part, and of the aten ops behind it.
HEADERS = (
    "torch/include/torch/csrc/inductor/aoti_torch/c/shim.h",
    "torch/include/torch/csrc/inductor/aoti_torch/c/shim_mps.h",
    "torch/include/torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h",
    "torch/include/torch/csrc/stable/c/shim.h",
)
# The one C++ symbol: sets a struct as a kernel's argument, before there was a shim for it.
CPP_SYMBOLS = re.compile(r"__ZN2at6native3mps19MetalKernelFunction6setArgE\w+")
LIBRARIES = ("torch/lib/libtorch_cpu.dylib", "torch/lib/libc10.dylib")
SYSTEM_LIBRARIES = ("/usr/lib/libc++.1.dylib", "/usr/lib/libSystem.B.dylib")

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/|^\s*#[^\n]*", re.DOTALL | re.MULTILINE)
_DECLARATION = re.compile(
    r"AOTI_TORCH_EXPORT\s+(?P<result>[\w\s*]+?)\s*\b(?P<name>\w+)\s*\((?P<arguments>[^;{]*)\)\s*;"
)
_WEAK_REFERENCE = 0x40  # N_WEAK_REF: may be missing at run time, so no evidence that it exists


def prototypes(wheel: zipfile.ZipFile) -> Library:
    """The C functions that the headers declare for plugins: symbol -> prototype."""
    found: Library = {}
    for header in HEADERS:
        text = _COMMENT.sub("", wheel.read(header).decode())
        for declaration in _DECLARATION.finditer(text):
            arguments = re.sub(r"\s+", " ", declaration["arguments"]).strip()
            found[f"_{declaration['name']}"] = f"{declaration['result'].strip()} ({arguments})"
    return found


def image(wheel: zipfile.ZipFile, member: str) -> lief.MachO.Binary:
    fat = lief.MachO.parse(io.BytesIO(wheel.read(member)))
    assert fat is not None and fat.size == 1, member
    return fat.at(0)


def install_name(binary: lief.MachO.Binary) -> str:
    command = binary.get(lief.MachO.LoadCommand.TYPE.ID_DYLIB)
    assert isinstance(command, lief.MachO.DylibCommand)
    return command.name


def plugin_exports(wheel: zipfile.ZipFile, binary: lief.MachO.Binary) -> Library:
    """What this library exports of the C interface, and the one C++ symbol."""
    declared = prototypes(wheel)
    names = {str(symbol.name) for symbol in binary.exported_symbols}
    return {
        name: declared.get(name, "")
        for name in names
        if name in declared or CPP_SYMBOLS.fullmatch(name)
    }


def system_imports(binary: lief.MachO.Binary) -> dict[str, set[str]]:
    """The names that this library needs of libc++ and libSystem to load at all."""
    minimum = tuple(binary.build_version.minos[:2])
    if minimum > tuple(map(int, MACOS.split("."))):
        raise SystemExit(f"{install_name(binary)} needs macOS {minimum}: no evidence for {MACOS}")
    found: dict[str, set[str]] = {name: set() for name in SYSTEM_LIBRARIES}
    for symbol in binary.imported_symbols:
        if symbol.library is None or symbol.description & _WEAK_REFERENCE:
            continue
        if symbol.library.name in found:
            found[symbol.library.name].add(str(symbol.name))
    return found


def extract(paths: list[Path]) -> None:
    system: dict[str, set[str]] = {name: set() for name in SYSTEM_LIBRARIES}
    for path in paths:
        version = path.name.split("-")[1]
        libraries: dict[str, Library] = {}
        with zipfile.ZipFile(path) as wheel:
            for member in LIBRARIES:
                binary = image(wheel, member)
                libraries[install_name(binary)] = plugin_exports(wheel, binary)
                for name, symbols in system_imports(binary).items():
                    system[name] |= symbols
        label = "torch-" + ".".join(version.split(".")[:2])
        SymbolList(label, libraries).write(
            SYMBOLS / f"{label}.txt",
            f"What the libraries of {path.name} export to plugins.\n"
            "Written by tools/macos/extract_symbols.py.",
        )
    label = f"macos-{MACOS.split('.')[0]}"
    SymbolList(label, {name: dict.fromkeys(found, "") for name, found in system.items()}).write(
        SYMBOLS / f"{label}.txt",
        f"Names of system libraries that torch's wheels for macOS {MACOS} or older need to load,\n"
        f"so every macOS from {MACOS} on has them. Written by tools/macos/extract_symbols.py from\n"
        + "\n".join(path.name for path in paths),
    )


if __name__ == "__main__":
    if not sys.argv[1:]:
        raise SystemExit(__doc__)
    extract([Path(argument) for argument in sys.argv[1:]])
