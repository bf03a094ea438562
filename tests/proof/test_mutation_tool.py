"""The mutation tool: its killers pass on the sources as they are, and it judges mutants rightly."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("simulator", reason="mutants run on the simulator's Metal engine")
pytest.importorskip("rich")
pytest.importorskip("elftools")

from mutation import mutants, report, runner
from mutation.harness import DQ, FORWARD, ROOT, Sources
from mutation.killers import killers, killers_of_caches, killers_of_flex, machine_code
from mutation.operators import OPERATORS
from mutation.sites import Code
from representative import share

SOURCES = Sources()


KILLERS = (*killers(), *killers_of_caches(), *killers_of_flex())


@pytest.mark.parametrize("killer", share(KILLERS, 20, lambda killer: killer.name))
def test_without_a_mutant(killer):
    killer.run(SOURCES)


# ---- mutants

SNIPPET = """
// a comment: x < y
template <typename T, int N>
METAL_FUNC T clamp_sum(thread const T* x, int length, constant Params& params) {
  T sum = T(0);
  for (int i = 0; i < N; i++) {
    if (i < length && params.limit != 0) {
      sum += x[i] * 2.0f;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return sum > params.limit ? params.limit - 1 : vec<T, 2>(sum).x;
}
"""


def _changes(operator: str) -> set[tuple[str, str]]:
    code = Code(SNIPPET)
    return {(code.text(e.begin, e.end), e.text) for e in OPERATORS[operator](code)}


def test_operators():
    assert _changes("relation") == {("<", "<="), (">", ">="), ("!=", "==")}
    assert _changes("connective") == {("&&", "||")}
    assert ("length", "(length) - 1") in _changes("bound")
    guard = "i < length && params.limit != 0"
    assert {(guard, "i < length"), (guard, "params.limit != 0")} <= _changes("drop_operand")
    assert {("x[i] * 2.0f", "x[i]"), ("x[i] * 2.0f", "2.0f")} <= _changes("drop_operand")
    assert _changes("condition") == {
        (guard, "true"),
        (guard, "false"),
        ("sum > params.limit", "true"),
        ("sum > params.limit", "false"),
    }
    assert _changes("swap_operands") == {("params.limit - 1", "(1) - (params.limit)")}
    assert _changes("index") == {("i", "(i) + 1"), ("i", "(i) - 1")}
    assert _changes("step") == {("++", " += 2")}
    assert _changes("assignment") == {("+=", "-="), ("+=", "=")}
    assert _changes("drop_statement") == {
        ("sum += x[i] * 2.0f", ""),
        ("threadgroup_barrier(mem_flags::mem_threadgroup)", ""),
    }
    assert {("2.0f", "4.0f"), ("2.0f", "0.0f"), ("1", "2"), ("1", "0")} <= _changes("literal")
    assert ("x", "y") in _changes("word")


def test_brackets_and_operators_are_told_apart():
    code = Code(SNIPPET)
    assert [code.words[i] for i in range(len(code)) if code.is_binary(i)] == [
        "<",
        "<",
        "&&",
        "!=",
        "*",
        ">",
        "-",
    ]
    assert "comment" not in code.words


def test_a_key_outlives_edits_elsewhere():
    moved = SNIPPET.replace("T sum = T(0);", "T other = T(0);\n  T sum = other;")
    keys = [{m.key for m in mutants.mutants_of("a.h", text)} for text in (SNIPPET, moved)]
    assert len(keys[0] & keys[1]) > 0.8 * len(keys[0])


@pytest.fixture(scope="module")
def all_of_them() -> list[mutants.Mutant]:
    return mutants.all_mutants(ROOT)


def test_all_files_are_mutated(all_of_them):
    assert {m.file for m in all_of_them} == set(mutants.FILES)
    sources = {*(ROOT / "shaders").glob("*.h"), *(ROOT / "native" / "plan").glob("*.cpp")}
    sources.remove(ROOT / "native" / "plan" / "plan_cache.cpp")
    mutated = {*mutants.FILES, *mutants.CACHE_FILES, *mutants.FLEX_FILES}
    assert {str(p.relative_to(ROOT)) for p in sources} == mutated
    for files in (mutants.CACHE_FILES, mutants.FLEX_FILES):
        assert {m.file for m in mutants.all_mutants(ROOT, files)} == set(files)
    assert len({m.key for m in all_of_them}) == len(all_of_them)
    assert {m.operator for m in all_of_them} == set(OPERATORS)
    barriers = [m for m in all_of_them if "barrier" in m.before and not m.text]
    assert Counter(m.before.split("<")[0].split("(")[0] for m in barriers) == {
        "threadgroup_barrier": 9,
        "barrier_if": 4,
    }


def test_the_list_of_equivalent_mutants_is_up_to_date(all_of_them):
    listed = mutants.equivalences()
    others = (*mutants.CACHE_FILES, *mutants.FLEX_FILES)
    every = (*all_of_them, *mutants.all_mutants(ROOT, others))
    changes = {(m.file, m.function, m.before, m.after) for m in every}
    for entry in listed:
        assert len(entry.reason) > 20, entry
        for before, after in entry.changes:
            assert (entry.file, entry.function, before, after) in changes, (before, after)


# ---- judging


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in ("shaders", "native"):
        shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


# In a process of its own, as the campaign is: the runner forks, which a process with threads
# (torch's, the simulator's) does not survive.
JUDGE = """
import json, sys
from collections import Counter
from pathlib import Path
from mutation import runner
from mutation.harness import Sources
from mutation.killers import killers, use_those_of_flex
copy, limit, of, *names = sys.argv[1:]
if of == "flex":
    use_those_of_flex()
runner.LAUNCH_LIMIT = float(limit)
tests = [k for k in killers() if k.name in names]
assert len(tests) == len(names)
print("FOUND" + json.dumps(runner.run_mutant(tests, Sources(Path(copy), Sources().compile_plan()))))
"""


def _judge(
    copy: Path, file: str, before: str, after: str, *names: str, limit: float = 30.0, of: str = ""
) -> dict:
    path = copy / file
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    folders = [str(ROOT / folder) for folder in ("", "tests", "tests/proof", "src")]
    done = subprocess.run(
        [sys.executable, "-c", JUDGE, str(copy), str(limit), of, *names],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("FOUND")[1])


FIRST = f"{FORWARD}: windows, groups, dropout, elements"


def test_a_mutant_of_flex_is_killed(copy: Path):
    """By its own killers, of which each has a name of its own."""
    names = [k.name for k in killers_of_flex()]
    assert len(names) == len(set(names))
    found = _judge(
        copy, "shaders/flex_arithmetic.h", "b == T(0) ? T(0)", "b != T(0) ? T(0)",
        "flex functions of int", of="flex",
    )  # fmt: skip
    assert found["status"] == "killed" and "divide" in found["message"]


def test_a_mutant_is_killed(copy: Path):
    found = _judge(copy, "shaders/keys.h", "key <= row +", "key < row +", FIRST)
    assert found["status"] == "killed" and found["killer"] == FIRST


def test_a_mutant_that_does_not_compile(copy: Path):
    found = _judge(copy, "shaders/keys.h", "key <= row +", "key <= rows +", FIRST)
    assert found["status"] == "compiler"


def test_a_mutant_that_hangs(copy: Path):
    found = _judge(copy, "shaders/forward.h", "block++", "block += 0", FIRST, limit=1.5)
    assert found["status"] == "hang"


def test_a_missing_barrier_is_killed_by_the_checks(copy: Path):
    barrier = "barrier_if<(BUFFERS > 0)>();  // the previous block"
    found = _judge(copy, "shaders/staging.h", barrier, "// the", f"{DQ}: kitchen sink, checked")
    assert found["status"] == "killed" and "KernelError" in found["message"]


def test_a_change_without_effect_survives(copy: Path):
    found = _judge(copy, "shaders/forward.h", "// Heads run fastest", "// Heads", FIRST)
    assert found["status"] == "survived"
    next(k for k in killers() if k.name == FIRST).run(SOURCES)
    assert found["code"].items() <= machine_code().items()


# ---- the order of killers

LINES = "shaders/keys.h", (10, 11)


def _mutant(key: str, file: str = LINES[0], lines: tuple[int, int] = LINES[1]) -> mutants.Mutant:
    return mutants.Mutant(file, "visible", "word", key, "", 1, lines[0], 0, 1, "", lines)


def test_killers_whose_kernels_hold_the_statement_go_first(monkeypatch):
    held = {"plain.so": frozenset({("masks.h", 10)}), "masked.so": frozenset({("keys.h", 11)})}
    some = [k for k in killers() if k.family == FORWARD][:2]
    monkeypatch.setattr(runner.killing, "killers", lambda: some)
    plain, masked = (k.name for k in some)
    original = runner.Original(
        {},
        frozenset(),
        {plain: ["plain.so"], masked: ["masked.so"]},
        {LINES[0]: {FORWARD}},
        held,
    )
    assert runner.relevant(_mutant("held"), original) == some[::-1]
    assert runner.relevant(_mutant("a constant", lines=(20, 20)), original) == some


def test_what_killed_others_of_the_function_goes_first():
    suspects = runner.Suspects({"known": "its own"})
    for mutant, killer, seconds in (("a", "slow", 9.0), ("b", "fast", 1.0), ("c", "fast", 1.5)):
        suspects.learn(_mutant(mutant), runner.Outcome(mutant, "killed", killer, "", seconds))
    suspects.learn(_mutant("d"), runner.Outcome("d", "compiler", "any", "", 0.1))
    assert suspects.of(_mutant("e")) == ["fast", "slow"]
    assert suspects.of(_mutant("f", file="shaders/tile.h")) == []


def test_killers_of_scores_are_among_the_machine_code():
    before = set(machine_code())
    next(k for k in killers() if k.name == f"{FORWARD}: scores, softcap").run(SOURCES)
    softcap = [name for name in machine_code() if "softcap" in name]
    assert softcap, sorted(set(machine_code()) - before)


# ---- the report


def test_report_of_outcomes(all_of_them):
    some = all_of_them[:4]
    states = ("killed", "compiler", "survived", "survived")
    outcomes = {m.key: runner.Outcome(m.key, s, "k", "m") for m, s in zip(some, states)}
    last = some[3]
    entry = mutants.Equivalence(
        last.file, last.function, "why", frozenset({(last.before, last.after)})
    )
    progress = SimpleNamespace(outcomes=outcomes, carried={some[0].key}, drawn={some[1].key})
    result = report.Report(some, progress, [entry])
    facts = result.as_dict()
    assert (facts["carried"], facts["drawn"]) == (1, 1)
    assert "1 were drawn at random" in result.markdown(facts)
    assert "1 of these have" in result.markdown(facts)
    counts = {k: n for k, n in facts["all"].items() if n}
    assert counts == {"killed": 1, "compiler": 1, "equivalent": 1, "survived": 1}
    assert facts["survivors"] == [str(some[2])]
    assert "why" in result.markdown(facts)


@pytest.fixture
def last_campaign() -> dict:
    return json.loads((ROOT / "tests" / "proof" / "mutation" / "report.json").read_text())


def test_the_last_campaign_is_of_these_sources(last_campaign: dict, all_of_them):
    """The report says how many of their mutants have not run."""
    assert last_campaign["sources"] == runner.sources_digest(), "run `make mutants` again"
    assert last_campaign["mutants"] + last_campaign["not_run"] == len(all_of_them)


def test_nothing_survived_the_last_campaign(last_campaign: dict):
    assert last_campaign["all"]["survived"] == 0 and last_campaign["survivors"] == []
