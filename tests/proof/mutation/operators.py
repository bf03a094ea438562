"""Mutation operators: each proposes small changes of a text that a test should notice.

An operator is a function from Code to edits; an edit replaces the tokens [begin, end).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from .sites import ASSIGNMENTS, Code


class Edit(NamedTuple):
    begin: int
    end: int
    text: str


Operator = Callable[[Code], Iterator[Edit]]
OPERATORS: dict[str, Operator] = {}

_RELATIONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
_OTHER_BOUND = {"<": "- 1", "<=": "+ 1", ">": "+ 1", ">=": "- 1"}
_ARITHMETIC = {
    "+": "-", "-": "+", "*": "+", "/": "*", "%": "/",
    "&": "|", "|": "&", "^": "&", "<<": ">>", ">>": "<<",
}  # fmt: skip
_ASSIGNMENTS = {"+=": ("-=", "="), "-=": ("+=", "="), "*=": ("+=", "="), "|=": ("&=", "=")}
_COMMUTATIVE_CALLS = {"min", "max", "mulhi", "float2", "vec"}
_SWAPS = [  # words that can stand for each other, wherever they stand
    ("pair", "transposed"), ("mma_ABt", "mma_AB"), ("min", "max"), ("row_max", "row_sum"),
    ("q_len", "kv_len"), ("num_heads", "num_kv_heads"), ("query_heads", "kv_heads"),
    ("window_left", "window_right"), ("left", "right"), ("keeps_first", "keeps_second"),
    ("k", "v"), ("k_rows", "v_rows"), ("queries", "gradients"), ("keys", "values"),
    ("dk", "dv"), ("dk_sum", "dv_sum"), ("scored", "summed"), ("out_rows", "dout_rows"),
    ("query_rows", "key_rows"), ("query_output", "key_output"), ("seeing_rows", "seen_keys"),
    ("key_blocks", "query_blocks"), ("unmasked_keys", "unmasked_rows"),
    ("scale", "scale_log2"), ("origin", "log_sum"), ("head", "kv_head"),
    ("row0", "group_row0"), ("key0", "group_key0"), ("row1", "key1"), ("key_begin", "key_end"),
    ("row_stride", "col_stride"), ("ROWS", "COLS"), ("begin", "end"), ("first", "last"),
    ("first", "second"), ("sizes", "strides"), ("kRowStep", "kColStep"),
    ("row_block", "col_block"), ("row_pair", "col_pair"), ("kVec", "kDropout"),
    ("exp2", "exp"), ("log", "log2"), ("nearbyint", "floor"), ("by_24", "by_5"),
    ("heads", "blocks"),
]  # fmt: skip
_MEMBER_SWAPS = [
    ("row", "col"), ("x", "y"), ("z", "w"), ("xy", "zw"), ("q", "k"), ("q", "dout"),
    ("batch", "head"), ("r", "bk"), ("bq", "simdgroups"), ("dq", "dq_from_ds"),
    ("torch", "metal"), ("metal", "operand"), ("tile_elements", "sum_elements"),
]  # fmt: skip
_STATEMENT_ENDS = (";", "{", "}")


def operator(function: Operator) -> Operator:
    OPERATORS[function.__name__] = function
    return function


def _tokens(code: Code) -> Iterator[int]:
    return (i for i in range(1, len(code) - 1) if not code.skipped[i])


def _binary(code: Code, *words: str) -> Iterator[int]:
    return (i for i in _tokens(code) if code.words[i] in words and code.is_binary(i))


def _operands(code: Code, i: int) -> tuple[int, int]:
    return code.operand_begin(i), code.operand_end(i)


# ---- comparisons and conditions


@operator
def relation(code: Code) -> Iterator[Edit]:
    """< to <=, == to !=, ..."""
    for i in _binary(code, *_RELATIONS):
        yield Edit(i, i + 1, _RELATIONS[code.words[i]])


@operator
def bound(code: Code) -> Iterator[Edit]:
    """A comparison's bound shifted by one, the other way than `relation` does."""
    for i in _binary(code, *_OTHER_BOUND):
        end = code.operand_end(i)
        yield Edit(i + 1, end, f"({code.text(i + 1, end)}) {_OTHER_BOUND[code.words[i]]}")


@operator
def connective(code: Code) -> Iterator[Edit]:
    """&& to ||."""
    for i in _binary(code, "&&", "||"):
        yield Edit(i, i + 1, {"&&": "||", "||": "&&"}[code.words[i]])


@operator
def condition(code: Code) -> Iterator[Edit]:
    """The condition of if and ?: always true, always false."""
    for i in _tokens(code):
        if code.words[i] == "if":
            begin, end = i + 2, code.partner[i + 1]
        elif code.words[i] == "?":
            begin, end = code.operand_begin(i, 0), i
        else:
            continue
        yield Edit(begin, end, "true")
        yield Edit(begin, end, "false")


@operator
def negation(code: Code) -> Iterator[Edit]:
    """A unary ! or - dropped."""
    for i in _tokens(code):
        if code.words[i] in ("!", "-") and not code.is_binary(i):
            yield Edit(i, i + 1, "")


# ---- arithmetic


@operator
def arithmetic(code: Code) -> Iterator[Edit]:
    """+ to -, * to +, ..."""
    for i in _binary(code, *_ARITHMETIC):
        if code.kinds[i - 1] != "string" and code.kinds[i + 1] != "string":
            yield Edit(i, i + 1, _ARITHMETIC[code.words[i]])


@operator
def drop_operand(code: Code) -> Iterator[Edit]:
    """One side of a binary operator: a guard, a term, a factor, an offset."""
    for i in _binary(code, "&&", "||", *_ARITHMETIC):
        begin, end = _operands(code, i)
        yield Edit(begin, end, code.text(begin, i))
        if code.words[i] not in ("/", "%", "<<", ">>"):
            yield Edit(begin, end, code.text(i + 1, end))


@operator
def swap_operands(code: Code) -> Iterator[Edit]:
    """a - b to b - a."""
    for i in _binary(code, "-", "/", "%"):
        begin, end = _operands(code, i)
        left, right = code.text(begin, i), code.text(i + 1, end)
        yield Edit(begin, end, f"({right}) {code.words[i]} ({left})")


@operator
def assignment(code: Code) -> Iterator[Edit]:
    """+= to -= and to =."""
    for i in _tokens(code):
        for other in _ASSIGNMENTS.get(code.words[i], ()):
            yield Edit(i, i + 1, other)


@operator
def step(code: Code) -> Iterator[Edit]:
    """A loop that takes every other element."""
    for i in _tokens(code):
        if code.words[i] == "++":
            yield Edit(i, i + 1, " += 2")


@operator
def index(code: Code) -> Iterator[Edit]:
    """A subscript shifted by one."""
    for i in _tokens(code):
        if code.words[i] != "[" or code.words[i + 1] == "[" or _declares_array(code, i):
            continue
        end = code.partner[i]
        if code.kinds[i - 1] != "word" and code.words[i - 1] not in "])":
            continue  # a lambda
        if end == i + 2 and code.kinds[i + 1] == "number":
            continue  # `literal` does it
        for shift in ("+ 1", "- 1"):
            yield Edit(i + 1, end, f"({code.text(i + 1, end)}) {shift}")


def _declares_array(code: Code, i: int) -> bool:
    name = i - 1
    while code.words[name] == "]":
        name = code.partner[name] - 1
    return (code.kinds[name - 1] == "word" and code.words[name - 1] != "return") or (
        code.words[name - 1] == ">" and name - 1 in code.partner
    )


@operator
def literal(code: Code) -> Iterator[Edit]:
    """Numbers one more and one less, floats doubled, zeros and ones exchanged; texts emptied."""
    for i in _tokens(code):
        word = code.words[i]
        if code.kinds[i] == "string" and word.startswith('"') and len(word) > 2:
            yield Edit(i, i + 1, '""')
        if word in ("true", "false"):
            yield Edit(i, i + 1, {"true": "false", "false": "true"}[word])
        if code.kinds[i] != "number":
            continue
        whole = re.fullmatch(r"(0x[0-9A-Fa-f]+|\d+)(u?)", word)
        if not whole:
            suffix = "f" if word.endswith("f") else ""
            value = float(word.removesuffix("f"))
            yield Edit(i, i + 1, "1.0" + suffix if value == 0 else f"{2 * value!r}{suffix}")
            yield Edit(i, i + 1, "-1.0" + suffix if value == 0 else "0.0" + suffix)
            continue
        value = int(whole[1], 0)
        yield Edit(i, i + 1, f"{value + 1}{whole[2]}")
        if value > 0:
            yield Edit(i, i + 1, f"{value - 1}{whole[2]}")


# ---- words


@operator
def word(code: Code) -> Iterator[Edit]:
    """A name exchanged for its counterpart: row and col, key and value, left and right, ..."""
    for i in _tokens(code):
        if code.kinds[i] != "word" or not code.functions[i]:
            continue
        pairs = [*_SWAPS, *(_MEMBER_SWAPS if code.words[i - 1] == "." else ())]
        for a, b in pairs:
            if code.words[i] == a:
                yield Edit(i, i + 1, b)
            elif code.words[i] == b:
                yield Edit(i, i + 1, a)


@operator
def narrow(code: Code) -> Iterator[Edit]:
    """64-bit integers become 32-bit ones."""
    for i in _tokens(code):
        if code.words[i] == "int64_t":
            yield Edit(i, i + 1, "int32_t")


@operator
def swap_arguments(code: Code) -> Iterator[Edit]:
    """f(a, b) to f(b, a), neighbours only."""
    for i in _tokens(code):
        if code.words[i] != "(" or not code.functions[i]:
            continue
        name = i - 1
        if code.words[name] == ">" and name in code.partner:
            name = code.partner[name] - 1
        if code.kinds[name] != "word" or code.words[name] in {"if", "for", *_COMMUTATIVE_CALLS}:
            continue
        parts = _arguments(code, i)
        for (a, b), (c, d) in itertools.pairwise(parts):
            if code.text(a, b) != code.text(c, d):
                yield Edit(a, d, f"{code.text(c, d)}, {code.text(a, b)}")


def _arguments(code: Code, i: int) -> list[tuple[int, int]]:
    parts, begin, j, end = [], i + 1, i + 1, code.partner[i]
    while j < end:
        if j in code.partner and code.partner[j] > j:
            j = code.partner[j]
        elif code.words[j] == ",":
            parts.append((begin, j))
            begin = j + 1
        j += 1
    return [*parts, (begin, end)] if begin < end else parts


# ---- statements


@operator
def drop_statement(code: Code) -> Iterator[Edit]:
    """Assignments, calls (barriers among them), continue, dropped in turn."""
    for i in _tokens(code):
        if not code.functions[i] or not _starts_statement(code, i):
            continue
        end = i
        while code.words[end] not in _STATEMENT_ENDS:
            end = code.partner[end] + 1 if code.partner.get(end, 0) > end else end + 1
        if code.words[end] == ";" and _does_something(code, i, end):
            yield Edit(i, end, "")


def _starts_statement(code: Code, i: int) -> bool:
    before = code.words[i - 1]
    if before == ")":
        return code.words[code.partner[i - 1] - 1] in ("if", "for")
    if before == "ORCHARD_UNROLL" or code.words[i] in ("ORCHARD_UNROLL", "if", "for"):
        return False
    if before == ";":
        return not _in_for_header(code, i)
    return before in ("{", "}", "else") and code.words[i] not in _STATEMENT_ENDS


def _in_for_header(code: Code, i: int) -> bool:
    return any(
        code.words[start] == "(" and code.words[start - 1] == "for" and start < i < end
        for start, end in code.partner.items()
        if start < end
    )


def _does_something(code: Code, i: int, end: int) -> bool:
    """Not a declaration, not a return."""
    first = code.words[i]
    if first in ("return", "const", "threadgroup", "using", "case", "default", "static", "auto"):
        return False
    if code.words[i] in ("continue", "break"):
        return True
    if code.kinds[i] == "op":
        return first in ("*", "(")
    j = i + 1
    while code.words[j] in (".", "::", "->"):
        j += 2
    while j in code.partner and code.partner[j] > j and code.words[j] in "<[":
        j = code.partner[j] + 1
        while code.words[j] in (".", "::", "->"):
            j += 2
    return j < end and code.words[j] in ("(", "++", "<<", *ASSIGNMENTS)
