"""The kernels that this process has compiled."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Collection
from pathlib import Path

from elftools.elf.constants import SH_FLAGS
from elftools.elf.elffile import ELFFile
from simulator import engine

from ..harness import Sources


def template_arguments(kernel: dict) -> list[str]:
    """All of them; the last two are those of Variant."""
    return re.search(r"decltype\(\w+<(.*)>\) ", kernel["instantiation"])[1].split(", ")


_libraries: dict[tuple[Path, str, bool], engine.Library] = {}  # of this process, by kernel name
_used: list[tuple[Path, str, bool]] = []  # since used_libraries was asked last


def compile_kernel(
    sources: Sources, family: str, kernel: dict, check: bool = False
) -> engine.Library:
    """The first problem's kernel by itself, all others of a family at once: that is faster."""
    key = (sources.root, kernel["name"], check)
    _used.append(key)
    if key not in _libraries:
        line = kernel["instantiation"]
        together = compiled_together(family, check)
        lines = together if line in together else (line,)
        library = engine.compile(sources.text(family) + "".join(lines), check=check)
        for name in library.names:
            _libraries[(sources.root, name, check)] = library
    library = _libraries[key]
    sources.observe(kernel["name"], code_of(library.path))
    return library


@functools.cache
def compiled_together(family: str, check: bool) -> tuple[str, ...]:
    from .attention import repository  # which needs this module, as the next one does
    from .problems import KITCHEN_SINK, problems

    sources, lines = repository(), {}
    for killer in problems():
        if killer.family == family and killer.check == check and killer.case != KITCHEN_SINK:
            lines[killer.plan(sources)[0]["instantiation"]] = None
    return tuple(lines)


def machine_code() -> dict[str, str]:
    """A digest of the code of each kernel that this process has compiled."""
    return {
        f"{name} {check}": code_of(library.path) for (_, name, check), library in _libraries.items()
    }


@functools.cache
def code_of(path: Path) -> str:
    """A digest of what a library loads: instructions and constants, no line numbers."""
    with path.open("rb") as file:
        loaded = [
            section.data()
            for section in ELFFile(file).iter_sections("SHT_PROGBITS")
            if section["sh_flags"] & SH_FLAGS.SHF_ALLOC and section.name != ".eh_frame"
        ]
    return hashlib.sha256(b"".join(loaded)).hexdigest()[:16]


def used_kernels() -> str:
    """A digest of the names of the kernels that were asked for since used_libraries was."""
    names = sorted({f"{name} {check}" for _, name, check in _used})
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]


def used_libraries() -> list[str]:
    """The libraries that were asked for since the last call."""
    paths = {str(_libraries[key].path) for key in _used if key in _libraries}
    _used.clear()
    return sorted(paths)


@functools.cache
def lines_of(library: str) -> frozenset[tuple[str, int]]:
    """The lines of the shaders, (file, line), that instructions of a library come from."""
    found = set()
    with open(library, "rb") as file:
        dwarf = ELFFile(file).get_dwarf_info()
        for unit in dwarf.iter_CUs():
            program = dwarf.line_program_for_CU(unit)
            assert program["version"] >= 5, "files are counted from 0"
            names = [Path(entry.name.decode()).name for entry in program["file_entry"]]
            for entry in program.get_entries():
                if entry.state is not None:
                    found.add((names[entry.state.file], entry.state.line))
    return frozenset(found)


def library_paths() -> set[Path]:
    """What this process has compiled, in the engine's cache."""
    return {library.path for library in _libraries.values()}


def forget_libraries(keep: Collection[str]) -> None:
    """Removes what this process has compiled from the engine's cache, but for `keep`."""
    for path in library_paths():
        if str(path) not in keep:
            path.unlink(missing_ok=True)
            path.with_suffix(".json").unlink(missing_ok=True)
