"""Trees of operations as score_mod or mask_mod, drawn and judged: their Metal text, in check mode,
against float64 autograd (tests/flex)."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

FLEX = str(Path(__file__).resolve().parents[2] / "flex")
if FLEX not in sys.path:
    sys.path.append(FLEX)

_AT_ONCE = 12
_KINDS = ("scores", "scores", "masks", "integers")


@dataclass(frozen=True)
class TreesExample:
    """A few functions, which one compilation serves."""

    kind: str
    written: tuple[str, ...]

    def to_json(self) -> str:
        return json.dumps({"problem": "trees", **asdict(self)})

    @staticmethod
    def from_fields(fields: dict[str, Any]) -> TreesExample:
        return TreesExample(fields["kind"], tuple(fields["written"]))


@st.composite
def trees_examples(draw: st.DrawFn) -> TreesExample:
    import flex_trees

    kind = draw(st.sampled_from(_KINDS))
    trees = st.lists(getattr(flex_trees, kind), min_size=_AT_ONCE, max_size=_AT_ONCE)
    return TreesExample(kind, tuple(tree.written for tree in draw(trees)))


def check_trees(example: TreesExample) -> str:
    """Values and derivatives of scores, masks and integers exactly; which path it took."""
    import tree_agreement
    from flex_trees import read

    getattr(tree_agreement, f"agree_as_{example.kind}")([read(x) for x in example.written])
    return "metal"
