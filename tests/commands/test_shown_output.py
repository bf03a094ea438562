"""What docs/doctor.md and docs/plan.md show as output is what their commands and programs print."""

from __future__ import annotations

import doctest
import itertools
import os
import re
import shlex
from pathlib import Path

import pytest
import torch

from orchard_ops.__main__ import main

pytestmark = pytest.mark.simulated  # the pages show its output

DOCS = Path(__file__).resolve().parents[2] / "docs"
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def shown(page: str) -> list[tuple[str, str, str]]:
    """(language, what is typed, the output shown below it)"""
    blocks = _FENCE.findall((DOCS / page).read_text())
    return [
        (language, typed, output)
        for (language, typed), (below, output) in itertools.pairwise(blocks)
        if language in ("bash", "python") and below == "text"
    ]


SHOWN = [(page, *block) for page in ("doctor.md", "plan.md") for block in shown(page)]


def agrees(output: str, printed: str) -> bool:
    """Whether the output is shown as printed, where ... stands for anything."""
    checker = doctest.OutputChecker()
    return checker.check_output(f"...\n{output}...\n", f"\n{printed}\n", doctest.ELLIPSIS)


@pytest.mark.parametrize(
    ("page", "language", "typed", "output"), SHOWN, ids=lambda x: str(x).split("\n")[0][:40]
)
def test_it_is_what_is_printed(
    page: str,
    language: str,
    typed: str,
    output: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fresh_stats: None,
):
    assert torch.ones(1, device="mps").is_mps
    for name in list(os.environ):
        if name.startswith("ORCHARD_"):
            monkeypatch.delenv(name)
    if language == "python":
        exec(compile(typed, page, "exec"), {"__name__": "page"})
    else:
        words = shlex.split(typed)
        assert words[:3] == ["python", "-m", "orchard_ops"]
        assert main(words[3:]) == 0
    printed = capsys.readouterr().out
    assert agrees(output, printed), f"{page} shows\n{output}\nand this is printed:\n{printed}"


def test_each_page_shows_something_and_a_wrong_figure_is_noticed():
    assert {page for page, *_ in SHOWN} == {"doctor.md", "plan.md"} and len(SHOWN) == 3
    assert agrees("a 1\n...\nc\n", "x\na 1\nb\nc\n")
    assert not agrees("a 2\n...\nc\n", "x\na 1\nb\nc\n")
