"""docs/features.md is what its script makes of the committed results, and its verdicts are true."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from benchmarks import feature_page

pytestmark = pytest.mark.simulated  # a table asks the simulator for the size of a block

TIMED = {
    "environment": {
        "gpu": "a GPU",
        "driver": "1",
        "torch": "2",
        "date": "today",
        "sources": {"commit": "abc", "edited": False, "digest": "def"},
    },
    "records": [
        dict(feature=feature, yardstick=beside, work=work, head_dim=64, share=share, ratio=ratio)
        for feature, beside, share, work, ratio in (
            ("plain", "plain", None, "forward", {"median": 1.0}),
            ("noop score_mod", "plain", None, "forward", {"median": 1.01}),
            ("blocks, 1 of 4", "plain", 0.25, "forward", {"median": 0.27}),
            ("blocks, 1 of 4", "plain", 0.25, "backward", {"median": 0.3}),
            ("ALiBi as score_mod", "ALiBi", None, "forward", None),
        )
    ],
}


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Results that stand for the committed ones, by name."""
    own: dict[str, Any] = {}
    committed = feature_page.result

    monkeypatch.setattr(
        feature_page, "result", lambda name: own[name] if name in own else committed(name)
    )
    return own


def bound(feature: str) -> list[str]:
    (row,) = (row for row in feature_page.bounds() if row[0].startswith(feature))
    return row


def test_the_page_is_of_the_committed_results():
    text = feature_page.PAGE.read_text()
    assert feature_page.written(text) == text, "run python -m benchmarks.feature_page"


def test_every_section_has_a_place():
    text = feature_page.PAGE.read_text()
    for name in feature_page.SECTIONS:
        with pytest.raises(ValueError, match=f"0 marks .*{name} "):
            feature_page.written(text.replace(feature_page.BEGIN.format(name), ""))


def test_a_feature_beyond_its_bound_is_missed(changed: dict[str, Any]):
    name = "nvidia/features.json"
    assert bound("windows")[-1] == "met"
    changed[name] = copy.deepcopy(feature_page.result(name))
    record = next(r for r in changed[name]["records"] if r["feature"] == "causal window of 512")
    record["ratio"]["median"] = 1.2 * record["share"]
    assert bound("windows")[-1] == "**missed**" and "31 of 32 within" in bound("windows")[3]
    assert any("causal window of 512, forward" in line for line in feature_page.misses())
    assert any(
        row[0] == "causal window of 512" and "7 of 8" in row[3] for row in feature_page.hidden()
    )


def test_counts_beyond_their_bound_are_missed(changed: dict[str, Any]):
    for name, feature, change in (
        ("apple_model/flex.json", "ALiBi and tanh", lambda x: x["cycles"][6].update(own=99.0)),
        ("apple_model/flex.json", "score_mod that", lambda x: x["cycles"][0].update(own=99.0)),
        (
            "apple_model/decode.json",
            "decode kernel",
            lambda x: x["cases"][0].update(bytes_read=1e6),
        ),
        (
            "apple_model/decode.json",
            "decode, up to 8 rows, D 32",
            lambda x: x["cases"][0].update(rate=1.9),
        ),
    ):
        assert bound(feature)[-1] == "met"
        changed[name] = copy.deepcopy(feature_page.result(name))
        change(changed[name])
        assert bound(feature)[-1] == "**missed**", feature
        del changed[name]


def test_decode_on_a_gpu(changed: dict[str, Any]):
    """All of the longest caches at the copy's rate, and faster than PyTorch's: met."""
    name = "nvidia/decode.json"
    changed[name] = copy.deepcopy(feature_page.result(name))
    for r in changed[name]["records"]:
        for values, x in ((r.get("of_copy", {}), 0.9), (r.get("speedup", {}), 3.5)):
            values.update((key, spread | {"median": x}) for key, spread in values.items())
    for feature in ("decode, 131072 keys", "decode, all lengths"):
        rows = [row for row in feature_page.bounds() if row[0].startswith(feature)]
        assert rows and all(row[-1] == "met" for row in rows)
    assert not any("copy" in line or "PyTorch" in line for line in feature_page.misses())


def test_functions_on_a_gpu(changed: dict[str, Any]):
    """A result that is not there is said to be missing; one that is, is judged."""
    name = "nvidia/flex_speed.json"
    changed[name] = None
    assert bound("FlexAttention")[3:] == ["not timed yet", ""]
    assert "flex_speed" in feature_page.flex_gpu()[0]
    changed[name] = TIMED
    assert bound("FlexAttention")[-1] == "**missed**"
    assert "1.08 to 1.20, 1 of 2 within" in bound("FlexAttention")[3]
    lines = feature_page.flex_gpu()
    assert "| noop score_mod | plain | 1.01 |  |" in lines
    assert "| blocks, 1 of 4 | plain | x1.08 of the ideal | x1.20 of the ideal |" in lines
    assert len(lines) == 4  # what was not timed has no row
    assert any("functions as scores: a GPU" in line for line in feature_page.sources())


def test_the_records_are_of_this_repository():
    for name, script in (("flex", "flex"), ("decode", "decode")):
        content = json.loads((feature_page.RESULTS / f"apple_model/{name}.json").read_text())
        assert content["made_by"] == f"python -m benchmarks.apple_model.{script} --write"
