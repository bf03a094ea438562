"""Tokens of Metal text that has not been preprocessed: comments and directives out of the way."""

from __future__ import annotations

import re
from functools import cached_property

from simulator.engine.lexer import TokenStream

_COMMENT_OR_STRING = re.compile(
    r"//(?:\\\n|[^\n])*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'", re.S
)
_CONTINUED = re.compile(r"\\\n")
_DEFINE = re.compile(r"^([ \t]*#[ \t]*define[ \t]+)(\w+)(\([^)\n]*\))?", re.M)
_DIRECTIVE = re.compile(r"^[ \t]*#[ \t]*(\w+)[ \t]*([^\n]*)", re.M)
_HASH = re.compile(r"^([ \t]*#)|#", re.M)  # within a line: # and ## in the body of a macro
# Words in front of another word that is not thereby declared.
_NO_TYPES = {"return", "else", "case", "goto", "do", "namespace", "using", "typedef", "if"}


def without_comments(text: str) -> str:
    """Comments as spaces; places and lines stay."""

    def blank(match: re.Match) -> str:
        found = match[0]
        return found if found[0] in "\"'" else re.sub(r"[^\n]", " ", found)

    return _COMMENT_OR_STRING.sub(blank, text)


def balanced(source: str) -> str:
    """A piece of a text with the brackets blanked whose partners lie outside of it."""
    characters, open_ = list(source), []
    for match in re.finditer(r"\"(?:\\.|[^\"\\\n])*\"|[(){}\[\]]", without_comments(source)):
        found, i = match[0], match.start()
        if found in "([{":
            open_.append(i)
        elif found in ")]}":
            partner = "([{"[")]}".index(found)]
            where = max((k for k, j in enumerate(open_) if source[j] == partner), default=None)
            if where is None:
                characters[i] = " "
                continue
            for j in open_[where + 1 :]:
                characters[j] = " "
            del open_[where:]
    for j in open_:
        characters[j] = " "
    return "".join(characters)


class Text:
    """A source. The body of a macro counts as text, its head and other directives do not."""

    def __init__(self, source: str):
        plain = _CONTINUED.sub("  ", without_comments(source))
        self.directives = [
            (m[1], m[2].strip()) for m in _DIRECTIVE.finditer(plain) if not m[1].isdigit()
        ]  # line markers
        self.macros = {m[2] for m in _DEFINE.finditer(plain)}
        parameters = [m[3] for m in _DEFINE.finditer(plain) if m[3]]
        self.macro_parameters = {w for p in parameters for w in re.findall(r"\w+", p)}
        plain = _DEFINE.sub(lambda m: " " * len(m[0]), plain)
        self.stream = TokenStream(_HASH.sub(lambda m: m[1] or " ", plain))
        self.tokens = self.stream.tokens

    def words(self) -> set[str]:
        return {t.text for t in self.tokens if t.kind == "word"}

    def place(self, i: int) -> str:
        return self.stream.location(i)

    def word(self, i: int) -> str:
        return self.tokens[i].text if 0 <= i < len(self.tokens) else ""

    @cached_property
    def attributes(self) -> list[tuple[int, int]]:
        """First and last token of each ``[[...]]``."""
        found = []
        for i, token in enumerate(self.tokens[:-1]):
            attribute = self.stream.attribute(i) if token.is_op("[") else None
            if attribute:
                found.append((i, attribute[0]))
        return found

    @cached_property
    def declared(self) -> set[str]:
        """Names that the text itself declares.

        A name is declared where a type stands in front of it: another word, or the end of one
        (``>``, ``*``, ``&`` without a space before). A call, an operand or a member is not.
        """
        names = set(self.macros) | self.macro_parameters
        inside = {i for a, b in self.attributes for i in range(a, b + 1)}
        for i, token in enumerate(self.tokens[:-1]):
            if token.kind != "word" or i in inside or i == 0:
                continue
            after = self.tokens[i + 1]
            j = i - 1
            while j in self.stream.opening and self.tokens[j].text == "]":
                j = self.stream.opening[j] - 1  # attributes between type and name
            before = self.tokens[j]
            is_word = before.kind == "word" and before.text not in _NO_TYPES
            is_type = is_word or (before.is_op(">", "*", "&") and not before.lead)
            after_type = is_type and after.is_op("(", ";", "=", ",", ")", "[", "{", ":", ">")
            enumerator = before.is_op("{", ",") and self._in_enum(i)
            alias = before.text == "using" and after.is_op("=")
            ends = before.is_op(",") and after.is_op(",", ";", "=", "[")
            if after_type or enumerator or alias or (ends and self._in_declaration(i)):
                names.add(token.text)
        return names

    @cached_property
    def _enumerations(self) -> list[tuple[int, int]]:
        """Braces of enumerations."""
        return [
            (a, b)
            for a, b in self.stream.closing.items()
            if self.word(a) == "{" and "enum" in (self.word(k) for k in range(a - 5, a))
        ]

    def _in_enum(self, i: int) -> bool:
        return any(a < i < b for a, b in self._enumerations)

    def _in_declaration(self, i: int) -> bool:
        """``float a, b;``: the second name."""
        j = i - 1
        while j > 0 and not self.tokens[j].is_op(";", "{", "}", "(", ")"):
            j -= 1
        return (
            self.tokens[j].is_op(";", "{", "}")
            and self.tokens[j + 2].kind == "word"
            and self.tokens[j + 1].kind == "word"
        )

    # ---- functions

    @cached_property
    def bodies(self) -> list[tuple[int, int, int]]:
        """(name, opening brace, closing brace) of each function that is defined."""
        found = []
        for i, token in enumerate(self.tokens):
            if not token.is_op("{"):
                continue
            j = i - 1
            while self.word(j) in ("const", "device", "threadgroup", "constant", "thread"):
                j -= 1
            if self.word(j) != ")" or j not in self.stream.opening:
                continue
            name = self.stream.opening[j] - 1
            statements = ("if", "for", "while", "switch", "defined")
            if self.tokens[name].kind == "word" and self.word(name) not in statements:
                found.append((name, i, self.stream.closing[i]))
        return found

    def is_kernel(self, name: int) -> bool:
        """Whether the function whose name is at that token is a kernel."""
        j = name - 1
        while j >= 0 and not self.tokens[j].is_op(";", "{", "}"):
            if self.word(j) == "kernel":
                return True
            j -= 1
        return False
