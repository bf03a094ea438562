"""Which edits make a mutant run again, what is drawn to be confirmed, and what is kept."""

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

from mutation import mutants, report, verdicts
from mutation.harness import DKV, DQ_FROM_DS, FORWARD, ROOT
from mutation.killers import killers as killers_of_attention
from mutation.killers import killers_of_caches, killers_of_flex
from mutation.verdicts import Outcome, Present, Progress

KILLERS = (
    SimpleNamespace(name="forward", family=FORWARD),
    SimpleNamespace(name="dkv", family=DKV),
    SimpleNamespace(name="dkv and dq", family=DKV, beside=(DQ_FROM_DS,)),
    SimpleNamespace(name="plan", family=None),
)
KERNELS = {"forward": "kernels of forward", "dkv": "kernels of dkv"}
VERDICTS = (  # the mutated file and function, and the outcome, by a name
    ("its own file", "shaders/forward.h", "attention_forward", Outcome("a", "killed", "forward")),
    ("shared, by forward", "shaders/keys.h", "sees", Outcome("b", "killed", "forward")),
    ("shared, by dkv", "shaders/keys.h", "sees", Outcome("c", "compiler", "dkv")),
    ("shared, by both", "shaders/keys.h", "sees", Outcome("d", "hang", "dkv and dq")),
    ("shared, survived", "shaders/keys.h", "sees", Outcome("e", "survived")),
    ("shared, same code", "shaders/keys.h", "sees", Outcome("f", "survived", same_code=True)),
    ("plan, by the plan", "native/plan/tiles.cpp", "padded_head_dim",
     Outcome("g", "killed", "plan")),
    ("plan, by forward", "native/plan/tiles.cpp", "padded_head_dim",
     Outcome("h", "killed", "forward")),
)  # fmt: skip
ALL = {name for name, *_ in VERDICTS}
SURVIVED = {"shared, survived", "shared, same code"}
NOTICED = ALL - SURVIVED
BY_FORWARD = {name for name, *_, outcome in VERDICTS if outcome.killer == "forward"}


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
EDITS = {  # the file, what is replaced by what, the verdicts that are no longer of the present
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
OWN = {  # the verdicts on mutants of the function that the edit changes
    "a family's file": {"its own file"},
    "a shared file": {name for name in ALL if name.startswith("shared")},
}


def _stamps(present: Present) -> dict[str, dict[str, str]]:
    return {name: present.stamp(file, function, o) for name, file, function, o in VERDICTS}


def _standing(present: Present, stamps: dict[str, dict[str, str]], standing: str) -> set[str]:
    """The verdicts of this standing."""
    return {n for n, f, function, o in VERDICTS
            if present.standing(f, function, o, stamps[n]) == standing}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_what_an_edit_leaves_of_verdicts(copy: Path, edit: str):
    """The plan's edits cost those of shaders whose killer's kernels are not known: "dkv and dq".
    Of what is no longer of the present, what was noticed in other functions is carried on.
    """
    file, before, after, gone = EDITS[edit]
    stamps = _stamps(_present(copy))
    _edit(copy, file, before, after)
    now = _present(copy)
    assert _standing(now, stamps, "present") == ALL - gone
    assert _standing(now, stamps, "carried") == gone - SURVIVED - OWN.get(edit, set())


def test_a_new_kernel_costs_what_survived_in_what_it_includes(copy: Path):
    stamps = _stamps(_present(copy))
    (copy / "shaders" / "decode.h").write_text('#pragma once\n\n#include "keys.h"\n')
    _edit(copy, "native/embed_shaders.py", "FAMILIES = {", 'FAMILIES = {"decode": "decode.h",')
    now = _present(copy, SimpleNamespace(name="decode", family="decode"))
    assert now.headers["decode"][0] == "shaders/decode.h"
    assert _standing(now, stamps, "present") == ALL - SURVIVED
    assert _standing(now, stamps, "carried") == set()


def test_killers_that_changed(copy: Path):
    stamps = _stamps(_present(copy))
    _edit(copy, "native/plan/tiles.cpp", "32768", "32767")
    for kernels, standing in (
        ("kernels of forward", "present"), ("others", "carried"), ("", "carried"),
    ):  # fmt: skip
        now = _present(copy)
        now.kernels["forward"] = kernels
        assert "its own file" in _standing(now, stamps, standing)
    gone = Present(copy, KILLERS[1:])
    assert _standing(gone, stamps, "").issuperset(BY_FORWARD)


def test_more_killers_cost_survivors_unless_the_machine_code_is_the_same(copy: Path):
    stamps = _stamps(_present(copy))
    now = _present(copy)
    now.killers = "others"
    assert _standing(now, stamps, "present") == ALL - {"shared, survived"}
    assert _standing(now, stamps, "") == {"shared, survived"}


def test_a_draw_is_the_same_until_the_sources_change():
    """A campaign that goes on confirms the same ones: at least 400, or a tenth."""
    few, many = [f"{i}" for i in range(300)], [f"{i}" for i in range(9000)]
    assert verdicts.drawn(few, "of these sources") == set(few)
    draw = verdicts.drawn(many, "of these sources")
    assert len(draw) == 900 and len(verdicts.drawn(many[:1000], "of these sources")) == 400
    assert draw == verdicts.drawn(list(reversed(many)), "of these sources")
    other = verdicts.drawn(many, "of others")
    assert len(draw & other) < 200  # 90 on average
    fewer = [key for key in many if key not in draw or key == min(draw)]
    assert min(draw) in verdicts.drawn(fewer, "of these sources")


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


def _mutant(key: str, file: str, function: str) -> mutants.Mutant:
    mutant = mutants.Mutant(file, function, "word", key, "", 1, 1, 0, 1, "", (1, 1))
    mutant.__dict__["key"] = key
    return mutant


SOME = [_mutant(outcome.key, file, function) for _, file, function, outcome in VERDICTS]


def _keys(names: set[str]) -> set[str]:
    return {outcome.key for name, *_, outcome in VERDICTS if name in names}


def _keep_all(root: Path, build: Path, kept: Path) -> None:
    """As a campaign that ran to its end."""
    progress = Progress(build, SOME, _present(root), kept)
    for *_, outcome in VERDICTS:
        progress.add(outcome)
    progress.keep()


def test_what_counts_is_kept_in_the_repository(copy: Path, tmp_path: Path):
    build, kept = tmp_path / "progress.jsonl", tmp_path / "verdicts.json"
    _keep_all(copy, build, kept)
    assert set(Progress(build, SOME, _present(copy), kept).outcomes) == _keys(ALL)
    build.unlink()
    again = Progress(build, SOME, _present(copy), kept)
    assert set(again.outcomes) == _keys(NOTICED) and again.suspects["a"] == "forward"
    assert again.present.kernels == {"forward": "kernels of forward", "dkv": "kernels of dkv"}
    assert not again.carried and not again.drawn

    _edit(copy, "native/plan/tiles.cpp", "32768", "32767")
    now = Present(copy, KILLERS)  # whose kernels nobody has looked at yet
    again = Progress(build, SOME, now, kept)
    assert again.carried == set(again.outcomes) == _keys(NOTICED) and again.hangs_on_kernels()
    again.decide({"forward": "kernels of forward", "dkv": "others"})
    assert set(again.outcomes) == _keys(NOTICED)
    assert again.carried == _keys(NOTICED) - {"a", "b"} == again.drawn


def test_what_is_drawn_is_confirmed_and_kept(copy: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(verdicts, "LEAST_DRAWN", 2)
    build, kept = tmp_path / "progress.jsonl", tmp_path / "verdicts.json"
    _keep_all(copy, build, kept)
    build.unlink()
    _edit(copy, *EDITS["another shared file"][:3])
    progress = Progress(build, SOME, _present(copy), kept)
    assert progress.carried == _keys(NOTICED - {"plan, by the plan"})
    draw = progress.drawn
    assert len(draw) == 2 and draw < progress.carried
    outcomes = {outcome.key: outcome for *_, outcome in VERDICTS}
    for key in draw:
        progress.add(outcomes[key])
    assert Progress(build, SOME, _present(copy), kept).drawn == draw  # a campaign that goes on
    progress.keep()
    again = Progress(tmp_path / "none", SOME, _present(copy), kept)
    assert again.drawn == draw and not again.carried & draw
    assert set(again.outcomes) == _keys(NOTICED) and len(again.carried) == 3

    # Other sources, another draw: of all that are of earlier ones.
    _edit(copy, "shaders/tile.h", "naught(thread", "nothing(thread")
    later = Progress(tmp_path / "none", SOME, _present(copy), kept)
    assert later.carried == again.carried | draw and len(later.drawn) == 2


def test_a_drawn_one_that_is_not_noticed_puts_its_function_in_doubt(copy: Path, tmp_path: Path):
    build, kept = tmp_path / "progress.jsonl", tmp_path / "verdicts.json"
    _keep_all(copy, build, kept)
    build.unlink()
    _edit(copy, *EDITS["another shared file"][:3])
    progress = Progress(build, SOME, _present(copy), kept)
    assert not progress.doubted()
    progress.add(Outcome("b", "survived"))
    assert progress.doubted() == {"c", "d"}
    progress.add(Outcome("c", "compiler", "dkv"))
    assert progress.doubted() == {"d"}


CAMPAIGNS = {
    "kernels and plan": (mutants.FILES, killers_of_attention, verdicts.VERDICTS),
    "caches": (mutants.CACHE_FILES, killers_of_caches, verdicts.CACHE_VERDICTS),
    "functions": (mutants.FLEX_FILES, killers_of_flex, verdicts.FLEX_VERDICTS),
}


@pytest.fixture(params=CAMPAIGNS)
def campaign(request: pytest.FixtureRequest) -> tuple[str, list[mutants.Mutant], Progress]:
    """What the repository has of the last one."""
    files, killers, path = CAMPAIGNS[request.param]
    everything = mutants.all_mutants(ROOT, files)
    present = Present(killers=killers(), mutated=files)
    return request.param, everything, Progress(Path("none"), everything, present, path)


def test_the_docs_count_what_is_kept(campaign: tuple[str, list[mutants.Mutant], Progress]):
    """What has not run since an edit is counted as open, and what is carried as that."""
    name, everything, progress = campaign
    assert all(not outcome.survived for outcome in progress.outcomes.values())
    found = report.Report(everything, progress, mutants.equivalences())
    docs = report.DOCS.read_text()
    assert report.in_docs(docs, name) == found.sentence(name), "run `make mutants`"


def test_as_many_are_drawn_as_the_rule_asks_for(
    campaign: tuple[str, list[mutants.Mutant], Progress],
):
    _, _, progress = campaign
    population = len(progress.carried | progress.drawn)
    share = max(verdicts.LEAST_DRAWN, population // verdicts.SHARE_DRAWN)
    assert len(progress.drawn) >= min(population, share)


def test_the_report_counts_the_same():
    files, _, path = CAMPAIGNS["kernels and plan"]
    everything = mutants.all_mutants(ROOT, files)
    progress = Progress(Path("none"), everything, Present(), path)
    facts = json.loads((ROOT / "tests/proof/mutation/report.json").read_text())
    found = report.Report(everything, progress, mutants.equivalences()).as_dict()
    assert {name: facts[name] for name in found} == found
