"""All checks of one source."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from simulator import engine
from simulator.engine import arrays, compiler, prepass
from simulator.engine.diagnostics import run_compiler
from simulator.engine.toolchain import CLANG

from . import vocabulary
from .text import Text

MAX_THREADGROUP_BYTES = 32 * 1024
_LANGUAGE = "Metal 3 is C++14"


@dataclass(frozen=True)
class Finding:
    place: str  # file:line
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


def check(
    source: str, instantiations: Sequence[str] = (), only: Sequence[str] | None = None
) -> list[Finding]:
    """What is wrong with a source; `instantiations` are the lines that make kernels of templates.

    `only` restricts what is compiled, as in the engine. A source that does not compile gets no
    further checks.
    """
    if not source.isascii():
        line = next(n for n, text in enumerate(source.split("\n"), 1) if not text.isascii())
        return [Finding(f"program_source:{line}", "not ASCII")]
    whole = source + "".join(instantiations)
    text = Text(source)
    found = [f for rule in RULES for f in rule(text)]
    try:
        library = engine.compile(whole, only=only)
    except engine.CompileError as error:
        lines = [line for line in str(error).splitlines() if "error: " in line]
        return [*found, *(_diagnostic(line, "error: ") for line in lines or [str(error)])]
    found += [_language(warning) for warning in library.warnings if "C++17" in warning]
    found += [Finding("", f"recursion: {' -> '.join(names)}") for names in recursions(whole, only)]
    for name, size in threadgroup_bytes(source, instantiations).items():
        if size > MAX_THREADGROUP_BYTES:
            found.append(Finding("", f"{name}: {size} bytes of threadgroup memory, at most 32768"))
    return found


def _diagnostic(line: str, kind: str) -> Finding:
    place, _, message = line.partition(f" {kind}")
    return Finding(":".join(place.split(":")[:2]), message)


def _language(warning: str) -> Finding:
    found = _diagnostic(warning, "warning: ")
    return Finding(found.place, f"{_LANGUAGE}: {found.message}")


# ---- rules on tokens

# Words of C's statements; everything else has to be found in the wheel.
_STATEMENTS = {"if", "else", "switch", "case", "default", "break", "continue", "return"}
_STATEMENTS |= {"for", "while", "do"}
Rule = Callable[[Text], Iterator[Finding]]
RULES: list[Rule] = []


def _rule(function: Rule) -> Rule:
    RULES.append(function)
    return function


@_rule
def known_words(text: Text) -> Iterator[Finding]:
    """Every name that the text does not declare occurs in the wheel."""
    reported = set()
    for i, token in enumerate(text.tokens):
        name = token.text
        if token.kind != "word" or name in text.declared or name in reported:
            continue
        if name in _STATEMENTS:
            continue
        if name not in vocabulary.words():
            reported.add(name)
            yield Finding(text.place(i), f"'{name}' is not in PyTorch's Metal sources")


@_rule
def known_idioms(text: Text) -> Iterator[Finding]:
    for name, i in vocabulary.idioms_of(text).items():
        if name not in vocabulary.idioms():
            place = text.place(i) if i >= 0 else ""
            yield Finding(place, f"{name}: not in PyTorch's Metal sources")


@_rule
def threadgroup_variables(text: Text) -> Iterator[Finding]:
    """Threadgroup variables may stand only in the outermost block of a kernel."""
    tokens = text.tokens
    for i, token in enumerate(tokens[:-3]):
        if token.text != "threadgroup" or not tokens[i - 1].is_op(";", "{", "}"):
            continue
        if not vocabulary.declares_variable(text, i):
            continue
        inside = [(name, a, b) for name, a, b in text.bodies if a < i < b]
        blocks = sum(a < i < b for a, b in text.stream.closing.items() if text.word(a) == "{")
        if not inside or not text.is_kernel(inside[-1][0]) or blocks > 1:
            yield Finding(text.place(i), "a threadgroup variable outside of a kernel's own scope")


@_rule
def function_pointers(text: Text) -> Iterator[Finding]:
    for i, token in enumerate(text.tokens[:-4]):
        if (
            token.is_op("(")
            and text.word(i + 1) in "*&"
            and text.word(i + 3) == ")"
            and text.word(i + 4) == "("
            and text.tokens[i + 2].kind == "word"
        ):
            yield Finding(text.place(i), "a function pointer")


# ---- rules on what the compiler makes of it

_DEFINE = re.compile(r"^define .*?@(\S+?)\(.*?^}", re.M | re.S)
_CALL = re.compile(r"\b(?:call|invoke)\b[^@\n]*@([\w.$]+)\(")


def recursions(source: str, only: Sequence[str] | None = None) -> list[list[str]]:
    """Cycles of the call graph, by function names; templates as the kernels instantiate them."""
    program = prepass.rewrite(compiler.preprocess(source, (), ()), {}, tuple(only or ("*",)))
    command = [
        *(CLANG, *compiler._language(False)),
        *("-include-pch", str(compiler.precompiled_header(False))),
        *("-Xclang", "-disable-llvm-passes", "-S", "-emit-llvm", "-o", "-", "-"),
    ]
    text = run_compiler(command, program).stdout
    graph = {m[1]: set(_CALL.findall(m[0])) for m in _DEFINE.finditer(text)}
    cycles: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            cycles.append([_readable(n) for n in (*path[path.index(name) :], name)])
        elif name in graph and name not in done:
            for callee in sorted(graph[name]):
                visit(callee, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())
    return cycles


def _readable(mangled: str) -> str:
    """The last name of _ZN5outer4nameE...; good enough to find the function."""
    names, i = [], 0
    while match := re.compile(r"\d+").search(mangled, i):
        length, start = int(match[0]), match.end()
        names.append(mangled[start : start + length])
        i = start + length
        if i >= len(mangled) or not mangled[i].isdigit():
            break
    return names[-1] if names else mangled


def threadgroup_bytes(source: str, instantiations: Sequence[str]) -> dict[str, int]:
    """Bytes of threadgroup variables of each kernel; of templates, for each instantiation.

    The declarations are copied into functions that the engine evaluates, so that this holds for
    code that is never reached as well.
    """
    text = Text(source)
    functions, calls = [], []
    for name, begin, end in text.bodies:
        if text.is_kernel(name):
            kernel = text.word(name)
            head, sizes = _footprint(text, name, begin, end)
            functions.append(f"{head} constexpr int {kernel}_bytes() {{ {sizes} }}\n")
            if not head:
                calls.append((kernel, f"{kernel}_bytes()"))
            for line in instantiations:
                found = re.search(rf'host_name\("(\w+)"\).*\) {kernel}(<.*>);', line)
                if found:
                    calls.append((found[1], f"{kernel}_bytes{found[2]}()"))
    if not calls:
        return {}
    body = " ".join(f"out[{i}] = {call};" for i, (_, call) in enumerate(calls))
    measure = f"kernel void measure(device int* out [[buffer(0)]]) {{ {body} }}\n"
    library = engine.compile(source + "\n" + "".join(functions) + measure, only=("measure",))
    out = np.zeros(len(calls), np.int32)
    arrays.launch(library, "measure", (1, 1, 1), (1, 1, 1), {0: out})
    return {name: int(size) for (name, _), size in zip(calls, out)}


def _footprint(text: Text, name: int, begin: int, end: int) -> tuple[str, str]:
    """The template head of a kernel, and a body that returns the bytes of its variables."""
    j = name
    while j > 0 and not text.tokens[j - 1].is_op(";", "{", "}"):
        j -= 1
    head = ""
    if text.word(j) == "template":
        head = text.stream.source(j, text.stream.angle_close(j + 1) + 1)
    constants, sizes = [], ["0"]
    i = begin + 1
    while i < end:
        stop = i
        while stop < end and not text.tokens[stop].is_op(";", "{"):
            stop = text.stream.closing.get(stop, stop) + 1
        words = [text.word(k) for k in range(i, min(i + 3, stop))]
        is_constant = words[:1] == ["const"] and words[1:2] and words[1] in ("int", "short", "uint")
        if words[:1] == ["using"] or is_constant:
            constants.append(text.stream.source(i, stop) + ";")
        elif words[:1] == ["threadgroup"] and vocabulary.declares_variable(text, i):
            kind = text.word(i + 1)
            for a, b in text.stream.split_commas(i + 2, stop):
                sizes.append(f"(sizeof({kind}{text.stream.source(a + 1, b)}) + 15) / 16 * 16")
        i = text.stream.closing.get(stop, stop) + 1
    needed = constants if len(sizes) > 1 else []
    return head, f"{' '.join(_constant_only(needed))} return {' + '.join(sizes)};"


def _constant_only(declarations: Sequence[str]) -> list[str]:
    """The declarations of compile-time constants, which use template parameters and each other."""
    return [d for d in declarations if re.match(r"const \w+ (k[A-Z]\w*|[A-Z]+) =|using \w+ =", d)]
