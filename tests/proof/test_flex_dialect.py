"""The kernels whose scores are functions speak Apple's dialect, as test_shader_dialect.py asks: the
kernels themselves, and what is generated for random trees and for the mods that people write."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("simulator", reason="the dialect is checked with the simulator's compiler")
pytest.importorskip("hypothesis", reason="tests/flex/flex_trees.py has strategies, too")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "flex"))
import flex_mods
import published_mods
import pytorch_mods
from dialect import check, vocabulary
from dialect.rules import threadgroup_bytes
from flex_trees import Seeded
from mutation.harness import Sources
from mutation.killers import flex
from test_shader_dialect import ACCEPTED

from orchard_ops.flex.metal import lower
from orchard_ops.flex.mod import Mod
from orchard_ops.flex.trace import MASK, SCORE, trace

pytestmark = pytest.mark.skipif(
    not vocabulary.headers(), reason="this torch has no Metal headers to compare with"
)

#: For every family, one with captures or a mask: each text has its own functions.
CASES = {
    "flex map: other blocks": False,
    "flex attention_forward: captures": True,
    "flex attention_backward_dq: score and mask": True,
    "flex attention_backward_dkv: other states": True,
    "flex pairs: states": True,
}


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_wrong_with_the_shaders(name: str):
    (killer,) = (x for x in flex.killers() if x.name == name)
    sources = Sources()
    kernel, _ = killer.kernel(sources)
    functions, start, line = kernel["instantiation"].partition("template [[host_name")
    text, lines = sources.text(killer.family) + functions, [start + line]
    unexpected = [str(f) for f in check(text, lines) if f.message not in ACCEPTED]
    assert not unexpected, "\n".join(unexpected)
    (size,) = threadgroup_bytes(text, lines).values()
    assert (size > 0) == CASES[name] and size <= 32 * 1024


# ---- what is generated

_CALLS = {
    "ScoreMod": "float slope = 0.0f;\n  values[gid] = mod.score(values[gid], b, h, q, kv, slope) "
    "+ slope;",
    "MaskMod": "values[gid] = mod.sees(b, h, q, kv) ? 1.0f : 0.0f;",
}


def _text_with(mods: list[Mod]) -> str:
    """The text of the kernels, and behind it each mod and a kernel that calls it."""
    parts = [Sources().text("attention_flex_map")]
    for number, mod in enumerate(mods):
        kind = re.match(r"struct (\w+)", mod.text)[1]
        name = f"{kind}{number}"
        parts.append(re.sub(rf"^struct {kind}\b", f"struct {name}", mod.text))
        parts.append(
            f"kernel void call_{number}(device float* values [[buffer(0)]],\n"
            "    const device int* places [[buffer(1)]], constant FlexParams& flex [[buffer(2)]],\n"
            "    const device uchar* table [[buffer(3)]],\n"
            "    uint gid [[thread_position_in_grid]]) {\n"
            f"  {name} mod;\n"
            "  mod.captures = flex_captures(\n"
            "      table, table, table, table, table, table, table, table, flex);\n"
            "  const int b = places[4 * gid];\n  const int h = places[4 * gid + 1];\n"
            "  const int q = places[4 * gid + 2];\n  const int kv = places[4 * gid + 3];\n"
            f"  {_CALLS[kind]}\n}}\n"
        )
    return "".join(parts)


def _wrong_with(mods: list[Mod]) -> list[str]:
    given = [mod for mod in mods if mod.text]
    return [str(f) for f in check(_text_with(given)) if f.message not in ACCEPTED]


def _text(function: Callable, kind: str) -> Mod:
    return lower(trace(function, kind))


def _trees(part: int) -> Iterator[Mod]:
    """75 score_mods with their derivatives and 25 mask_mods, always the same."""
    seeded = Seeded(100 + part)
    for n in range(75):
        yield _text(seeded.scores(2 + n % 6), SCORE)
    for n in range(25):
        tree = seeded.masks(1 + n % 4)
        yield _text(lambda b, h, q, kv, tree=tree: tree(None, b, h, q, kv), MASK)


@pytest.mark.parametrize("part", (0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))))
def test_nothing_is_wrong_with_random_trees(part: int):
    mods = list(_trees(part))
    assert len({mod.text for mod in mods if mod.text}) > 85, "they are all alike"
    assert sum("kUnitSlope = false" in mod.text for mod in mods) > 30, "few have derivatives"
    assert not _wrong_with(mods)


@pytest.mark.parametrize("module", (flex_mods, published_mods, pytorch_mods))
def test_nothing_is_wrong_with_the_mods_of_people(module):
    mods = [_text(f, SCORE) for f in module.SCORES.values()]
    mods += [_text(f, MASK) for f in getattr(module, "MASKS", {}).values()]
    assert len(mods) > 10 and not _wrong_with(mods)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("derivative = ", "const double x = 1.0;\n    derivative = float(x) * ", "double"),
        ("return ", "auto f = [](float x) { return x; };\n    return ", "lambda"),
        ("return ", "printf(0);\n    return ", "printf"),
        ("return ", "// \u00e9\n    return ", "not ASCII"),
    ],
)
def test_what_is_wrong_is_said(before: str, after: str, said: str):
    """Else the tests above would show nothing."""
    mod = _text(flex_mods.SCORES["gated"], SCORE)
    assert before in mod.text
    found = _wrong_with([mod._replace(text=mod.text.replace(before, after, 1))])
    assert any(said in line for line in found), found
