"""The Metal texts of the mods of prove_flex.py: lowered where kernels are built, read on the GPU.

So the machine with the GPU needs neither the tracer nor its version of torch; its functions are
what the texts are compared with.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from .flex import Functions
from .flex_cases import FlexCase, on_meta
from .flex_mods import Tables
from .flex_plans import Mods
from .paths import ROOT

Entry = dict[str, str | list[str]]


def entry_of(case: FlexCase) -> Entry:
    """Texts, and the names of the tables that they read."""
    sys.path.insert(0, str(ROOT / "src"))
    planned = on_meta(case)
    tables = planned.tables()
    return texts_of(planned.functions(tables), tables)


def texts_of(functions: Functions, tables: Tables) -> Entry:
    from orchard_ops.flex.metal import lower
    from orchard_ops.flex.trace import MASK, SCORE, trace

    names = {id(x): name for name, x in tables.tensors.items()}
    entry: Entry = {}
    read: list[Tensor] = []
    mods: tuple[tuple[str, str, Callable[..., Tensor] | None], ...] = (
        ("score", SCORE, functions.score),
        ("mask", MASK, functions.mask),
    )
    for name, kind, function in mods:
        entry[name] = ""
        if function is not None:
            mod = lower(trace(function, kind), len(read))
            entry[name] = mod.text
            read += mod.captures
    return entry | {"captures": [names[id(x)] for x in read]}


def mods_of(entry: Entry, functions: Functions, tables: Tables) -> Mods:
    captures = tuple(tables.tensors[name] for name in entry["captures"])
    score, mask = (str(entry[name]) for name in ("score", "mask"))
    return Mods(score, mask, captures, functions.states, functions.block_q, functions.block_kv)


def read(path: Path) -> dict[str, Entry]:
    return json.loads(path.read_text())
