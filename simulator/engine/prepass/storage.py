"""Declarations that involve an address space and that clang's C++ refuses."""

from ..lexer import TokenStream


class VariableNumbers:
    """Numbers the threadgroup variables of a program."""

    def __init__(self) -> None:
        self.next = 0

    def take(self) -> int:
        self.next += 1
        return self.next


def rewrite_local(stream: TokenStream, i: int, numbers: VariableNumbers) -> bool:
    """``threadgroup T name[dims];`` in a kernel: the backend supplies the storage.

    It becomes a typedef of the variable's type and MSL_THREADGROUP_VARIABLE, one for each
    declarator.  An initialiser has no effect on threadgroup memory and is dropped.  Returns False
    for anything else.
    """
    if not (i == 0 or stream[i - 1].is_op(";", "{", "}", ":")):
        return False
    end = _variable_end(stream, i)
    if end is None:
        return False
    declarations = []
    for begin, stop in stream.split_commas(i + 1, end):
        equals = next((j for j in range(begin, stop) if stream[j].is_op("=")), stop)
        stream.remove(equals, stop)
        name = equals - 1
        while stream[name].is_op("]"):
            name = stream.opening[name] - 1
        variable = stream[name].text
        stream[name].text = f"msl_type_of_{variable}"
        declarations.append(f" MSL_THREADGROUP_VARIABLE({variable}, {numbers.take()});")
    stream.insert_before(i, "typedef ")
    stream.insert_after(end, "".join(declarations))
    return True


def _variable_end(stream: TokenStream, i: int) -> int | None:
    """The ``;`` of a variable declaration; None for pointers, references and functions."""
    j = i
    while not stream[j].is_op(";"):
        if stream[j].is_op("*", "&", "(", "{") or stream[j].kind == "end":
            return None
        if stream[j].is_op("="):
            return stream.statement_end(j)
        j = stream.closing.get(j, j) + 1
    return j


def rewrite_array_parameter(stream: TokenStream, i: int) -> None:
    """``f(constant const int s[3])`` becomes ``f(constant const int *s)``.

    C++ would do the same adjustment, but it loses the address space on the way.
    """
    before = i - 1
    while stream[before].text == "const":
        before -= 1
    if not stream[before].is_op("(", ","):
        return
    name = bracket = None
    angles = 0
    j = i + 1
    while j < i + 80:
        token = stream[j]
        if token.kind == "end":
            return
        if token.kind == "op":
            if token.text in "<>":
                angles += 1 if token.text == "<" else -1
            elif angles:
                pass
            elif stream.attribute(j):
                j = stream.closing[j]
            elif token.text == "[" and name is not None:
                bracket = j
                j = stream.closing[j]
            elif token.text in ",)":
                break
            elif token.text != "::":
                return
        elif token.kind == "word" and bracket is None:
            name = j
        j += 1
    else:
        return
    if bracket is not None:
        stream.remove(bracket, stream.closing[bracket] + 1)
        stream[name].text = "*" + stream[name].text


def drop_qualified_method(stream: TokenStream, i: int) -> int | None:
    """``T f(...) const device {...}``: a member function for objects in device memory.

    clang's C++ has no such overloads, so it is dropped; a program that calls it does not compile.
    Returns the index behind the function, or None if i is something else.
    """
    close = i - 1
    while stream[close].text in ("const", "volatile"):
        close -= 1
    if close < 0 or not stream[close].is_op(")") or not stream[i + 1].is_op("{", ";", ":"):
        return None
    body = i + 1
    while not stream[body].is_op("{", ";"):
        body = stream.closing.get(body, body) + 1
    end = stream.closing.get(body, body)
    begin = stream.opening[close]
    while not stream[begin - 1].is_op(";", "{", "}", ":"):
        begin -= 1
        begin = stream.opening.get(begin, begin)
    stream.remove(begin, end + 1)
    for token in stream.tokens[begin : end + 1]:
        token.before = token.after = ""
    return end + 1
