"""Where the commands print."""

from __future__ import annotations

import rich.console


class Console(rich.console.Console):
    """A rich console that raises when its pipe is closed. rich itself would exit with status 1,
    which means a wrong result here."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError("the output was closed")

    def say(self, text: str) -> None:
        """Plain text: no markup is read in it and no number is coloured."""
        self.print(text, highlight=False, markup=False)
