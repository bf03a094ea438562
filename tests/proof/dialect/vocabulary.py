"""The words and idioms of the Metal sources in PyTorch's wheel: Apple's compiler takes them daily.

Nothing is listed here: words come from the wheel's text, and an idiom is a function that finds
instances of something in a text, in ours and in the wheel's alike. What ours have and the wheel
does not is a finding.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from simulator.engine import compiler
from simulator.engine.vocabulary import SCALARS, VECTORS

from .text import Text, balanced

TORCH = Path(torch.__file__).parent
HEADERS = (TORCH / "include/ATen/native/mps/kernels", TORCH / "include/c10/metal")
GENERATORS = (
    TORCH / "_inductor/codegen/mps.py",
    TORCH / "_inductor/codegen/metal_flex_attention_template.py",
)
_CASTS = ("static_cast", "reinterpret_cast", "const_cast", "dynamic_cast")
_SPACES = ("device", "threadgroup", "constant", "thread")
Idiom = Callable[[Text], Iterator[tuple[int, str]]]
IDIOMS: list[Idiom] = []


def headers() -> list[Path]:
    return sorted(path for folder in HEADERS for path in folder.glob("*.h"))


@functools.cache
def wheel() -> tuple[Text, ...]:
    """The wheel's headers, with and without macros, and the strings of its code generators."""
    texts = [path.read_text() for path in headers()]
    texts += [expanded(path) for path in headers()]
    for path in GENERATORS:
        texts += _strings(path.read_text()) if path.exists() else []
    return tuple(Text(balanced(text)) for text in texts)


def expanded(header: Path) -> str:
    """A header with macros expanded, without those that it includes."""
    source = f'#include "{header}"\n'
    text = compiler.preprocess(source, (str(TORCH / "include"),), ())
    inside, lines = False, []
    for line in text.split("\n"):
        marker = re.match(r'# \d+ "(.*?)"', line)
        if marker:
            inside = marker[1] == str(header)
        elif inside:
            lines.append(line)
    return "\n".join(lines)


def _strings(python: str) -> list[str]:
    """String literals of a Python file but for docstrings; an f-string's value is a name."""
    found = []
    tree = ast.parse(python)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    skipped = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [
                str(p.value) if isinstance(p, ast.Constant) else "placeholder" for p in node.values
            ]
            found.append("".join(parts))
            skipped |= {id(p) for p in node.values}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in skipped
        ):
            found.append(node.value)
    return found


@functools.cache
def words() -> frozenset[str]:
    return frozenset().union(*(text.words() | text.macros for text in wheel()))


@functools.cache
def idioms() -> frozenset[str]:
    return frozenset(name for text in wheel() for name in idioms_of(text))


def idioms_of(text: Text) -> dict[str, int]:
    """The instances that the idioms find in a text, with the first place of each, or -1 for a
    directive."""
    found: dict[str, int] = {}
    for idiom in IDIOMS:
        for i, name in idiom(text):
            found.setdefault(name, i)
    return found


def idiom(function: Idiom) -> Idiom:
    IDIOMS.append(function)
    return function


def _is_type(word: str) -> bool:
    return word in SCALARS or word in VECTORS


@idiom
def directives(text: Text) -> Iterator[tuple[int, str]]:
    for name, argument in text.directives:
        if name == "include" and argument.startswith("<metal_"):
            yield -1, f"#include {argument}"
        elif name == "pragma":
            yield -1, f"pragma {' '.join(argument.split())}"
        elif name != "include":
            yield -1, f"#{name}"
    for i, token in enumerate(text.tokens):
        if token.text == "_Pragma":
            yield i, f"pragma {text.word(i + 2).strip(chr(34))}"


@idiom
def attributes(text: Text) -> Iterator[tuple[int, str]]:
    """Each attribute, and the type of the kernel parameter that carries it."""
    for first, last in text.attributes:
        depth = 0
        for i in range(first + 2, last - 1):
            depth += text.tokens[i].is_op("(") - text.tokens[i].is_op(")")
            if depth or text.tokens[i].kind != "word":
                continue
            name = text.word(i)
            yield i, f"attribute [[{name}]]"
            if _is_type(text.word(first - 2)) and text.word(last + 1) in ",)":
                yield i, f"{text.word(first - 2)} parameter [[{name}]]"


@idiom
def keywords(text: Text) -> Iterator[tuple[int, str]]:
    """Kinds of types and declarations."""
    for i, token in enumerate(text.tokens):
        after = text.word(i + 1)
        if token.text in ("union", "enum", "class", "operator", "switch", "goto", "auto", "friend"):
            before = text.word(i - 1)
            yield i, "enum class" if before == "enum" else token.text
        elif token.text in ("if", "else") and after == "constexpr":
            yield i, "if constexpr"
        elif token.text == "inline" and text.word(i - 1) in ("constant", "constexpr", "static"):
            yield i, f"{text.word(i - 1)} inline"


@idiom
def lambdas(text: Text) -> Iterator[tuple[int, str]]:
    for i, token in enumerate(text.tokens):
        before = text.tokens[i - 1]
        is_subscript = before.kind in ("word", "number") and before.text != "return"
        if token.is_op("[") and i and not (is_subscript or before.is_op("]", ")", "[", ">")):
            end = text.stream.closing[i]
            if text.word(i + 1) != "[" and text.word(end + 1) in ("(", "{"):
                yield i, "lambda"


@idiom
def members(text: Text) -> Iterator[tuple[int, str]]:
    """Static constants, member functions and member templates of structs."""
    for start, end in text.stream.closing.items():
        if text.word(start) != "{" or "struct" not in (text.word(start - 2), text.word(start - 1)):
            continue
        i = start + 1
        while i < end:
            token = text.tokens[i]
            if token.text == "template" and text.word(i + 1) == "<":
                yield i, "member template"
            elif token.text == "static":
                j = i + 1
                while text.word(j) in ("constant", "constexpr", "const", "inline", "METAL_FUNC"):
                    j += 1
                if text.tokens[j + 2].is_op("("):
                    yield i, "static member function"
                else:
                    spaces = [text.word(k) for k in range(i, j) if text.word(k) != "const"]
                    yield i, f"{' '.join(spaces)} member"
            elif token.is_op(")") and text.word(i + 1) == "const":
                yield i, "const member function"
            i = text.stream.closing.get(i, i) + 1 if token.is_op("{") else i + 1


@idiom
def casts(text: Text) -> Iterator[tuple[int, str]]:
    for i, token in enumerate(text.tokens[:-3]):
        if token.is_op("(") and text.word(i + 2) == ")" and _is_type(text.word(i + 1)):
            after = text.tokens[i + 3]
            if after.kind in ("word", "number") or after.is_op("("):
                yield i, "C-style cast"
        elif token.is_op("(") and i in text.stream.closing and i + 2 < text.stream.closing[i]:
            last = text.stream.closing[i] - 1
            space = {text.word(j) for j in range(i + 1, last)} & {*_SPACES}
            declared = text.tokens[i - 1].kind == "word" and text.word(i - 1) != "return"
            if text.word(last) == "*" and space and not declared:
                yield i, f"C-style cast to {space.pop()} *"
        if token.text in _CASTS and text.word(i + 1) == "<":
            inside = []
            j, depth = i + 1, 0
            while True:
                depth += text.tokens[j].is_op("<") - text.tokens[j].is_op(">")
                if depth == 0 or text.tokens[j].kind == "end":
                    break
                inside.append(text.word(j))
                j += 1
            space = [w for w in inside if w in _SPACES]
            if token.text == "reinterpret_cast" and inside[-1] in "*&":
                yield i, f"reinterpret_cast to {' '.join(space)} {inside[-1]}"
            else:
                yield i, token.text


@idiom
def swizzles(text: Text) -> Iterator[tuple[int, str]]:
    for i, token in enumerate(text.tokens):
        if token.is_op(".") and re.fullmatch(r"[xyzw]{2,4}|[rgba]{2,4}", text.word(i + 1)):
            assigned = text.tokens[i + 2].is_op("=")
            yield i + 1, f"swizzle of {len(text.word(i + 1))}{' assigned' if assigned else ''}"


@idiom
def variables(text: Text) -> Iterator[tuple[int, str]]:
    """Where variables of an address space are declared, and what arrays are made of."""
    inside = {i for _, a, b in text.bodies for i in range(a, b + 1)}
    for i, token in enumerate(text.tokens[:-4]):
        before = text.tokens[i - 1] if i else None
        starts = before is None or before.is_op(";", "{", "}") or before.text == "static"
        if token.text == "constant" and starts and i not in inside and text.word(i - 1) != "static":
            if declares_variable(text, i):
                yield i, "program-scope constant"
        elif token.text == "threadgroup" and starts and i in inside and declares_variable(text, i):
            end = text.stream.statement_end(i)
            yield i, f"threadgroup {'array' if text.word(end - 1) == ']' else 'variable'}"
        elif token.is_op("=") and text.word(i + 1) == "{" and text.word(i - 1) == "]":
            yield i, "array with initialisers"


def declares_variable(text: Text, i: int) -> bool:
    """Whether what starts with an address space at i is a variable, not a pointer to there."""
    j = i
    while not text.tokens[j].is_op(";", "=", "[", "(", "*", "&"):
        if text.tokens[j].kind == "end":
            return False
        j += 1
    return text.tokens[j].is_op(";", "=", "[")


@idiom
def templates(text: Text) -> Iterator[tuple[int, str]]:
    """Kinds of template parameters, specialisations, explicit instantiations of kernels."""
    for i, token in enumerate(text.tokens[:-2]):
        if token.text != "template":
            continue
        if text.word(i + 1) == "[":
            names = {
                text.word(k)
                for a, b in text.attributes
                if a >= i + 1
                for k in range(a, b)
                if a <= i + 24
            }
            end = next(
                j
                for j in range(i, len(text.tokens))
                if text.tokens[j].is_op(";") or text.tokens[j].kind == "end"
            )
            body = {text.word(k) for k in range(i, end)}
            if "host_name" in names:
                yield i, f"instantiation by {'decltype' if 'decltype' in body else 'signature'}"
        elif text.word(i + 1) == "<":
            close = text.stream.angle_close(i + 1)
            if close == i + 2:
                yield i, "specialisation"
            for begin, _ in text.stream.split_commas(i + 2, close):
                kind = text.word(begin)
                yield begin, f"template parameter {'typename' if kind == 'class' else kind}"


@idiom
def literals(text: Text) -> Iterator[tuple[int, str]]:
    for i, token in enumerate(text.tokens):
        if token.kind == "number":
            match = re.fullmatch(
                r"(0[xX][0-9a-fA-F]+|0[bB][01]+|[0-9.]+(?:[eE][+-]?\d+)?)(\w*)", token.text
            )
            base = "hexadecimal" if token.text[:2] in ("0x", "0X") else "decimal"
            base = "binary" if token.text[:2] in ("0b", "0B") else base
            yield i, f"{base} literal with suffix '{match[2] if match else token.text}'"
            if "'" in token.text:
                yield i, "digit separator"


@idiom
def matrices(text: Text) -> Iterator[tuple[int, str]]:
    for i, token in enumerate(text.tokens):
        if token.text == "simdgroup_matrix" and text.word(i + 1) == "<":
            kind = text.word(i + 2) if _is_type(text.word(i + 2)) else "a parameter"
            yield i, f"simdgroup_matrix of {kind}"
