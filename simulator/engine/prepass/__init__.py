"""Rewrites preprocessed Metal text into the C++ that clang compiles against include/msl.

Each module handles one construct.  Line structure is kept throughout.
"""

import functools
from collections.abc import Sequence

from ..lexer import TokenStream
from ..lint import check
from . import expressions, function_constants, kernels, storage

ENTRY_TABLE = "\nMSL_ENTRY_TABLE\n"


def rewrite(
    text: str, constants: dict[str, object] | None = None, only: Sequence[str] = ("*",)
) -> str:
    """``constants``: values of function constants, by name or by decimal index; ``only``: glob
    patterns of the kernels to make."""
    return _Declarations(text, constants or {}, only).run() + ENTRY_TABLE


def rewrite_instantiations(common: str, own: str) -> str:
    """rewrite(common + own), where ``own`` only instantiates kernels of ``common``.

    ``common`` is rewritten once for all programs that begin with it.
    """
    known, text = _common(common)
    return text + _Declarations(own, {}, ("*",), known).run() + ENTRY_TABLE


@functools.lru_cache(maxsize=16)
def _common(text: str) -> tuple[kernels.Kernels, str]:
    declarations = _Declarations(text, {}, ("*",))
    return declarations.kernels, declarations.run()


class _Declarations:
    """Rewrites one text: its expressions, then each declaration by the module that knows it."""

    def __init__(
        self,
        text: str,
        constants: dict[str, object],
        only: Sequence[str],
        known: kernels.Kernels | None = None,
    ):
        self.stream = TokenStream(text)
        self.kernels = kernels.Kernels(self.stream, only, known)
        self.constants = constants
        self.variables = storage.VariableNumbers()

    def run(self) -> str:
        check(self.stream)
        expressions.rewrite_literals(self.stream)
        expressions.rewrite_strings(self.stream)
        expressions.rewrite_constructors(self.stream)
        i = 0
        while self.stream[i].kind != "end":
            i = self.step(i)
        return self.stream.render()

    def step(self, i: int) -> int:
        """Handles what starts at i and returns where to go on."""
        stream = self.stream
        token = stream[i]
        if token.kind == "op":
            found = stream.attribute(i) if token.text == "[" else None
            return self.attribute(i, *found) if found else i + 1
        if token.kind != "word":
            return i + 1
        if token.text == "template" and self.kernels.is_instantiation(i):
            return self.kernels.instantiation(i)
        if token.text == "kernel":
            return self.kernels.definition(i, i + 1)
        if token.text in ("device", "threadgroup", "constant"):
            end = storage.drop_qualified_method(stream, i)
            if end:
                return end
            if token.text == "threadgroup" and storage.rewrite_local(stream, i, self.variables):
                return i + 1
            storage.rewrite_array_parameter(stream, i)
        return i + 1

    def attribute(self, i: int, end: int, body: str) -> int:
        if kernels.is_kernel_attribute(body):
            return self.kernels.definition(i, end + 1, body)
        self.kernels.remember(body)
        number = function_constants.index(body)
        if number is not None:
            return function_constants.rewrite(self.stream, i, end, number, self.constants)
        self.stream.remove(i, end + 1)
        return end + 1
