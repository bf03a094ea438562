"""Tokens of a preprocessed C++ text, with just enough structure to find brackets and attributes.

The pre-pass works on tokens instead of a syntax tree because clang refuses, while parsing, the very
constructs that have to be rewritten (attributes on explicit instantiations, variables in the
threadgroup address space, ``float4(a, b)``).  After preprocessing, a ``#`` starts a line marker or
a pragma; both count as white space.
"""

import re

from .errors import CompileError

_TOKEN = re.compile(
    r"""(?P<lead>(?:[ \t\r\n]+|\#[^\n]*)*)
    (?:(?P<word>[A-Za-z_$][A-Za-z0-9_$]*)
    |(?P<number>\.?[0-9](?:[eEpP][+-]|[0-9a-zA-Z_.'])*)
    |(?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
    |(?P<op>::|->|<<=|<=|>=|==|!=|&&|\|\||\+\+|--|[-+*/%&|^]=|.))""",
    re.X,
)
_LINE_MARKER = re.compile(r'[ \t]*#[ \t]*(?:line[ \t]+)?(\d+)[ \t]+"((?:\\.|[^"\\])*)"')
_CLOSING = {"(": ")", "[": "]", "{": "}"}


class Token:
    """A token and the white space (and line markers) in front of it.

    ``before`` and ``after`` are texts that the pre-pass inserts, ``removed`` drops the token; white
    space always stays, so that diagnostics keep their line numbers.
    """

    __slots__ = ("after", "before", "kind", "lead", "removed", "text")

    def __init__(self, kind: str, text: str, lead: str):
        self.kind = kind
        self.text = text
        self.lead = lead
        self.before = ""
        self.after = ""
        self.removed = False

    def __repr__(self) -> str:
        return self.text

    def is_op(self, *texts: str) -> bool:
        return self.kind == "op" and self.text in texts


class TokenStream:
    """The tokens of a text; positions are indices into ``tokens``.

    The last token is an empty one of kind "end", so that looking one ahead is always possible.
    """

    def __init__(self, text: str):
        self.tokens: list[Token] = []
        end = 0
        for m in _TOKEN.finditer(text):
            self.tokens.append(Token(m.lastgroup, m[m.lastgroup], m["lead"]))
            end = m.end()
        self.tokens.append(Token("end", "", text[end:]))
        self._match_brackets()

    def __getitem__(self, i: int) -> Token:
        return self.tokens[i]

    def __len__(self) -> int:
        return len(self.tokens)

    def _match_brackets(self) -> None:
        self.closing: dict[int, int] = {}
        self.opening: dict[int, int] = {}
        stack: list[int] = []
        for i, token in enumerate(self.tokens):
            if token.kind != "op":
                continue
            if token.text in "([{":
                stack.append(i)
            elif token.text in ")]}":
                if not stack or _CLOSING[self.tokens[stack[-1]].text] != token.text:
                    raise self.error(i, f"unmatched '{token.text}'")
                start = stack.pop()
                self.closing[start] = i
                self.opening[i] = start
        if stack:
            raise self.error(stack[-1], f"unmatched '{self.tokens[stack[-1]].text}'")

    def location(self, i: int) -> str:
        """file:line of a token, from the line markers in front of it."""
        file, line = "program_source", 1
        for token in self.tokens[: i + 1]:
            for text in token.lead.splitlines(keepends=True):
                marker = _LINE_MARKER.match(text)
                if marker:
                    file, line = marker[2], int(marker[1])
                elif text.endswith("\n"):
                    line += 1
        return f"{file}:{line}"

    def error(self, i: int, message: str) -> CompileError:
        return CompileError(f"{self.location(i)}: error: {message}")

    def source(self, begin: int, end: int) -> str:
        """The tokens begin..end-1 on one line, without line markers."""
        parts = []
        for token in self.tokens[begin:end]:
            if token.lead and parts:
                parts.append(" ")
            parts.append(token.text)
        return "".join(parts)

    def attribute(self, i: int) -> tuple[int, str] | None:
        """If ``[[...]]`` starts at i: the index of its last bracket and the text inside."""
        if not (self.tokens[i].is_op("[") and self.tokens[i + 1].is_op("[")):
            return None
        end = self.closing[i]
        return end, self.source(i + 2, end - 1)

    def is_attribute_end(self, i: int) -> bool:
        """Whether the last bracket of ``[[...]]`` is at i."""
        return self.tokens[i].is_op("]") and self.attribute(self.opening[i]) is not None

    def split_commas(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Splits begin..end-1 at the commas outside of all brackets, angle brackets included."""
        parts = []
        start = i = begin
        angles = 0
        while i < end:
            token = self.tokens[i]
            if token.kind == "op":
                if token.text in "([{":
                    i = self.closing[i]
                elif token.text == "<":
                    angles += 1
                elif token.text == ">":
                    angles -= 1
                elif token.text == "," and angles == 0:
                    parts.append((start, i))
                    start = i + 1
            i += 1
        if start < end:
            parts.append((start, end))
        return parts

    def angle_open(self, i: int) -> int:
        """The ``<`` that belongs to the ``>`` at i."""
        depth = 0
        for j in range(i, -1, -1):
            if j in self.opening and not self.tokens[j].is_op("{"):
                continue
            depth += self.tokens[j].is_op(">") - self.tokens[j].is_op("<")
            if depth == 0:
                return j
        raise self.error(i, "unmatched '>'")

    def angle_close(self, i: int) -> int:
        """The ``>`` that belongs to the ``<`` at i; i itself if the statement has none."""
        depth = 0
        j = i
        while j < len(self.tokens) and not self.tokens[j].is_op(";", "{", "}"):
            if j in self.closing:
                j = self.closing[j]
            depth += self.tokens[j].is_op("<") - self.tokens[j].is_op(">")
            if depth == 0:
                return j
            j += 1
        return i

    def statement_end(self, i: int) -> int:
        """The ``;`` that ends the statement or declaration at i."""
        while not self.tokens[i].is_op(";"):
            if self.tokens[i].kind == "end":
                raise self.error(i, "missing ';'")
            i = self.closing.get(i, i) + 1
        return i

    def remove(self, begin: int, end: int) -> None:
        """Removes the tokens begin..end-1, but nothing that was inserted between them."""
        for token in self.tokens[begin:end]:
            token.removed = True

    def insert_before(self, i: int, text: str) -> None:
        self.tokens[i].before += text

    def insert_after(self, i: int, text: str) -> None:
        self.tokens[i].after += text

    def render(self) -> str:
        parts = []
        for token in self.tokens:
            parts.append(token.lead)
            parts.append(token.before)
            if not token.removed:
                parts.append(token.text)
            parts.append(token.after)
        return "".join(parts)
