"""Rules of the Metal Shading Language that plain C++ does not have.

clang compiles the program as C++20, so anything C++ allows and Metal does not has to be found here.
Every finding is an error.  PyTorch's own Metal headers are free of findings (tested).
"""

from .errors import CompileError
from .lexer import TokenStream
from .vocabulary import SCALARS, VECTORS

_STAGES = ("vertex", "fragment")
_FORBIDDEN = {
    "double": "Metal has no double",
    "new": "Metal has no new",
    "delete": "Metal has no delete",
    "throw": "Metal has no exceptions",
    "try": "Metal has no exceptions",
    "catch": "Metal has no exceptions",
    "virtual": "Metal has no virtual functions",
    "dynamic_cast": "Metal has no run-time type information",
    "typeid": "Metal has no run-time type information",
    "goto": "Metal has no goto",
    "thread_local": "Metal has no thread_local",
    "asm": "Metal has no asm",
    # Function qualifiers are keywords of Metal, so not even a member may have such a name.
    **dict.fromkeys(_STAGES, "a keyword of Metal: no name, and only kernels are executed here"),
    **dict.fromkeys(
        ["concept", "requires", "consteval", "constinit", "co_await", "co_yield", "co_return"],
        "Metal is C++17 at most",
    ),
}
_SPACES = {"device", "threadgroup", "constant", "thread"}
_NOT_A_DECLARATION = {"using", "typedef"}


def check_characters(source: str) -> None:
    """PyTorch hands sources to Metal as ASCII; anything else is lost on the way."""
    if source.isascii():
        return
    for number, line in enumerate(source.split("\n"), 1):
        if not line.isascii():
            found = next(c for c in line if not c.isascii())
            raise CompileError(f"program_source:{number}: error: character {found!r} is not ASCII")


def check(stream: TokenStream) -> None:
    findings = [*_forbidden_words(stream), *_bare_pointers(stream)]
    if findings:
        lines = [f"{stream.location(i)}: error: {message}" for i, message in sorted(findings)]
        raise CompileError("\n".join(dict.fromkeys(lines)))


def _forbidden_words(stream: TokenStream):
    for i, token in enumerate(stream.tokens):
        message = _FORBIDDEN.get(token.text)
        if message and token.kind == "word":
            before = stream[i - 1] if i else token
            is_deleted_function = token.text == "delete" and before.is_op("=")
            is_member = before.is_op(".", "->", "::") and token.text not in _STAGES
            if not is_deleted_function and not is_member:
                yield i, message
        elif token.kind == "number" and token.text[-1:] in "lL" and _is_floating(token.text):
            yield i, "Metal has no long double"


def _is_floating(number: str) -> bool:
    return not number.lower().startswith("0x") and ("." in number or "e" in number.lower())


def _bare_pointers(stream: TokenStream):
    """``T* name`` and ``T& name`` without an address space; T is a built-in or declared type."""
    declared = _declared_types(stream)
    templates = _template_parameters(stream)
    tokens = stream.tokens
    for i in range(len(tokens) - 3):
        token = tokens[i]
        if token.kind != "word" or not tokens[i + 1].is_op("*", "&"):
            continue
        text = token.text
        if text not in SCALARS and text not in VECTORS and text not in declared:
            if text not in templates:
                continue
            before = tokens[i - 1]  # "a T & b" may be an expression; these cannot
            if not (before.is_op("(", ",", ";", "{", "}") or before.text == "const"):
                continue
        if tokens[i + 2].kind != "word" or not tokens[i + 3].is_op(",", ")", "=", ";", "["):
            continue
        words = {t.text for t in tokens[_declaration_start(stream, i) : i + 3]}
        if not words & _SPACES and not words & _NOT_A_DECLARATION:
            kind = "pointer" if tokens[i + 1].text == "*" else "reference"
            yield i, f"{kind} '{tokens[i + 2].text}' has no address space"


def _declaration_start(stream: TokenStream, i: int) -> int:
    start = i
    while start > 0 and i - start < 12 and not stream[start - 1].is_op(";", "{", "}", "(", ","):
        start -= 1
    return start


def _declared_types(stream: TokenStream) -> set[str]:
    return {
        stream[i + 1].text
        for i, token in enumerate(stream.tokens[:-2])
        if token.text in ("struct", "union", "enum")
        and stream[i + 1].kind == "word"
        and stream[i + 2].is_op("{", ":", ";")
    }


def _template_parameters(stream: TokenStream) -> set[str]:
    return {
        stream[i + 1].text
        for i, token in enumerate(stream.tokens[:-1])
        if token.text in ("typename", "class") and stream[i + 1].kind == "word"
    }
