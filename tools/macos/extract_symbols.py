"""Regenerates symbols/ from torch's macOS wheels, given all at once: `extract_symbols.py WHEEL...`

For each supported release:
    pip download --no-deps --only-binary=:all: --python-version 3.12 \
        --platform macosx_14_0_arm64 --platform macosx_11_0_arm64 torch==2.13.0
"""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path

import lief
import mach_o
from symbol_lists import MACOS, SYMBOLS, WEAK, Library, SymbolList

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


def prototypes(wheel: zipfile.ZipFile) -> Library:
    """The C functions that the headers declare for plugins: symbol -> prototype."""
    found: Library = {}
    for header in HEADERS:
        text = _COMMENT.sub("", wheel.read(header).decode())
        for declaration in _DECLARATION.finditer(text):
            arguments = re.sub(r"\s+", " ", declaration["arguments"]).strip()
            found[f"_{declaration['name']}"] = f"{declaration['result'].strip()} ({arguments})"
    return found


def plugin_exports(wheel: zipfile.ZipFile, binary: lief.MachO.Binary) -> Library:
    """What this library exports of the C interface, and the one C++ symbol."""
    declared = prototypes(wheel)
    names = {str(symbol.name) for symbol in binary.exported_symbols}
    return {
        name: declared.get(name, "")
        for name in names
        if name in declared or CPP_SYMBOLS.fullmatch(name)
    }


def system_imports(binary: lief.MachO.Binary) -> dict[str, Library]:
    """The names that this library needs of libc++ and libSystem to load at all."""
    minimum = mach_o.minimum_macos(binary)
    if minimum > tuple(map(int, MACOS.split("."))):
        raise SystemExit(f"a library needs macOS {minimum}: no evidence for {MACOS}")
    found: dict[str, Library] = {name: {} for name in SYSTEM_LIBRARIES}
    for needed in mach_o.imports(binary):
        if needed.library in found and not needed.optional:
            found[needed.library][needed.symbol] = WEAK if needed.shared else ""
    return found


def extract(paths: list[Path]) -> None:
    system: dict[str, Library] = {name: {} for name in SYSTEM_LIBRARIES}
    for path in paths:
        version = path.name.split("-")[1]
        libraries: dict[str, Library] = {}
        with zipfile.ZipFile(path) as wheel:
            for member in LIBRARIES:
                binary = mach_o.parse(wheel.read(member))
                libraries[mach_o.install_name(binary)] = plugin_exports(wheel, binary)
                for name, symbols in system_imports(binary).items():
                    for symbol, kind in symbols.items():
                        system[name][symbol] = system[name].get(symbol) or kind
        label = "torch-" + ".".join(version.split(".")[:2])
        SymbolList(label, libraries).write(
            SYMBOLS / f"{label}.txt",
            f"What the libraries of {path.name} export to plugins.\n"
            "Written by tools/macos/extract_symbols.py.",
        )
    label = f"macos-{MACOS.split('.')[0]}"
    SymbolList(label, system).write(
        SYMBOLS / f"{label}.txt",
        f"Names of system libraries that torch's wheels for macOS {MACOS} or older need to load,\n"
        f"so every macOS from {MACOS} on has them. Written by tools/macos/extract_symbols.py from\n"
        + "\n".join(path.name for path in paths),
    )


if __name__ == "__main__":
    if not sys.argv[1:]:
        raise SystemExit(__doc__)
    extract([Path(argument) for argument in sys.argv[1:]])
