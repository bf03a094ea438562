"""Literals, strings and vector constructors."""

import re

from ..lexer import TokenStream
from ..vocabulary import SCALARS, VECTORS

_HALF_INTEGER = re.compile(r"[0-9]+[hH]")
_STATEMENT_WORDS = {"return", "else", "case", "do"}


def rewrite_literals(stream: TokenStream) -> None:
    """Metal has no double: ``1.0`` is a float.  ``1.0h`` and ``1.0bf`` are unknown to C++."""
    for token in stream.tokens:
        if token.kind != "number":
            continue
        text = token.text
        if _HALF_INTEGER.fullmatch(text):
            token.text = f"((half){text[:-1]})"
        elif text[:2].lower() == "0x" or not re.search(r"[.eE]", text):
            continue
        elif text[-1] in "hH":
            token.text = f"((half){text[:-1]}f)"
        elif text.endswith(("bf", "BF")):
            token.text = f"((bfloat){text[:-2]}f)"
        elif text[-1] not in "fFlL":
            token.text = text + "f"


def rewrite_strings(stream: TokenStream) -> None:
    """``"text"`` and ``__func__`` lie in constant memory: ``((constant char*)"text")``.

    Not where the language wants a literal: in attributes, linkage, static_assert and as the
    initialiser of an array.
    """
    i = 0
    while stream[i].kind != "end":
        attribute = stream.attribute(i)
        if attribute:
            i = attribute[0] + 1
        elif stream[i].text in ("static_assert", "_Static_assert", "extern"):
            i = stream.closing.get(i + 1, i + 1) + 1
        elif _is_string(stream, i):
            last = i
            while _is_string(stream, last + 1):
                last += 1
            if not (stream[i - 1].is_op("=") and stream[i - 2].is_op("]")):
                stream.insert_before(i, "((constant char*)")
                stream.insert_after(last, ")")
            i = last + 1
        else:
            i += 1


def _is_string(stream: TokenStream, i: int) -> bool:
    token = stream[i]
    return token.text == "__func__" or (token.kind == "string" and token.text[0] == '"')


def rewrite_constructors(stream: TokenStream) -> None:
    """``float4(a, b)`` becomes ``::msl::construct<float4>(a, b)``.

    clang's C++ constructs its extended vectors from one value only.  A template parameter or an
    alias may stand for a vector type, so ``T(a, b)`` is rewritten as well; construct() passes the
    arguments through if T turns out to be something else.
    """
    aliases = _type_names(stream)
    for i, token in enumerate(stream.tokens):
        if token.kind != "word":
            continue
        if token.text == "vec":
            _rewrite_vec(stream, i)
        elif token.text in VECTORS or token.text in aliases:
            _rewrite_named(stream, i)


def _type_names(stream: TokenStream) -> set[str]:
    """Template type parameters and aliases."""
    names = set()
    tokens = stream.tokens
    for i, token in enumerate(tokens[:-2]):
        if token.kind != "word" or tokens[i + 1].kind != "word":
            continue
        follows = tokens[i + 2]
        is_parameter = token.text in ("typename", "class") and follows.is_op(",", ">", "=")
        is_alias = token.text == "using" and follows.is_op("=")
        if is_parameter or is_alias:
            names.add(tokens[i + 1].text)
    return names


def _rewrite_named(stream: TokenStream, i: int) -> None:
    token, before = stream[i], stream[i - 1]
    if stream[i + 1].kind == "word" and stream[i + 2].is_op("("):
        _rewrite_initializer(stream, i)
        return
    if not stream[i + 1].is_op("("):
        return
    end = stream.closing[i + 1]
    if stream[i + 2].is_op("&", "*") and stream[end + 1].is_op("[", "("):
        return  # a declarator: float4 (&x)[3]
    if before.kind == "word" and before.text not in _STATEMENT_WORDS:
        return  # a declaration: const float4 (...)
    is_vector = token.text in VECTORS
    if before.is_op(">", ".", "->", "::", "~") and not is_vector:
        return
    arguments = len(stream.split_commas(i + 2, end))
    if arguments >= (1 if is_vector else 2):
        token.text = f"::msl::construct<{token.text}>"


def _rewrite_initializer(stream: TokenStream, i: int) -> None:
    """``float4 v(a, b);`` becomes ``float4 v = ::msl::construct<float4>(a, b);``."""
    end = stream.closing[i + 2]
    arguments = stream.split_commas(i + 3, end)
    if len(arguments) < 2 or not stream[end + 1].is_op(";", ","):
        return
    if any(_is_parameter(stream, begin, stop) for begin, stop in arguments):
        return  # the declaration of a function
    stream.insert_after(i + 1, f" = ::msl::construct<{stream[i].text}>")


def _is_parameter(stream: TokenStream, begin: int, stop: int) -> bool:
    """Whether a function parameter is declared there, rather than an argument given."""
    first, second = stream[begin], stream[begin + 1]
    if begin + 1 < stop and first.kind == second.kind == "word":
        return True
    is_type = first.text in VECTORS or first.text in SCALARS
    return is_type and not second.is_op("(", "{")


def _rewrite_vec(stream: TokenStream, i: int) -> None:
    """``vec<T, N>(...)`` and ``metal::vec<T, N>(...)``."""
    if not stream[i + 1].is_op("<"):
        return
    end = stream.angle_close(i + 1)
    if end == i + 1 or not stream[end + 1].is_op("(") or stream[end + 2].is_op(")"):
        return
    first = i
    while stream[first - 1].is_op("::") or stream[first - 1].text == "metal":
        first -= 1
    before = stream[first - 1]
    if (
        before.is_op(*"=(,+-*/?:{;<>[!&|", "==", "+=", "*=", "-=")
        or before.text in _STATEMENT_WORDS
    ):
        stream.remove(first, i)
        stream[i].text = "::msl::construct<metal::vec"
        stream[end].text = ">>"
