"""What the repository keeps of an unfinished run of benchmarks.nvidia.prove."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

pytest.importorskip("simulator", reason="kernels are made by the simulator's Metal engine")

from benchmarks.nvidia import build, cases, controls, exact, prove
from benchmarks.nvidia.plans import Planner

ROOT = Path(__file__).resolve().parents[2]
KEPT = prove.RESULTS / "proof.jsonl"


def test_a_run_goes_on_where_another_machine_has_stopped(tmp_path: Path):
    record = {"group": "every variant", "case": "a case", "kernels": ["a kernel"]}
    kept, own = tmp_path / "kept.jsonl", tmp_path / "proof.jsonl"
    kept.write_text(json.dumps({"digest": "these", "record": record}) + "\n")
    assert list(prove.Progress(own, "these", kept).known) == [("every variant", "a case")]
    assert not prove.Progress(own, "others", kept).known
    progress = prove.Progress(own, "these", kept)
    progress.add(prove.Record("exact", "another"))
    assert len(prove.Progress(own, "these", kept).known) == 2
    assert len(kept.read_text().splitlines()) == 1


def test_the_docs_count_what_has_run_of_the_present_kernels():
    made_of = hashlib.sha256()
    for family in build.embed_shaders.FAMILIES:
        made_of.update(build.family_text(family).encode())
    lines = [json.loads(line) for line in KEPT.read_text().splitlines()]
    present = [x["record"] for x in lines if x["digest"] == made_of.hexdigest()[:12]]
    assert not [record["case"] for record in present if record["failure"]]
    cases = {(record["group"], record["case"]) for record in present}
    docs = (ROOT / "docs" / "proof.md").read_text()
    proof = json.loads(KEPT.with_suffix(".json").read_text())
    if proof["environment"]["sources"]["digest"] == made_of.hexdigest()[:12]:
        assert not any(record["failure"] for record in proof["records"])
        said = f"of all {len(proof['kernels'])} others, on an H200, none of {len(proof['records'])}"
        assert said in docs
    else:
        assert f"of the present ones {len(cases)} problems have run so far, and none failed" in docs


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Planner:
    return build.build_planner(tmp_path_factory.mktemp("planner") / "libplanner.so")


@pytest.fixture(scope="module")
def made(planner: Planner) -> set[str]:
    """The kernels that build.py makes for prove.py."""
    return set(build.kernels_to_prove(planner))


def test_every_problem_has_its_kernels(planner: Planner, made: set[str]):
    planted = [case for _, case, _ in controls.disturbed_parameters()]
    groups = {group.__name__: list(group()) for group in (cases.long, cases.small, exact.cases)}
    for name, problems in (groups | {"controls": planted}).items():
        assert set(cases.kernels_of(planner, problems)) <= made, name


def test_every_kernel_has_a_problem(planner: Planner, made: set[str]):
    problems = [*cases.every_variant(cases.head_dims(list(made)))]
    for group in (*cases.GROUPS.values(), cases.long):
        problems += group()
    assert made == set(cases.kernels_of(planner, problems))
