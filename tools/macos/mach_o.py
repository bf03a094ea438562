"""Reads a macOS library and checks that it is one that a Mac can load: `mach_o.py LIBRARY`.

What the code imports is the subject of abi_check.py; here are the load commands and the signature.
"""

from __future__ import annotations

import hashlib
import io
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import lief
from symbol_lists import MACOS

INSTALL_NAME = "@rpath/liborchard_ops.dylib"
RPATH = "@loader_path/../torch/lib"  # both packages lie in site-packages
DEPENDENTS = frozenset(
    {
        "@rpath/libtorch_cpu.dylib",
        "@rpath/libc10.dylib",
        "/usr/lib/libc++.1.dylib",
        "/usr/lib/libSystem.B.dylib",
    }
)
EXPORTS = ("_orchard_library_interface", "_orchard_register_ops")
"""The functions that native/module.cpp exports: Python asks what the library is before it registers
anything."""

Command = lief.MachO.LoadCommand.TYPE
_LOADS = {
    Command.LOAD_DYLIB,
    Command.LOAD_WEAK_DYLIB,
    Command.REEXPORT_DYLIB,
    Command.LAZY_LOAD_DYLIB,
    Command.LOAD_UPWARD_DYLIB,
}
_WEAK_REFERENCE = 0x40  # N_WEAK_REF
_WEAK_LOOKUP = -3  # BIND_SPECIAL_DYLIB_WEAK_LOOKUP: the first definition in the process wins


def parse(content: bytes) -> lief.MachO.Binary:
    """The one image of a library (no universal file)."""
    fat = lief.MachO.parse(io.BytesIO(content))
    binary = fat.at(0) if fat is not None and fat.size == 1 else None
    if binary is None:
        raise ValueError("not a Mach-O file with exactly one architecture")
    return binary


def install_name(binary: lief.MachO.Binary) -> str:
    command = binary.get(Command.ID_DYLIB)
    return command.name if isinstance(command, lief.MachO.DylibCommand) else ""


def minimum_macos(binary: lief.MachO.Binary) -> tuple[int, ...]:
    return tuple(binary.build_version.minos[:2]) if binary.build_version is not None else ()


def dependents(binary: lief.MachO.Binary) -> list[str]:
    """Install names of the libraries that dyld loads with this one, in ordinal order."""
    return [
        command.name
        for command in binary.commands
        if command.command in _LOADS and isinstance(command, lief.MachO.DylibCommand)
    ]


@dataclass(frozen=True)
class Import:
    """An undefined symbol."""

    symbol: str
    library: str  # the one it is bound to, '' if none in particular
    shared: bool  # coalesced over the whole process, as operator new
    optional: bool  # may be missing at run time


def imports(binary: lief.MachO.Binary) -> list[Import]:
    libraries = dependents(binary)
    found = []
    for symbol in binary.imported_symbols:
        ordinal, binding = symbol.library_ordinal, symbol.binding_info
        found.append(
            Import(
                symbol=str(symbol.name),
                library=libraries[ordinal - 1] if 1 <= ordinal <= len(libraries) else "",
                shared=binding is not None and binding.library_ordinal == _WEAK_LOOKUP,
                optional=bool(symbol.description & _WEAK_REFERENCE),
            )
        )
    return found


def strings(binary: lief.MachO.Binary) -> list[str]:
    """The C string literals."""
    section = binary.get_section("__TEXT", "__cstring")
    content = bytes(section.content) if section is not None else b""
    return [text.decode("ascii", "replace") for text in content.split(b"\0") if text]


def load_command_problems(binary: lief.MachO.Binary) -> list[str]:
    """The differences from a library that Apple's tools would build for this package; empty if
    there are none."""
    commands = [command.command for command in binary.commands]
    header = binary.header
    sections = {section.name for section in binary.sections}
    exported = sorted(str(symbol.name) for symbol in binary.exported_symbols)
    imported = {found.symbol for found in imports(binary)}
    fixed_up = {str(binding.symbol.name) for binding in binary.bindings if binding.symbol}
    expectations = {
        "the architecture is arm64": header.cpu_type == lief.MachO.Header.CPU_TYPE.ARM64
        and header.cpu_subtype == 0,
        "the file is a dylib": header.file_type == lief.MachO.Header.FILE_TYPE.DYLIB,
        "it uses two-level names": header.has(lief.MachO.Header.FLAGS.TWOLEVEL),
        f"the install name is {INSTALL_NAME}": install_name(binary) == INSTALL_NAME,
        f"the only run path is {RPATH}": [command.path for command in binary.rpaths] == [RPATH],
        f"the minimum macOS is {MACOS}": minimum_macos(binary) == tuple(map(int, MACOS.split("."))),
        "it needs torch and system libraries only": set(dependents(binary)) <= DEPENDENTS
        and DEPENDENTS - set(dependents(binary)) <= {"@rpath/libc10.dylib"},
        "no dylinker is named": Command.LOAD_DYLINKER not in commands,
        "dyld has fixups": Command.DYLD_CHAINED_FIXUPS in commands
        or Command.DYLD_INFO_ONLY in commands,
        "it has an identity (LC_UUID)": commands.count(Command.UUID) == 1,
        "exceptions can unwind": "__unwind_info" in sections,
        "nothing runs at load": not {"__init_offsets", "__mod_init_func"} & sections,
        f"the exports are {EXPORTS}, but: {exported}": exported == sorted(EXPORTS),
        "the symbol table names every import": fixed_up <= imported,
    }
    return [f"not so: {expectation}" for expectation, holds in expectations.items() if not holds]


_SUPERBLOB, _CODE_DIRECTORY = 0xFADE0CC0, 0xFADE0C02
_AD_HOC, _SHA256 = 0x2, 2


def signature_problems(content: bytes, binary: lief.MachO.Binary) -> list[str]:
    """Checks the ad-hoc code signature; an arm64 Mac kills a process over a page that differs."""
    if binary.code_signature is None:
        return ["there is no code signature"]
    start = binary.code_signature.data_offset
    magic, _, count = struct.unpack_from(">III", content, start)
    blobs = [struct.unpack_from(">II", content, start + 12 + 8 * i)[1] for i in range(count)]
    directories = [
        start + offset
        for offset in blobs
        if struct.unpack_from(">I", content, start + offset)[0] == _CODE_DIRECTORY
    ]
    if magic != _SUPERBLOB or len(directories) != 1:
        return ["the code signature has no single code directory"]
    directory = directories[0]
    (flags, hashes, _, _, pages, limit, hash_size, hash_type, _, page_bits) = struct.unpack_from(
        ">5I I 4B", content, directory + 12
    )
    problems = []
    if not flags & _AD_HOC or hash_type != _SHA256:
        problems.append("the code signature is not an ad-hoc one with SHA-256")
    if limit != start:
        problems.append(f"the code signature covers {limit} bytes of {start}")
    size = 1 << page_bits
    if pages != -(-limit // size):
        problems.append(f"the code signature has {pages} pages for {limit} bytes")
    for page in range(pages):
        text = content[page * size : min((page + 1) * size, limit)]
        at = directory + hashes + page * hash_size
        if hashlib.sha256(text).digest()[:hash_size] != content[at : at + hash_size]:
            problems.append(f"page {page} differs from its signature")
    return problems


def problems(library: Path) -> list[str]:
    content = library.read_bytes()
    binary = parse(content)
    return load_command_problems(binary) + signature_problems(content, binary)


if __name__ == "__main__":
    found = problems(Path(sys.argv[1]))
    print("\n".join(found) or f"{sys.argv[1]}: load commands and signature are in order")
    sys.exit(bool(found))
