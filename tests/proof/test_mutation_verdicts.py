"""Which edits make a mutant run again, and that verdicts are kept."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("simulator", reason="mutants run on the simulator's Metal engine")
pytest.importorskip("rich")
pytest.importorskip("elftools")

from mutation import mutants, verdicts
from mutation.harness import DKV, DQ_FROM_DS, FORWARD, ROOT
from mutation.killers import killers_of_caches, killers_of_flex
from mutation.verdicts import Outcome, Present, Progress

KILLERS = (
    SimpleNamespace(name="forward", family=FORWARD),
    SimpleNamespace(name="dkv", family=DKV),
    SimpleNamespace(name="dkv and dq", family=DKV, beside=(DQ_FROM_DS,)),
    SimpleNamespace(name="plan", family=None),
)
KERNELS = {"forward": "kernels of forward", "dkv": "kernels of dkv"}
VERDICTS = (  # the mutated file and the outcome, by a name
    ("its own file", "shaders/forward.h", Outcome("a", "killed", "forward")),
    ("shared, by forward", "shaders/keys.h", Outcome("b", "killed", "forward")),
    ("shared, by dkv", "shaders/keys.h", Outcome("c", "compiler", "dkv")),
    ("shared, by both", "shaders/keys.h", Outcome("d", "hang", "dkv and dq")),
    ("shared, survived", "shaders/keys.h", Outcome("e", "survived")),
    ("shared, same code", "shaders/keys.h", Outcome("f", "survived", same_code=True)),
    ("plan, by the plan", "native/plan/tiles.cpp", Outcome("g", "killed", "plan")),
    ("plan, by forward", "native/plan/tiles.cpp", Outcome("h", "killed", "forward")),
)
ALL = {name for name, _, _ in VERDICTS}
OF_SHADERS = {name for name in ALL if not name.startswith("plan")}
SURVIVED = {"shared, survived", "shared, same code"}
BY_FORWARD = {name for name, _, outcome in VERDICTS if outcome.killer == "forward"}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in ("shaders", "native"):
        shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


def _present(root: Path, *more: SimpleNamespace) -> Present:
    present = Present(root, (*KILLERS, *more))
    present.kernels = dict(KERNELS)
    return present


def _edit(root: Path, file: str, before: str, after: str) -> None:
    path = root / file
    text = path.read_text()
    assert before in text, before
    path.write_text(text.replace(before, after, 1))


BY_PLAN = {"plan, by the plan", "plan, by forward"}
EDITS = {  # the file, what is replaced by what, the verdicts that no longer count
    "a comment": ("shaders/keys.h", "// ", "// Another comment. ", set()),
    "a family's file": (
        "shaders/forward.h", "const int kDepth", "const int kMore = 0;\n  const int kDepth",
        BY_FORWARD | SURVIVED,
    ),
    "a second family's": (
        "shaders/backward_dq_from_ds.h", "const int kDepth",
        "const int kMore = 0;\n  const int kDepth", {"shared, by both", *SURVIVED},
    ),
    "a file of neither": ("shaders/backward_dsinks.h", ") {", ") {\n  const int more = 0;", set()),
    "a shared file": ("shaders/keys.h", "key <= row +", "key < row +", ALL - {"plan, by the plan"}),
    "another shared file": (
        "shaders/tile.h", "zero(thread", "naught(thread", ALL - {"plan, by the plan"}
    ),
    "a field that all name": (
        "shaders/params.h", "int32_t q_len", "int64_t q_len", ALL,
    ),
    "a field that none names": (
        "shaders/params.h", "int32_t q_len;", "int32_t q_len;\n  int32_t splits;",
        BY_PLAN | SURVIVED | {"shared, by both"},
    ),
    "the plan": (
        "native/plan/tiles.cpp", "32768", "32767", BY_PLAN | SURVIVED | {"shared, by both"}
    ),
    "a header of the plan": (
        "native/plan/tiles.h", "kSimdgroups = 4", "kSimdgroups = 2",
        BY_PLAN | SURVIVED | {"shared, by both"},
    ),
    "what keeps plans": ("native/plan/plan_cache.cpp", "{", "{ ;", set()),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_costs_the_verdicts_that_it_may_change(copy: Path, edit: str):
    """The plan's edits cost those of shaders whose killer's kernels are not known: "dkv and dq"."""
    file, before, after, gone = EDITS[edit]
    earlier = _present(copy)
    stamps = {name: earlier.stamp(f, outcome) for name, f, outcome in VERDICTS}
    _edit(copy, file, before, after)
    now = _present(copy)
    assert {n for n, f, outcome in VERDICTS if now.counts(f, outcome, stamps[n])} == ALL - gone


def test_a_new_kernel_costs_what_survived_in_what_it_includes(copy: Path):
    earlier = _present(copy)
    stamps = {name: earlier.stamp(f, outcome) for name, f, outcome in VERDICTS}
    (copy / "shaders" / "decode.h").write_text('#pragma once\n\n#include "keys.h"\n')
    _edit(copy, "native/embed_shaders.py", "FAMILIES = {", 'FAMILIES = {"decode": "decode.h",')
    now = _present(copy, SimpleNamespace(name="decode", family="decode"))
    assert now.headers["decode"][0] == "shaders/decode.h"
    counting = {n for n, f, outcome in VERDICTS if now.counts(f, outcome, stamps[n])}
    assert counting == ALL - SURVIVED


def test_killers_that_changed(copy: Path):
    earlier = _present(copy)
    stamps = {name: earlier.stamp(f, outcome) for name, f, outcome in VERDICTS}
    _edit(copy, "native/plan/tiles.cpp", "32768", "32767")
    for kernels, counts in (("kernels of forward", True), ("others", False), ("", False)):
        now = _present(copy)
        now.kernels["forward"] = kernels
        _, file, outcome = VERDICTS[0]
        assert now.counts(file, outcome, stamps["its own file"]) == counts
    gone = Present(copy, KILLERS[1:])
    assert not gone.counts("shaders/keys.h", VERDICTS[1][2], stamps["shared, by forward"])


def test_more_killers_cost_survivors_unless_the_machine_code_is_the_same(copy: Path):
    stamps = {name: _present(copy).stamp(f, outcome) for name, f, outcome in VERDICTS}
    now = _present(copy)
    now.killers = "others"
    counting = {n for n, f, outcome in VERDICTS if now.counts(f, outcome, stamps[n])}
    assert counting == ALL - {"shared, survived"}


def test_verdicts_of_all_sources_at_once(copy: Path):
    """As campaigns stamped them before: they count for the very same words."""
    now = _present(copy)
    stamp = {"sources": now.sources, "killers": "earlier ones"}
    counting = {n for n, f, outcome in VERDICTS if now.counts(f, outcome, stamp)}
    assert counting == ALL - {"shared, survived"}
    stamp["sources"] = "others"
    assert not any(now.counts(f, outcome, stamp) for _, f, outcome in VERDICTS)


def test_all_declarations_of_params_are_told_apart():
    text = (ROOT / verdicts.PARAMS).read_text()
    found = verdicts.declarations(text)
    assert {"kBufferQuery", "q_len", "dropout_seed", "ORCHARD_THREADS"} <= set(found)
    lines = " ".join(line for lines in found.values() for line in lines)
    rest = re.sub(r"//.*", "", text)
    for line in rest.splitlines():
        line = " ".join(line.split())
        if line and line not in lines:
            assert re.match(r"#(pragma|ifdef|else|endif|include)|(struct|enum) \w+ {$|};$|using "
                            r"|static_assert|\"host and", line), line  # fmt: skip


# ---- on disk


def _mutant(key: str, file: str) -> mutants.Mutant:
    mutant = mutants.Mutant(file, "f", "word", key, "", 1, 1, 0, 1, "", (1, 1))
    mutant.__dict__["key"] = key
    return mutant


def test_what_counts_is_kept_in_the_repository(copy: Path, tmp_path: Path):
    some = [_mutant(outcome.key, file) for _, file, outcome in VERDICTS]
    build, kept = tmp_path / "progress.jsonl", tmp_path / "verdicts.json"
    progress = Progress(build, some, _present(copy), kept)
    for _, _, outcome in VERDICTS:
        progress.add(outcome)
    progress.keep()
    noticed = {outcome.key for _, _, outcome in VERDICTS if not outcome.survived}
    assert set(Progress(build, some, _present(copy), kept).outcomes) == {m.key for m in some}
    build.unlink()
    again = Progress(build, some, _present(copy), kept)
    assert set(again.outcomes) == noticed and again.suspects["a"] == "forward"
    assert again.present.kernels == {"forward": "kernels of forward", "dkv": "kernels of dkv"}

    _edit(copy, "native/plan/tiles.cpp", "32768", "32767")
    now = Present(copy, KILLERS)  # whose kernels nobody has looked at yet
    again = Progress(build, some, now, kept)
    assert not again.outcomes and again.hangs_on_kernels()
    again.decide({"forward": "kernels of forward", "dkv": "others"})
    assert set(again.outcomes) == {"a", "b"}


def test_the_last_campaign_kept_its_verdicts():
    """They are of these sources, and the report counts the same."""
    everything = mutants.all_mutants(ROOT)
    progress = Progress(Path("none"), everything, Present())
    report = json.loads((ROOT / "tests/proof/mutation/report.json").read_text())
    noticed = sum(report["all"][status] for status in ("killed", "compiler", "hang", "crash"))
    assert len(progress.outcomes) == noticed
    listed = mutants.equivalences()
    rest = [m for m in everything if m.key not in progress.outcomes]
    assert sum(any(e.covers(m) for e in listed) for m in rest) == report["all"]["equivalent"]


OTHERS = {
    "caches": (mutants.CACHE_FILES, killers_of_caches, verdicts.CACHE_VERDICTS),
    "functions": (mutants.FLEX_FILES, killers_of_flex, verdicts.FLEX_VERDICTS),
}


@pytest.mark.parametrize("of", OTHERS)
def test_the_verdicts_on_other_kernels_are_those_that_the_docs_count(of: str):
    """A campaign that has not run to its end leaves no verdict on the rest."""
    files, killers, path = OTHERS[of]
    everything = mutants.all_mutants(ROOT, files)
    present = Present(killers=killers(), mutated=files)
    kept = Progress(Path("none"), everything, present, path).outcomes
    assert all(not outcome.survived for outcome in kept.values())
    listed = mutants.equivalences()
    rest = [mutant for mutant in everything if mutant.key not in kept]
    equivalent = sum(any(e.covers(mutant) for e in listed) for mutant in rest)
    docs = " ".join((ROOT / "docs" / "mutation.md").read_text().split())
    counts = re.search(
        rf"The campaign of {of} has (\d+) mutants[^:.]*: (\d+) are noticed, (\d+) are listed as "
        r"equivalent, and (\d+) are open", docs,
    )  # fmt: skip
    assert counts, f"docs/mutation.md has no counts of {of}"
    numbers = [len(everything), len(kept), equivalent, len(rest) - equivalent]
    assert [int(n) for n in counts.groups()] == numbers
