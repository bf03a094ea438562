"""Kernel definitions and ``template [[host_name("...")]]`` instantiations.

For each kernel that the host can launch, an MSL_ENTRY is written behind it, with one tag for each
parameter.  How a parameter is passed follows from the function's C++ type
(include/msl/arguments.h), so that only the names of the attributes have to be understood here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..lexer import TokenStream
from ..vocabulary import KERNEL_ATTRIBUTES

HOST_NAME = re.compile(r'host_name\s*\(\s*((?:"(?:\\.|[^"\\])*"\s*)+)\)')
_STRING = re.compile(r'"((?:\\.|[^"\\])*)"')
_MAX_THREADS = re.compile(r"\bmax_total_threads_per_threadgroup\s*\(")
_NUMBERED = re.compile(r"(buffer|threadgroup)\s*\((.*)\)")
_LITERAL_TAG = re.compile(r"::msl::arg_(\w+)<\(\s*(\d+)\s*\)>")
_DEFAULT_MAX_THREADS = "1024"
_PIECES = re.compile(r",(?![^()]*\))")


def host_name(body: str) -> str:
    return "".join(_STRING.findall(HOST_NAME.search(body)[1]))


def thread_limit(attributes: str) -> str | None:
    """The argument of max_total_threads_per_threadgroup, brackets within it included."""
    found = _MAX_THREADS.search(attributes)
    if not found:
        return None
    begin, depth = found.end(), 1
    for end in range(begin, len(attributes)):
        depth += {"(": 1, ")": -1}.get(attributes[end], 0)
        if depth == 0:
            return attributes[begin:end]
    raise ValueError(f"brackets of [[{attributes.strip()}]] do not close")


def is_kernel_attribute(body: str) -> bool:
    return re.match(r"\s*kernel\b", body) is not None


@dataclass
class _Kernel:
    tags: list[str]  # one for each parameter


class Kernels:
    """Collects kernels and writes their entries; ``known`` are those of the text in front."""

    def __init__(self, stream: TokenStream, only: Sequence[str], known: Kernels | None = None):
        self.stream = stream
        self.only = only
        self.known: dict[str, _Kernel] = dict(known.known) if known else {}
        self.host_names: set[str] = set(known.host_names) if known else set()
        self.pending = ""  # attributes seen in front of a definition

    def remember(self, attribute: str) -> None:
        """An attribute that may belong to the kernel definition that follows."""
        if HOST_NAME.search(attribute) or thread_limit(attribute) is not None:
            self.pending += f" {attribute} "

    # ---- definitions

    def definition(self, begin: int, i: int, attribute: str = "") -> int:
        """``kernel void name(...)`` or ``[[kernel]] void name(...)``; i is behind the keyword."""
        stream = self.stream
        stream.remove(begin, i)
        stream.insert_before(begin, "MSL_KERNEL ")
        self.remember(attribute)
        name, i = self._name(i)
        close = stream.closing[i]
        tags = _number([self._tag(name, a, b) for a, b in stream.split_commas(i + 1, close)])
        expression = thread_limit(self.pending) or _DEFAULT_MAX_THREADS
        host = host_name(self.pending) if HOST_NAME.search(self.pending) else name
        self.pending = ""
        template_end = self._template_end(begin)
        if template_end is not None:
            self._carry_limit(template_end, name, expression)
        self.known[name] = _Kernel(tags)
        if template_end is None and stream[close + 1].is_op("{"):
            end = stream.closing[close + 1]
            stream.insert_after(end, self._entry(begin, host, name, self.known[name], expression))
        return i + 1  # the main walk strips the parameters' attributes

    def _name(self, i: int) -> tuple[str, int]:
        """The kernel's name and the bracket of its parameters; attributes on the way are noted."""
        stream = self.stream
        name = ""
        while not stream[i].is_op("("):
            found = stream.attribute(i)
            if found:
                self.remember(found[1])
                stream.remove(i, found[0] + 1)
                i = found[0] + 1
                continue
            if stream[i].kind == "end":
                raise stream.error(i, "kernel without a parameter list")
            if stream[i].text == "kernel":
                stream.remove(i, i + 1)
            elif stream[i].kind == "word":
                name = stream[i].text
            i += 1
        return name, i

    def _template_end(self, begin: int) -> int | None:
        """The ``>`` of ``template <...>`` in front of a definition, or None."""
        last = begin - 1
        while last > 0 and self.stream.is_attribute_end(last):
            last = self.stream.opening[last] - 1
        return last if last > 0 and self.stream[last].is_op(">") else None

    def _tag(self, kernel: str, begin: int, end: int) -> str:
        """The tag of one parameter; only its kind if Metal has to number it."""
        stream = self.stream
        tag = None
        i = begin
        while i < end:
            found = stream.attribute(i)
            if found:
                for piece in _PIECES.split(found[1]):
                    numbered = _NUMBERED.fullmatch(piece.strip())
                    if numbered:
                        tag = f"::msl::arg_{numbered[1]}<({numbered[2]})>"
                    elif piece.strip() in KERNEL_ATTRIBUTES:
                        tag = f"::msl::arg_{piece.strip()}"
                    else:
                        raise stream.error(i, f"kernel '{kernel}': unknown attribute [[{piece}]]")
                i = found[0]
            i += 1
        if tag:
            return tag
        words = {t.text for t in stream.tokens[begin:end]}
        if "threadgroup" in words and words & {"*", "&"}:
            return "threadgroup"
        if words & {"device", "constant"}:
            return "buffer"
        text = stream.source(begin, end)
        raise stream.error(begin, f"kernel '{kernel}': parameter '{text}' has no attribute")

    def _carry_limit(self, template_end: int, name: str, expression: str) -> None:
        """The limit may depend on the template's parameters: a variable template carries it."""
        stream = self.stream
        start = stream.angle_open(template_end) - 1
        if stream[start].text != "template":
            raise stream.error(start, f"kernel '{name}': cannot read its template parameters")
        head = stream.source(start, template_end + 1)
        text = f"{head} static constexpr int msl_max_threads_{name} = ({expression}); "
        stream.insert_before(start, text)

    # ---- instantiations

    def is_instantiation(self, i: int) -> bool:
        found = self.stream.attribute(i + 1)
        if found:
            return HOST_NAME.search(found[1]) is not None or is_kernel_attribute(found[1])
        return self.stream[i + 1].text == "kernel"

    def instantiation(self, begin: int) -> int:
        """``template [[host_name("x")]] [[kernel]] decltype(f<T>) f<T>;`` or the spelling with a
        parameter list: ``template [[host_name("x")]] kernel void f<T>(...);``."""
        stream = self.stream
        host = None
        i = begin + 1
        while True:
            found = stream.attribute(i)
            if found:
                if HOST_NAME.search(found[1]):
                    host = host_name(found[1])
                i = found[0] + 1
            elif stream[i].text == "kernel":
                i += 1
            else:
                break
        end = stream.statement_end(i)
        last = end - 1
        if stream[last].is_op(")"):
            last = stream.opening[last] - 1
        open_ = stream.angle_open(last)
        name = stream[open_ - 1].text
        if not stream[last].is_op(">") or name not in self.known:
            raise stream.error(begin, f"'{name}' does not name a kernel template")
        first = open_ - 1
        while stream[first - 1].is_op("::"):
            first -= 2
        scope = stream.source(first, open_ - 1)
        arguments = stream.source(open_, last + 1)
        limit = f"{scope}msl_max_threads_{name}{arguments}"
        text = self._entry(
            begin, host or name, f"{scope}{name}{arguments}", self.known[name], limit
        )
        stream.remove(begin, end + 1)
        stream.insert_after(end, text)
        return end + 1

    def _entry(self, i: int, host: str, function: str, kernel: _Kernel, limit: str) -> str:
        if host in self.host_names:
            raise self.stream.error(i, f"two kernels are named '{host}'")
        self.host_names.add(host)
        if not any(fnmatchcase(host, pattern) for pattern in self.only):
            return ""
        tags = "".join(f", {tag}" for tag in kernel.tags)
        number = len(self.host_names)
        return f' MSL_ENTRY(msl_entry_{number}, "{host}", ({limit}), ({function}){tags})'


def _number(tags: list[str]) -> list[str]:
    """Buffers without an attribute get the lowest free numbers, in order."""
    for kind in ("buffer", "threadgroup"):
        used = {int(m[2]) for t in tags if (m := _LITERAL_TAG.fullmatch(t)) and m[1] == kind}
        number = 0
        for i, tag in enumerate(tags):
            if tag == kind:
                while number in used:
                    number += 1
                used.add(number)
                tags[i] = f"::msl::arg_{kind}<({number})>"
    return tags
