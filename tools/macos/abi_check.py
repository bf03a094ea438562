"""Whether one macOS library loads into every supported torch: `abi_check.py [LIBRARY]`.

Three questions, answered from the built library and the committed symbol lists:
  - does each release export every symbol that the library imports, and macOS the rest?
  - does each release declare the imported C functions with the same prototypes?
  - does each release offer a way to pass a struct to a kernel? The library looks for it by dlsym,
    so the linker cannot tell; its string literals say which names it asks for.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import cross_compile
import mach_o
from symbol_lists import SymbolList, system_list, torch_lists

# A string literal that is a name of torch's: C shim or mangled C++.
_LOOKED_UP = re.compile(r"_Z\w+|(?:aoti_)?torch_\w+")
_STRUCT_ROUTE = re.compile(r"_torch_mps_set_arg_bytes|__ZN2at6native3mps\w+6setArgEjPKvy")


@dataclass
class Report:
    """The things that were compared, and everything that does not fit."""

    imports: dict[str, list[str]] = field(default_factory=dict)  # library -> symbols
    lookups: dict[str, list[str]] = field(default_factory=dict)  # release -> names dlsym finds
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(symbols):4} imports from {name}" for name, symbols in self.imports.items()]
        for release, names in self.lookups.items():
            lines.append(f"{release}: dlsym finds {', '.join(names)}")
        return "\n".join([*lines, *(f"PROBLEM: {problem}" for problem in self.problems)])


def looked_up(binary_strings: list[str]) -> list[str]:
    """Symbols that the library asks dlsym for (which leaves out the leading underscore)."""
    return [f"_{text}" for text in binary_strings if _LOOKED_UP.fullmatch(text)]


def check(content: bytes, releases: list[SymbolList], system: SymbolList) -> Report:
    binary = mach_o.parse(content)
    report = Report()
    for found in mach_o.imports(binary):
        report.imports.setdefault(found.library, []).append(found.symbol)

    for library, symbols in sorted(report.imports.items()):
        providers = [system] if library in system.libraries else releases
        for provider in providers:
            exported = provider.libraries.get(library, {})
            report.problems += [
                f"{provider.label}: {library or 'no library'} does not export {symbol}"
                for symbol in symbols
                if symbol not in exported
            ]

    names = looked_up(mach_o.strings(binary))
    for release in releases:
        offered = {symbol for library in release.libraries.values() for symbol in library}
        hits = report.lookups[release.label] = [name for name in names if name in offered]
        if not any(_STRUCT_ROUTE.fullmatch(name) for name in hits):
            report.problems.append(f"{release.label}: no way to pass a struct to a kernel")
    for name in names:
        if not any(name in hits for hits in report.lookups.values()):
            report.problems.append(f"{name} is looked up, but no release exports it")

    used = [symbol for symbols in report.imports.values() for symbol in symbols] + names
    report.problems += _prototype_problems(used, releases)
    return report


def _prototype_problems(symbols: list[str], releases: list[SymbolList]) -> list[str]:
    """The functions among `symbols` whose declarations differ between releases."""
    problems = []
    for symbol in symbols:
        declared = {
            library[symbol]: release.label
            for release in releases
            for library in release.libraries.values()
            if symbol in library
        }
        if len(declared) > 1:
            problems.append(f"{symbol} is not declared alike everywhere: {declared}")
    return problems


def check_file(library: Path) -> Report:
    return check(library.read_bytes(), torch_lists(), system_list())


if __name__ == "__main__":
    report = check_file(Path(sys.argv[1]) if sys.argv[1:] else cross_compile.build())
    print(report)
    sys.exit(bool(report.problems))
