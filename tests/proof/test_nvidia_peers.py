"""The peers' kernels without a GPU: each text, launched on the CPU engine, against float64."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from simulator import engine

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.nvidia import (  # noqa: E402
    build,
    peer,
    peers,
    peers_report,
    peers_speed,
    reference,
    timing,
)
from benchmarks.nvidia.driver import Launch, turned  # noqa: E402
from benchmarks.nvidia.paths import RESULTS  # noqa: E402
from benchmarks.nvidia.peers import contenders, gate, packages, pytorch  # noqa: E402
from benchmarks.nvidia.peers.launches import Text  # noqa: E402
from benchmarks.nvidia.peers.problems import Problem, problems  # noqa: E402

# They are downloads, which a test run does not make.
fetched = pytest.mark.skipif(
    not all(package.is_here for package in packages.ALL),
    reason=f"the peers' packages are not in build/peers: `{packages.COMMAND}` fetches them",
)
metal_headers = pytest.mark.skipif(
    not (peer.INCLUDE / "ATen/native/mps/kernels/PrefillAttention.h").exists(),
    reason="this torch has no Metal attention headers",
)


class Engine:
    """driver.Kernels on the CPU engine: kernels by their texts, on CPU tensors."""

    def __init__(self, texts):
        self._texts = texts

    def text(self, name):
        return self._texts[name]().source

    def attributes(self, name):
        return {"registers": 1, "shared_bytes": 2, "local_bytes": 0}

    def prepare(self, name, groups, threads, buffers, params):
        text = self._texts[name]()
        library = engine.compile(text.source, only=[name], **text.options)
        group = (*threads, 1, 1)[:3]
        grid = tuple(n * m for n, m in zip((*groups, 1)[:3], group))
        value = torch.frombuffer(bytearray(params[1]), dtype=torch.uint8).clone()
        tensors = {**buffers, params[0]: value}

        def start():
            bound = {i: engine.Buffer(x.data_ptr(), x.nbytes, True) for i, x in tensors.items()}
            library.launch(name, grid, group, bound)

        return Launch(name, start)


def small(problem: Problem) -> Problem:
    """Three blocks of 32 rows, one key/value head."""
    return replace(problem, length=96, batch=1, num_heads=problem.group, num_kv_heads=1)


def operands(problem: Problem) -> contenders.Operands:
    """With out and row_stats by float64 mathematics."""
    x = contenders.Operands(problem, "cpu")
    q, k, v, dout = (x.tensors[name] for name in ("q", "k", "v", "dout"))
    exact = reference.attention(q, k, v, dout, None, problem.scoring(), torch.float64)
    log2 = (exact.lse / math.log(2)).float()
    x.take(exact.out.to(q.dtype), torch.stack((log2, torch.zeros_like(log2)), -1))
    return x


CASES = {
    f"{p.dtype}-d{p.head_dim}-{p.mask}" + f"-group{p.group}" * (p.group > 1): small(p)
    for p in problems()
    if p.batch == 1
}


@fetched
@pytest.mark.parametrize("case", CASES)
def test_peers_agree_with_float64(case):
    problem = CASES[case]
    x = operands(problem)
    gates = {rounded: gate.Gate(problem, x.tensors, rounded) for rounded in (False, True)}
    found = list(peers.entrants(problem))
    assert "PyTorch" in {entrant.peer for entrant in found}
    for entrant in found:
        archive = Engine({step.kernel: step.text for step in entrant.steps})
        contender = contenders.of_entrant(archive, x, entrant, "both", None)
        contender.start()
        errors, _ = gates[entrant.rounded_query].check(contender.results, strict=False)
        assert errors.keys() >= ({"dq", "dk", "dv"} if entrant.backward else {"out"})


def test_every_peer_is_timed():
    found = {(entrant.peer, entrant.backward) for p in problems() for entrant in peers.entrants(p)}
    assert found == {
        ("PyTorch", False),
        ("MLX", False),
        ("mlx-mfa", True),
        ("ccv/MFA", False),
        ("ccv/MFA", True),
        ("mlx-train-perf", False),
        ("mlx-train-perf", True),
    }


def test_kernels_have_one_text_each():
    """An archive holds a kernel once: what differs has to differ in its name."""
    seen = {}
    for problem in problems():
        for name, step in peers.steps(problem).items():
            of_text = (problem.dtype, problem.head_dim, step.part)
            if "mlx_mfa" in name:
                of_text += (problem.causal, problem.group)
            assert seen.setdefault(name, of_text) == of_text


def test_a_package_that_is_not_here_says_how_to_fetch_it(monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"mlx-metal 0\.32\.4 is not in .*nvidia\.peers`"):
        packages.MLX.file("mlx")


def test_a_header_without_what_is_to_be_edited(monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "FOLDER", tmp_path)
    folder = packages.MLX.folder
    (folder / "root").mkdir(parents=True)
    (folder / "DIGEST").write_text("abc")
    (folder / "root" / "a.h").write_text("one two")
    edited = packages.MLX.edited("root", "a.h", {" two": ""})
    assert (edited / "a.h").read_text() == "one"
    with pytest.raises(ValueError, match=r"a\.h has no 'three'"):
        packages.MLX.edited("root", "a.h", {"three": ""})


# ---- all of it, on the CPU, beside the one peer that needs no download


class FakeClock:
    """A peer takes 3 ms where ours takes 2; a second run is a run."""

    def turns(self, works):
        for start in works.values():
            start()
        return {name: [2.0 if i < 2 else 3.0] * 3 for i, name in enumerate(works)}

    def parts(self, order):
        return dict.fromkeys([part for part, _ in order], 1.0)


@pytest.fixture(scope="module")
def planner(tmp_path_factory):
    return build.build_planner(tmp_path_factory.mktemp("planner") / "lib.so")


PROBLEM = Problem("bfloat16", 64, 96, True, num_heads=2, num_kv_heads=1)


def bench(planner, monkeypatch, clock=None):
    only = [e for e in pytorch.entrants(PROBLEM) if e.rounded_query]

    def entrants(problem):
        return (e for e in pytorch.entrants(problem) if e.rounded_query)

    monkeypatch.setattr(peers, "entrants", entrants)
    texts = {step.kernel: step.text for entrant in only for step in entrant.steps}
    for scratch_bytes in (peers_speed.DEFAULT_SCRATCH, 0):
        used = PROBLEM.forward_kernels(planner) + PROBLEM.backward_kernels(planner, scratch_bytes)
        for kernel in used:
            texts[kernel.name] = lambda kernel=kernel: Text(build.source_of(kernel))
    kernels = {mode: Engine(texts) for mode in peers_speed.MODES}
    return peers_speed.Bench(kernels, planner, clock or FakeClock(), "cpu")


@metal_headers
def test_run(planner, monkeypatch):
    run = bench(planner, monkeypatch)
    run.planted_faults(PROBLEM)
    run.run(PROBLEM)
    (record,) = run.records
    assert not record.failure
    found = [(e.who, e.backward, e.mode, e.failure, e.strict) for e in record.entries]
    assert found == [
        ("ours", False, "both", "", ""),
        ("ours again", False, "both", "", ""),
        ("ours", True, "both", "", ""),
        ("ours, seven products", True, "both", "", ""),
        ("ours again", True, "both", "", ""),
        ("PyTorch 2.13", False, "both", "", ""),
    ]
    (cell,) = peers_report.cells(asdict(record), False, "equal-rate").values()
    assert cell.median == 1.5 and not cell.misses
    assert set(record.entries[2].parts) == {"delta", "dkv", "dq"}
    assert set(run.attributes()["native"]) == set(run.names(PROBLEM)["native"])
    assert run.names(PROBLEM)["equal-rate"] == []


@metal_headers
def test_a_second_run_adds_to_the_first(planner, monkeypatch, tmp_path):
    """What it ran anew replaces what the first had; the rest is kept, with where it ran."""
    monkeypatch.setattr(peers_speed, "describe", lambda sources: RESULT["runs"][0])
    run = bench(planner, monkeypatch)
    run.run(PROBLEM)
    old = {**RESULT["records"][0], "problem": str(PROBLEM)}
    earlier = {**RESULT, "records": [*RESULT["records"], old]}
    peers_speed._write(run, earlier, tmp_path)
    result = json.loads((tmp_path / "peers.json").read_text())
    assert [(r["problem"], r["run"]) for r in result["records"]] == [("one", 0), (str(PROBLEM), 1)]
    assert len(result["records"][1]["entries"]) == 6 and len(result["runs"]) == 2
    assert set(result["kernels"]["native"]) == {"k", *run.names(PROBLEM)["native"]}


@metal_headers
def test_a_fault_that_goes_unnoticed_ends_the_run(planner, monkeypatch):
    monkeypatch.setattr(gate.Gate, "check", lambda self, results, strict: ({}, ""))
    with pytest.raises(AssertionError, match="planted in ours went unnoticed"):
        bench(planner, monkeypatch).planted_faults(PROBLEM)


@metal_headers
def test_results_that_change_while_timed_are_noticed(planner, monkeypatch):
    class Spoiling(FakeClock):
        def turns(self, works):
            samples = super().turns(works)
            for result in results:
                result.zero_()
            return samples

    results = []
    run = bench(planner, monkeypatch, Spoiling())
    prepare = contenders.of_entrant

    def keep(*arguments):
        contender = prepare(*arguments)
        results.extend(contender.results.values())
        return contender

    monkeypatch.setattr(contenders, "of_entrant", keep)
    run.run(PROBLEM)
    failed = {e.who: e.failure for e in run.records[0].entries if e.failure}
    assert failed == {"PyTorch 2.13": "the results changed while they were timed"}


def test_gate_says_what_our_rule_would_not_pass():
    """A peer that is a little off is timed and told of; one that is wrong is not timed."""
    problem = replace(PROBLEM, dtype="float32")
    x = operands(problem)
    q, k, v, dout = (x.tensors[name] for name in ("q", "k", "v", "dout"))
    exact = reference.attention(q, k, v, dout, None, problem.scoring(), torch.float64)
    judge = gate.Gate(problem, x.tensors)
    right = exact.out.float()
    assert judge.check({"out": right}, strict=True)[1] == ""
    off = right + 5e-6 * right.abs().max()
    assert "out" in judge.check({"out": off}, strict=False)[1]
    with pytest.raises(AssertionError, match="out"):
        judge.check({"out": off}, strict=True)
    with pytest.raises(AssertionError, match="out: error"):
        judge.check({"out": right * 1.01}, strict=False)
    with pytest.raises(AssertionError, match="out: NaN or infinity"):
        judge.check({"out": right * torch.nan}, strict=False)


def test_rounds_have_limits():
    works = {"a": lambda: None}
    samples = timing.take_turns(works, 1e9, lambda work, n: 1.0, limits=(2, 4), warm_up=1)
    assert samples == {"a": [1.0] * 4}
    samples = timing.take_turns(works, 0.0, lambda work, n: 1.0, limits=(2, 4))
    assert samples == {"a": [1.0] * 2}


# ---- report


def entry(who, milliseconds, backward=False, mode="both", **more):
    return {
        "who": who,
        "mode": mode,
        "backward": backward,
        "offered": True,
        "errors": {},
        "strict": "",
        "kernels": [],
        "milliseconds": milliseconds,
        "parts": {"dq": 1.0, "dkv": 2.0} if backward else {},
        "failure": "",
        **more,
    }


RESULT = {
    "runs": [
        {
            "gpu": "A GPU",
            "driver": "1",
            "torch": "2",
            "date": "today",
            "sources": {
                "commit": "abc",
                "edited": False,
                "digest": "def",
                "peer": "torch 2",
                "peers": "mlx 1",
            },
        }
    ],
    "records": [
        {
            "problem": "one",
            "run": 0,
            "failure": "",
            "entries": [
                entry("ours", [1.0, 1.0, 2.0], mode="native"),
                entry("ours", [2.0, 2.0, 4.0], mode="equal-rate"),
                entry("ours again", [2.0, 2.02, 4.0], mode="equal-rate"),
                entry("MLX", [2.2, 2.2, 4.4]),
                entry("PyTorch 2.13", [3.0, 3.0, 6.0]),
                entry("PyTorch 2.14", [4.0, 4.0, 8.0], strict="out: too far"),
                entry("mlx-train-perf slab 64", [5.0, 5.0, 5.0], offered=False),
                entry("mlx-train-perf slab 32", [6.0, 6.0, 6.0], offered=False),
                entry("ours", [10.0, 10.0, 10.0], True),
                entry("ours, seven products", [12.0] * 3, True),
                entry("mlx-mfa M1", [24.0] * 3, True, parts={"dq": 3.0, "dkv": 2.0}),
                entry("mlx-mfa M3", [], True, failure="wrong"),
            ],
        }
    ],
    "kernels": {"native": {"k": {"registers": 9, "shared_bytes": 8, "local_bytes": 7}}},
}


def test_report():
    lines = peers_report.page(RESULT).splitlines()
    run = "A GPU, driver 1, torch 2, today; commit abc, kernels def (1 problems)"
    assert f"{run}. Texts: torch 2; mlx 1." in " ".join(lines)
    assert "| one | **1.100** | 1.500 | 2.000 | 2.500* (slab 64) |" in lines
    assert "| one | 2.200 | 3.000 | 4.000 | 5.000* (slab 64) |" in lines  # native
    assert "| one | 1.200 | **2.400 (M1)** |" in lines
    assert "* MLX, forward, one: 1.100" in lines
    assert "* mlx-mfa M1, backward, one: 2.400" in lines
    assert sum("2 of 5 cells miss theirs" in line for line in lines) == 1
    assert sum("1.000 to 1.000 over 1 problems" in line for line in lines) == 1
    assert "| one | mlx-mfa M1 | 3.000 | 1.000 |" in lines
    assert "* mlx-mfa M3, backward, one: failed: wrong" in lines
    assert "* PyTorch 2.14, forward, one: not by our rule: out: too far" in lines
    assert "| native | `k` | 9 | 8 | 7 |" in lines


def test_summary_names_each_peer_once_and_its_misses():
    lines = peers_report.summary(RESULT)
    assert "| PyTorch 2.13 | forward | 1.50 | 1.50 | 1.50 | 1 | none |" in lines
    assert "| MLX | forward | 1.10 | 1.10 | 1.10 | 1 | 1: one: 1.100 |" in lines
    assert "| mlx-mfa | backward | 2.40 | 2.40 | 2.40 | 1 | 1: one: 2.400 |" in lines
    assert len(lines) == 7


def test_the_page_has_the_numbers_of_cells_alone():
    lines = peers_report.summary(RESULT, named=False)
    assert "| MLX | forward | 1.10 | 1.10 | 1.10 | 1 | 1 |" in lines
    assert "| PyTorch 2.13 | forward | 1.50 | 1.50 | 1.50 | 1 | none |" in lines


def test_docs_are_written_between_their_marks(monkeypatch, tmp_path):
    made = {
        "README": peers_report.in_readme(RESULT),
        "PAGE": peers_report.brief(RESULT),
        "APPENDIX": peers_report.section(RESULT),
    }
    for name in made:
        docs = tmp_path / name
        docs.write_text(f"before\n{peers_report.BEGIN}old{peers_report.END}\nafter\n")
        monkeypatch.setattr(peers_report, name, docs)
    peers_report.write_docs(RESULT)
    for name, section in made.items():
        text = (tmp_path / name).read_text()
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
        assert peers_report.in_docs(text) == section


def test_docs_show_the_committed_result():
    result = json.loads((RESULTS / "peers.json").read_text())
    shown = {
        path: peers_report.in_docs(path.read_text())
        for path in (peers_report.README, peers_report.PAGE, peers_report.APPENDIX)
    }
    assert shown[peers_report.README] == peers_report.in_readme(result)
    assert shown[peers_report.PAGE] == peers_report.brief(result)
    assert shown[peers_report.APPENDIX] == peers_report.section(result)
    assert (RESULTS / "peers.md").read_text() == peers_report.page(result)


def test_a_turned_kernel_counts_threadgroups_as_before():
    """What a grid of more than 65535 threadgroups along y is launched with."""
    text = b"mov.u32 %r1, %ctaid.x;\nmov.u32 %r2, %ctaid.y;\nmov.u32 %r3, %tid.x;\n"
    assert turned(text) == text.replace(b"r1, %ctaid.x", b"r1, %ctaid.y").replace(
        b"r2, %ctaid.y", b"r2, %ctaid.x"
    )
    assert turned(turned(text)) == text
