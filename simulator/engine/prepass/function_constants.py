"""``constant T name [[function_constant(i)]];`` becomes a constexpr with the value given at compile
time.  Metal specialises a pipeline the same way."""

import re

from ..lexer import TokenStream

_ATTRIBUTE = re.compile(r"\s*function_constant\s*\((.*)\)\s*")
_QUALIFIERS = ("constant", "const", "constexpr", "static")


def index(body: str) -> int | None:
    """The number in a function_constant attribute."""
    m = _ATTRIBUTE.fullmatch(body)
    return int(m[1], 0) if m else None


def rewrite(stream: TokenStream, i: int, end: int, number: int, values: dict[str, object]) -> int:
    """The attribute spans i..end.  A constant without a value is zero and "not defined"."""
    name = stream[i - 1].text
    begin = i - 1
    while begin > 0 and not stream[begin - 1].is_op(";", "{", "}"):
        begin -= 1
    type_ = " ".join(t.text for t in stream.tokens[begin : i - 1] if t.text not in _QUALIFIERS)
    value = values.get(name, values.get(str(number)))
    last = stream.statement_end(end)
    stream.remove(begin, last + 1)
    stream.insert_after(
        last,
        f" static constexpr bool msl_defined_{name} = {_literal(value is not None)};"
        f" static constexpr constant {type_} {name} = ({type_})({_literal(value or 0)});",
    )
    return last + 1


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return value.hex() + "f"
    return str(value)
