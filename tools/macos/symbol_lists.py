"""The committed lists in symbols/: what the plugin may use of torch and of macOS.

    torch-2.13.txt   one per torch release: the C shim its macOS wheel exports, with prototypes
    macos-14.txt     names of the system libraries that those wheels import themselves

A list is sections `[install name of a library]` of lines `symbol prototype`; extract_symbols.py
writes it. The prototype is empty where there is none (C++ symbols carry it in their name); for a
system library it says `weak` of what the whole process shares, like operator new.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

SYMBOLS = Path(__file__).resolve().parent / "symbols"
MACOS = "14.0"  # the oldest macOS the wheel is for

WEAK = "weak"

Library = dict[str, str]  # symbol, as in the symbol table -> prototype


@dataclass(frozen=True)
class SymbolList:
    """What one set of libraries exports, by install name."""

    label: str
    libraries: dict[str, Library]

    @staticmethod
    def read(path: Path) -> SymbolList:
        libraries: dict[str, Library] = {}
        for line in path.read_text(encoding="ascii").splitlines():
            section = re.fullmatch(r"\[(.+)\]", line)
            if section:
                library = libraries.setdefault(section[1], {})
            elif line and not line.startswith("#"):
                symbol, _, prototype = line.partition(" ")
                library[symbol] = prototype
        return SymbolList(path.stem, libraries)

    def write(self, path: Path, comment: str) -> None:
        lines = [f"# {line}" for line in comment.splitlines()]
        for install_name, library in sorted(self.libraries.items()):
            lines += ["", f"[{install_name}]"]
            lines += [f"{symbol} {text}".rstrip() for symbol, text in sorted(library.items())]
        path.write_text("\n".join(lines) + "\n", encoding="ascii")


def system_list() -> SymbolList:
    """libc++ and libSystem of the oldest macOS supported."""
    return SymbolList.read(SYMBOLS / f"macos-{MACOS.split('.')[0]}.txt")


def torch_lists() -> list[SymbolList]:
    """The supported torch releases, oldest first."""
    paths = SYMBOLS.glob("torch-*.txt")
    return [SymbolList.read(path) for path in sorted(paths, key=_release)]


def _release(path: Path) -> list[int]:
    return [int(part) for part in path.stem.removeprefix("torch-").split(".")]
