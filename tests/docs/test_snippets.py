"""Whatever a page shows as code runs as it stands, from the top of the page to its end."""

from __future__ import annotations

import doctest
import os
import re
import runpy
from pathlib import Path
from typing import Any

import pages
import pytest
from pages import PAGES, ROOT, Block

import orchard_ops

WITH_CODE = [p for p in PAGES if any(b.language in ("python", "pycon") for b in pages.blocks(p))]
ANY = Path(__file__)
GIVEN = Path(__file__).parent / "given"
"""What the reader of a page has before its first line, such as a checkpoint: programs by pages'
names. Most pages need none, since what they show is complete."""


def run_python(block: Block, namespace: dict[str, Any]) -> None:
    """Errors point at the line of the page."""
    code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")
    exec(code, namespace)


def run_session(block: Block, namespace: dict[str, Any]) -> None:
    """Output must be what the page shows, where ... stands for anything."""
    test = doctest.DocTestParser().get_doctest(
        block.text, namespace, str(block), str(block.page), block.line
    )
    assert test.examples, f"{block}: a session without >>>"
    told: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    if runner.run(test, out=told.append, clear_globs=False).failed:
        raise AssertionError(f"{block}\n{''.join(told)}")
    namespace.update(test.globs)


def given(page: Path) -> Path:
    return GIVEN / f"{page.stem.replace('-', '_')}.py"


def run_page(blocks: list[Block], before: Path | None = None) -> None:
    namespace: dict[str, Any] = {"__name__": "page"}
    if before is not None and before.exists():
        namespace = runpy.run_path(str(before))
    for block in blocks:
        if block.language == "python":
            run_python(block, namespace)
        elif block.language == "pycon":
            run_session(block, namespace)


@pytest.mark.parametrize("page", WITH_CODE, ids=pages.name)
def test_a_page_s_code_runs(page: Path, monkeypatch, tmp_path, fresh_stats):
    """On the device, without a fallback that the page does not ask for (conftest.py)."""
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    try:
        run_page(pages.blocks(page), given(page))
    finally:
        for variable in os.environ.keys() - before.keys():
            del os.environ[variable]
        os.environ.update(before)
        orchard_ops.disable()


@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_no_block_escapes(page: Path):
    for block in pages.blocks(page):
        why = pages.unexecuted(block)
        assert why is None, f"{block}: no test executes this block: {why}"


def test_every_program_in_given_has_its_page():
    assert {*GIVEN.glob("*.py")} <= {given(page) for page in WITH_CODE}


def test_an_example_that_does_not_run_is_found():
    good = "```python\nx = 1\n```\n```pycon\n>>> x + 1\n2\n```\n"
    run_page(pages.blocks_of(good, ANY))
    with pytest.raises(NameError):
        run_page(pages.blocks_of("```python\nmissing()\n```\n", ANY))
    with pytest.raises(AssertionError, match=r"Expected:\s+3"):
        run_page(pages.blocks_of(good.replace("\n2\n", "\n3\n"), ANY))


def test_a_failing_line_is_the_page_s():
    text = "# Title\n\n```python\nx = 1\nmissing()\n```\n"
    with pytest.raises(NameError) as raised:
        run_page(pages.blocks_of(text, ANY))
    assert raised.traceback[-1].lineno + 1 == 5


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("```\nx = 1\n```\n", "no language"),
        ("```py\nx = 1\n```\n", "fence says py"),
        ("words\n\n    python -m orchard_ops demo\n", "no language"),
        ("```text\nmake test\n```\n", "'make t' begins"),
        ("```text\n>>> 1\n```\n", "'>>>' begins"),
        ("* a list\n\n  ```console\n  $ make demo\n  ```\n", "fence says console"),
        ("```text\n. # +\n```\n", None),
        ("```bash\nmake test\n```\n", None),
    ],
)
def test_which_blocks_escape(text: str, reason: str | None):
    (block,) = pages.blocks_of(text, ANY)
    why = pages.unexecuted(block)
    assert why is None if reason is None else reason in str(why)


# ---- names in the prose -------------------------------------------------------------------------


_NAME = re.compile(r"`[^`]*?\b(orchard_ops(?:\.\w+)+)")
_VARIABLE = re.compile(r"\bORCHARD_[A-Z_]+\b")


@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_names_in_prose_exist(page: Path):
    for dotted in _NAME.findall(page.read_text()):
        value: Any = orchard_ops
        for part in dotted.split(".")[1:]:
            if not hasattr(value, part):  # a module that nothing has imported yet
                __import__(f"{value.__name__}.{part}")
            value = getattr(value, part)


def test_variables_in_prose_exist():
    """Every variable that a page names is read by somebody, and the table has all of them."""
    sources = "".join(
        path.read_text()
        for folder in ("src", "native", "setup.py", "tests", "simulator")
        for path in [ROOT / folder, *(ROOT / folder).rglob("*")]
        if path.suffix in (".py", ".cpp", ".h")
    )
    read = set(re.findall(r"[\"'](ORCHARD_[A-Z_]+)[\"'=]", sources))
    for page in PAGES:
        unknown = set(_VARIABLE.findall(page.read_text())) - read
        assert not unknown, f"{pages.name(page)} names {unknown}"
    package = "".join(
        path.read_text()
        for folder in ("src", "native")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".h")
    )
    of_users = set(re.findall(r"\"(ORCHARD_[A-Z_]+)\"", package))
    assert of_users <= set(_VARIABLE.findall((ROOT / "docs" / "environment.md").read_text()))
