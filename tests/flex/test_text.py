"""The text of the kernels whose scores are functions, and that of the ordinary kernels, which has
not changed for them."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "native"))
import embed_shaders  # noqa: E402

ORDINARY = "91359e4af222db90"
"""Of the texts before there were functions. Verdicts on mutants and measurements are of these: who
changes a kernel changes this too."""


def test_the_ordinary_texts_are_as_they_were():
    text = "".join(map(embed_shaders.flatten, embed_shaders.FAMILIES.values()))
    assert hashlib.sha256(text.encode()).hexdigest().startswith(ORDINARY)


@pytest.mark.parametrize("family", embed_shaders.FLEX_FAMILIES)
def test_the_texts_are_whole(family: str):
    text = embed_shaders.flatten_flex(embed_shaders.FLEX_FAMILIES[family])
    assert text.isascii() and '#include "' not in text and "#pragma once" not in text
    for name in ("AttentionParams", "FlexParams", "FlexCaptures", "FlexScore", "ScoreBuffers"):
        assert text.count(f"struct {name} {{") == 1
    assert "FlexCaptures captures;" in text.partition("struct ScoreBuffers {")[2][:80]
    lines = text.split("\n")
    assert not any(
        line.startswith("    constant AttentionParams& params [[buffer") for line in lines
    )


def test_lines_are_counted_as_the_files_have_them():
    """Behind each line that the flex text replaces a diagnostic names the file's own line."""
    for header in embed_shaders.FLEX_FAMILIES.values():
        file, number = header, 0
        for line in embed_shaders.flatten_flex(header).split("\n"):
            number += 1
            marker = embed_shaders._LINE.match(line)
            if marker:
                file, number = marker[2], int(marker[1]) - 1
            elif line and "capture" not in line and "FlexParams& flex" not in line:
                source = (ROOT / "shaders" / file).read_text().splitlines()[number - 1]
                replaced = [new for lines in embed_shaders._FLEX_LINES.values() for new in lines]
                assert line == source or line in replaced, (file, number)


def test_a_line_that_is_gone_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(embed_shaders._FLEX_LINES, "  no such line", ())
    with pytest.raises(ValueError, match=r"forward\.h: lines .* are gone: \['  no such line'\]"):
        embed_shaders.flatten_flex("forward.h")
    monkeypatch.delitem(embed_shaders._FLEX_LINES, "  no such line")
    monkeypatch.setitem(embed_shaders._FLEX_LINES, "  zero(s);", ("  zero(s);",))
    monkeypatch.setitem(embed_shaders._FLEX_LINES, "    zero(s);", ("    zero(s);",))
    with pytest.raises(ValueError, match=r"are gone: \['  zero\(s\);'\]"):
        embed_shaders.flatten_flex("forward.h")
    monkeypatch.setitem(embed_shaders._FLEX_LINES, "}", ("}",))
    with pytest.raises(ValueError, match="comes twice: }"):
        embed_shaders.flatten_flex("forward.h")
