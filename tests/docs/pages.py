"""The pages that people read, and the code and commands in them, as a Markdown parser sees them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
_EXTRA = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")
PAGES = sorted([ROOT / name for name in _EXTRA] + list((ROOT / "docs").glob("*.md")))

RUN = ("python", "pycon", "bash")
"""What a test executes, by the word behind the fence: a program, a session, commands."""
SHOWN = ("text",)
"""What is only looked at: diagrams, signatures, output."""
DIRECTIVES = ("{toctree}", "{eval-rst}")


@dataclass(frozen=True)
class Block:
    """A fenced or indented block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{name(self.page)}:{self.line}"


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(text: str, page: Path) -> list[Block]:
    """Blocks of code of a page, in its order."""
    found = []
    for token in MarkdownIt().parse(text):
        if token.type in ("fence", "code_block") and token.map is not None:
            language = token.info.split()[0] if token.info.strip() else ""
            # A fence's text begins in the line behind it.
            line = token.map[0] + 1 + (token.type == "fence")
            found.append(Block(page, line, language, token.content))
    return found


def blocks(page: Path) -> list[Block]:
    return blocks_of(page.read_text(), page)


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a bash block; comments are dropped."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


_CODE = re.compile(
    r"^\s*(>>> |\$ |import \w|from [\w.]+ import |with [\w.]+\(|[A-Z_]+=\S+ \w|"
    r"(make|pip|python3?|git|uv|cd) [\w.\"-])",
    re.MULTILINE,
)


def unexecuted(block: Block) -> str | None:
    """Why no test executes a block that looks as if somebody might copy it, or None."""
    if block.language in (*RUN, *DIRECTIVES):
        return None
    if block.language not in SHOWN:
        said = block.language or "no language"
        return f"its fence says {said}: say {', '.join(RUN)} for what runs, text for what is shown"
    if code := _CODE.search(block.text):
        return f"it is marked as text, but {code[0].strip()!r} begins code or a command"
    return None
