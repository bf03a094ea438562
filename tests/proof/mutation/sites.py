"""The structure that mutation operators need of a C++ text, from its tokens.

The text need not be preprocessed: comments are blanked, directives are skipped (of a #define the
body is kept), and everything keeps its place. Operators and brackets are told apart by the spaces
that clang-format, which the build enforces, puts around the one and not around the other.
"""

from __future__ import annotations

import re
from functools import cached_property

from simulator.engine.lexer import TokenStream

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"", re.S)
_DEFINE = re.compile(r"^#define \w+", re.M)
_PRECEDENCE = {
    op: level
    for level, ops in enumerate(
        ("||", "&&", "|", "^", "&", "== !=", "< > <= >=", "<< >>", "+ -", "* / %"), 1
    )
    for op in ops.split()
}
ASSIGNMENTS = ("=", "+=", "-=", "*=", "|=", "&=", "^=", "/=", "%=")
_BOUNDARY_WORDS = {"return", "else", "case"}
_CONTROL = {"if", "for", "while", "switch", "catch"}


def blank_comments(text: str) -> str:
    """Comments and the heads of #define as spaces."""

    def blank(match: re.Match) -> str:
        found = match[0]
        return found if found.startswith('"') else re.sub(r"[^\n]", " ", found)

    return _DEFINE.sub(lambda m: " " * len(m[0]), _COMMENT.sub(blank, text))


class Code:
    """A file's tokens. Positions are indices into `words`, the tokens' texts."""

    def __init__(self, text: str):
        self.original = text
        stream = TokenStream(blank_comments(text))
        self.words: list[str] = []
        self.kinds: list[str] = []
        self.begin: list[int] = []  # offsets into the text
        self.end: list[int] = []
        self._spaced: list[bool] = []
        offset = 0
        for token in stream.tokens:
            offset += len(token.lead)
            if token.text in "<>" and token.kind == "op" and not token.lead and self.words \
                    and self.words[-1] == token.text and self._spaced[-1]:  # fmt: skip
                self.words[-1] += token.text  # a shift
                self.end[-1] += 1
            else:
                self.words.append(token.text)
                self.kinds.append(token.kind)
                self.begin.append(offset)
                self.end.append(offset + len(token.text))
                self._spaced.append(bool(token.lead))
            offset += len(token.text)

    def __len__(self) -> int:
        return len(self.words)

    def text(self, begin: int, end: int) -> str:
        """Tokens [begin, end) as they stand."""
        return self.original[self.begin[begin] : self.end[end - 1]] if begin < end else ""

    def line(self, i: int) -> int:
        return self.original.count("\n", 0, self.begin[i]) + 1

    # ---- brackets

    @cached_property
    def partner(self) -> dict[int, int]:
        """Matching brackets, in both directions; the angle brackets of templates as well."""
        pairs: dict[int, int] = {}
        stack: list[int] = []
        for i, word in enumerate(self.words):
            if self.kinds[i] != "op":
                continue
            if word in "([{" or self._opens_template(i):
                stack.append(i)
            elif word in ")]}" or (word == ">" and stack and self.words[stack[-1]] == "<"):
                if word == ">" and self._spaced[i]:
                    continue
                start = stack.pop()
                pairs[start], pairs[i] = i, start
        return pairs

    def _opens_template(self, i: int) -> bool:
        if self.words[i] != "<" or i == 0:
            return False
        return self.words[i - 1] == "template" or not self._spaced[i]

    def is_binary(self, i: int) -> bool:
        """Whether a binary operator (not an assignment) is at i."""
        return (
            self.words[i] in _PRECEDENCE
            and self.kinds[i] == "op"
            and self._spaced[i]
            and self._spaced[i + 1]
            and i not in self.partner
            and (self.kinds[i - 1] in ("word", "number", "string") or self.words[i - 1] in ")]")
            and self.words[i - 1] not in _BOUNDARY_WORDS
        )

    # ---- expressions

    def operand_begin(self, i: int, level: int | None = None) -> int:
        """Where the left operand of the operator at i begins; level 0 takes in all operators."""
        level = _PRECEDENCE[self.words[i]] if level is None else level
        j = i - 1
        while j >= 0:
            if j in self.partner and self.partner[j] < j:
                j = self.partner[j] - 1
                continue
            if self._is_boundary(j) or (
                self.is_binary(j) and _PRECEDENCE[self.words[j]] < level
            ):  # fmt: skip
                break
            j -= 1
        return j + 1

    def operand_end(self, i: int, level: int | None = None) -> int:
        """Behind the last token of the right operand of the operator at i."""
        level = _PRECEDENCE[self.words[i]] if level is None else level
        j = i + 1
        while j < len(self.words) - 1:
            if j in self.partner and self.partner[j] > j:
                j = self.partner[j] + 1
                continue
            if self._is_boundary(j) or (
                self.is_binary(j) and _PRECEDENCE[self.words[j]] <= level
            ):  # fmt: skip
                break
            j += 1
        return j

    def _is_boundary(self, j: int) -> bool:
        word = self.words[j]
        if self.kinds[j] == "word":
            return word in _BOUNDARY_WORDS
        return self.kinds[j] == "op" and (
            word in (",", ";", "?", ":", *ASSIGNMENTS) or j in self.partner
        )

    # ---- places

    @cached_property
    def functions(self) -> list[str]:
        """Of each token the function that it is in; "" outside of functions."""
        result = [""] * len(self.words)
        for i, word in enumerate(self.words):
            if word != "{" or self.kinds[i] != "op" or result[i]:
                continue
            j = i - 1
            while self.words[j] == "const":
                j -= 1
            if self.words[j] != ")":
                continue
            name = self.words[self.partner[j] - 1]
            if name not in _CONTROL and self.kinds[self.partner[j] - 1] == "word":
                # The signature is part of the function: it is where parameters can be swapped.
                for k in range(self.partner[j], self.partner[i] + 1):
                    result[k] = name
        return result

    @cached_property
    def skipped(self) -> list[bool]:
        """Tokens that are not mutated: attributes, template heads, assertions, signatures."""
        result = [False] * len(self.words)

        def skip(begin: int, end: int) -> None:
            result[begin : end + 1] = [True] * (end + 1 - begin)

        for i, word in enumerate(self.words):
            if word == "[" and self.words[i + 1] == "[":
                skip(i, self.partner[i])
            elif word in ("template", "static_assert", "_Pragma") and i + 1 in self.partner:
                skip(i, self.partner[i + 1])
            elif word == "(" and self._is_signature(i):
                skip(i, self.partner[i])
        return result

    def _is_signature(self, i: int) -> bool:
        end = self.partner[i]
        j = end + 1
        while j < len(self.words) and self.words[j] == "const":
            j += 1
        name = self.words[i - 1]
        return self.words[j] == "{" and self.kinds[i - 1] == "word" and name not in _CONTROL

    def segment(self, i: int) -> tuple[int, int]:
        """The part of a statement around i, between semicolons and braces."""
        begin = i
        while begin > 0 and self.words[begin - 1] not in (";", "{", "}"):
            begin -= 1
        end = i
        while end < len(self.words) - 1 and self.words[end] not in (";", "{", "}"):
            end += 1
        return begin, end

    def normalised(self, begin: int, end: int, edit: tuple[int, int, str] | None = None) -> str:
        """Tokens [begin, end) in one line without comments, an edit of them applied."""
        parts = [self.text(begin, end)]
        if edit:
            first, last, text = edit
            head = self.original[self.begin[begin] : self.begin[first]]
            tail = self.original[self.end[last - 1] : self.end[end - 1]]
            parts = [head, text, tail]
        return " ".join(blank_comments("".join(parts)).split())
