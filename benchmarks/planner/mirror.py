"""C++ structs and enumerations as ctypes sees them, read from the headers that declare them."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

Type = type[ctypes.Structure] | type[ctypes.Array] | type[ctypes._SimpleCData]
NUMBERS: dict[str, Type] = {
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "bool": ctypes.c_bool,
}
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_FIELD = re.compile(
    r"(?:std::array<(?P<element>[\w:]+), (?P<length>\d+)>|(?P<type>[\w:]+))\s+"
    r"(?P<names>\w+(?:\[\d+\])?(?:, \w+)*)\s*(?:\{\}|= [^;]+)?"
)


class Header:
    """The structs and enumerations of one header, which may have those of another in them."""

    def __init__(self, path: Path, included: Header | None = None):
        self._path = path
        self._text = _COMMENT.sub("", path.read_text(encoding="ascii"))
        self._included = included
        self._known: dict[str, Type] = dict(NUMBERS)

    def _body(self, kind: str, name: str) -> str:
        found = re.search(rf"\b{kind} {name} \{{(.*?)\n\}};", self._text, re.S)
        if found is None:
            raise ValueError(f"{self._path.name} has no {kind} {name}")
        return found[1]

    def enumerators(self, name: str) -> list[str]:
        """Names of an enumeration's values, in order."""
        entries = self._body("enum", name).split(",")
        return [entry.split("=")[0].strip() for entry in entries if entry.strip()]

    def numbers(self, name: str) -> dict[str, int]:
        """The values of an enumeration in which each is written."""
        entries = (entry.split("=") for entry in self._body("enum", name).split(","))
        return {x[0].strip(): int(x[1]) for x in entries if len(x) == 2}

    def type(self, name: str) -> Type:
        """A struct of numbers, arrays and such structs; one with strings, up to the first of them.

        A struct whose fields have all one type is mirrored as an array.
        """
        if name not in self._known:
            if self._included is not None and not re.search(rf"\bstruct {name} ", self._text):
                self._known[name] = self._included.type(name)
            else:
                self._known[name] = self._new_type(name)
        return self._known[name]

    def _new_type(self, name: str) -> Type:
        if re.search(rf"\benum class {name}\b", self._text):
            return ctypes.c_int
        fields = self._fields(name)
        if len({of_one for _, of_one in fields}) == 1:
            return fields[0][1] * len(fields)
        return type(name, (ctypes.Structure,), {"_fields_": fields})

    def _fields(self, name: str) -> list[tuple[str, Type]]:
        fields: list[tuple[str, Type]] = []
        for declaration in self._body("struct", name).split(";"):
            if not declaration.strip() or "(" in declaration:
                continue
            match = _FIELD.fullmatch(declaration.strip())
            if match is None:
                raise ValueError(f"struct {name}: cannot read {declaration.strip()!r}")
            if match["type"] == "std::string":
                break
            of_one = self.type(match["element"] or match["type"])
            if match["length"]:
                of_one = of_one * int(match["length"])
            for field in match["names"].split(", "):
                plain, _, length = field.removesuffix("]").partition("[")
                fields.append((plain, of_one * int(length) if length else of_one))
        return fields
