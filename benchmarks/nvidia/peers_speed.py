"""Times our kernels beside those of everybody else, forward and backward, on an NVIDIA GPU.

``python -m benchmarks.nvidia.peers_speed`` needs torch with CUDA and what ``build --peers`` made.
Nothing is timed before its numbers agree with float64 in the same run. It writes one JSON file and
a Markdown table; the exit status is 1 if anything failed. With ``--docs`` it needs no GPU, and puts
the tables of that file into docs/performance.md and its appendix.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from .paths import PEERS_KERNELS, PEERS_PLANNER, PEERS_SOURCES, RESULTS, ROOT

sys.path.insert(0, str(ROOT / "src"))

from . import peers, peers_report, timing
from .attention import Attention
from .driver import Kernels
from .environment import describe
from .peers import contenders, gate
from .peers.contenders import OURS, Contender, Operands
from .peers.problems import DEFAULT_SCRATCH, Problem, problems
from .plans import Params, Planner

MODES = ("native", "equal-rate")
BOTH = "both"
AGAIN, SEVEN = "ours again", "ours, seven products"
_ROUNDS = (5, 31)
_SPOILT = 1.5


class Clock(Protocol):
    """The GPU's, or a pretended one."""

    def turns(self, works: dict[str, timing.Work]) -> dict[str, list[float]]: ...
    def parts(self, order: list[tuple[str, timing.Work]]) -> dict[str, float]: ...


@dataclass
class GpuClock:
    seconds: float

    def turns(self, works: dict[str, timing.Work]) -> dict[str, list[float]]:
        return timing.take_turns(works, self.seconds, limits=_ROUNDS)

    def parts(self, order: list[tuple[str, timing.Work]]) -> dict[str, float]:
        return timing.parts(order)


@dataclass
class Entry:
    """One contender on one problem. A failed one has no times."""

    who: str
    mode: str
    backward: bool
    offered: bool
    #: result -> largest error against float64, and that of same-dtype mathematics
    errors: gate.Errors = field(default_factory=dict)
    #: how the results fail the rule of orchard_ops.testing; a peer is timed all the same
    strict: str = ""
    kernels: list[str] = field(default_factory=list)
    #: one a round; round i of all entries of a direction belongs together
    milliseconds: list[float] = field(default_factory=list)
    #: of a backward, in runs of their own
    parts: dict[str, float] = field(default_factory=dict)
    failure: str = ""


@dataclass
class Record:
    problem: str
    dtype: str
    head_dim: int
    length: int
    batch: int
    num_heads: int
    num_kv_heads: int
    causal: bool
    entries: list[Entry] = field(default_factory=list)
    failure: str = ""
    seconds: float = 0.0
    run: int = 0  # which of the result's runs


class Bench:
    def __init__(
        self, kernels: dict[str, Any], planner: Planner, clock: Clock, device: str = "cuda"
    ):
        """``kernels``: an archive for each mode."""
        self.kernels, self.planner, self.clock, self.device = kernels, planner, clock, device
        self.attention = {mode: Attention(k, planner) for mode, k in kernels.items()}
        self.records: list[Record] = []
        self.usable = True
        self._same: dict[str, bool] = {}  # kernel -> whether both modes have the same code

    def modes(self, names: list[str]) -> tuple[str, ...]:
        """In which modes kernels are worth a run: once if they have the same code."""
        first, second = (self.kernels[mode] for mode in MODES)
        for name in names:
            if name not in self._same:
                self._same[name] = first.text(name) == second.text(name)
        return (BOTH,) if all(self._same[name] for name in names) else MODES

    @staticmethod
    def archive(mode: str) -> str:
        return MODES[0] if mode == BOTH else mode

    def names(self, problem: Problem) -> dict[str, list[str]]:
        """mode -> all kernels that a problem runs"""
        ours = problem.forward_kernels(self.planner)
        if problem.backward:
            for scratch_bytes in (DEFAULT_SCRATCH, 0):
                ours += problem.backward_kernels(self.planner, scratch_bytes)
        names = list(dict.fromkeys([kernel.name for kernel in ours] + list(peers.steps(problem))))
        found: dict[str, list[str]] = {mode: [] for mode in MODES}
        for name in names:
            for mode in self.modes([name]):
                found[self.archive(mode)].append(name)
        return found

    # ---- one problem

    def run(self, problem: Problem) -> None:
        """Records the outcome, whatever it is. After a fault of the GPU nothing more runs."""
        if not self.usable:
            return
        started = time.monotonic()
        record = Record(
            str(problem), problem.dtype, problem.head_dim, problem.length, problem.batch,
            problem.num_heads, problem.num_kv_heads, problem.causal,
        )  # fmt: skip
        self.records.append(record)
        try:
            self._run(problem, record)
            self._synchronize()
        except Exception as error:
            record.failure = _words(error)
            print(f"FAILED {problem}\n{traceback.format_exc()}", flush=True)
            self._see_whether_usable()
        record.seconds = round(time.monotonic() - started, 2)
        print(peers_report.progress(asdict(record)), flush=True)

    def _run(self, problem: Problem, record: Record) -> None:
        x = Operands(problem, self.device)
        rounded = (
            (False, True) if any(e.rounded_query for e in peers.entrants(problem)) else (False,)
        )
        gates = {r: gate.Gate(problem, x.tensors, r) for r in rounded}
        field_ = {False: self._forwards(x, record, gates)}
        if not field_[False]:
            raise RuntimeError("our forward failed")
        if problem.backward:
            field_[True] = self._backwards(x, record, gates)
        for backward, found in field_.items():
            for entrant in peers.entrants(problem):
                if entrant.backward == backward:
                    names = [step.kernel for step in entrant.steps]
                    for mode in self.modes(names):
                        kernels = self.kernels[self.archive(mode)]
                        delta = found[0][0] if backward and found else None
                        make = functools.partial(
                            contenders.of_entrant, kernels, x, entrant, mode, delta
                        )
                        self._add(found, record, gates, make, entrant.name, mode, backward)
            self._time(found)

    def _forwards(self, x: Operands, record: Record, gates: dict) -> list:
        found: list[tuple[Contender, Entry]] = []
        names = [kernel.name for kernel in x.problem.forward_kernels(self.planner)]
        for mode in self.modes(names):
            attention = self.attention[self.archive(mode)]
            for name in (OURS, AGAIN):
                make = functools.partial(contenders.ours_forward, attention, x, mode, name)
                self._add(found, record, gates, make, name, mode, False)
        if found:
            x.take(**found[0][0].results)
        return found

    def _backwards(self, x: Operands, record: Record, gates: dict) -> list:
        found: list[tuple[Contender, Entry]] = []
        for name, scratch_bytes in ((OURS, DEFAULT_SCRATCH), (SEVEN, 0), (AGAIN, DEFAULT_SCRATCH)):
            kernels = x.problem.backward_kernels(self.planner, scratch_bytes)
            for mode in self.modes([kernel.name for kernel in kernels]):
                attention = self.attention[self.archive(mode)]
                make = functools.partial(
                    contenders.ours_backward,
                    attention,
                    x,
                    mode,
                    x.problem.scoring(scratch_bytes),
                    name,
                )
                self._add(found, record, gates, make, name, mode, True)
        return found

    def _add(
        self,
        found: list,
        record: Record,
        gates: dict[bool, gate.Gate],
        make: Callable[[], Contender],
        who: str,
        mode: str,
        backward: bool,
    ) -> None:
        """Runs it once behind the gate; a failure is recorded, and the others go on."""
        if not self.usable:
            return
        entry = Entry(who, mode, backward, True)
        record.entries.append(entry)
        try:
            contender = make()
            contender.start()
            self._synchronize()
            results = contenders.public(contender.results)
            strict = who in (OURS, AGAIN, SEVEN)
            entry.errors, entry.strict = gates[contender.rounded_query].check(results, strict)
        except Exception as error:
            entry.failure = _words(error)
            print(f"FAILED {who}, {record.problem}: {entry.failure}", flush=True)
            self._see_whether_usable()
            return
        entry.kernels, entry.offered = contender.kernels, contender.offered
        found.append((contender, entry))

    def _time(self, found: list[tuple[Contender, Entry]]) -> None:
        before = [[t.clone() for t in contender.results.values()] for contender, _ in found]
        works = {str(i): contender.start for i, (contender, _) in enumerate(found)}
        samples = self.clock.turns(works)
        for i, (contender, entry) in enumerate(found):
            if not all(map(torch.equal, before[i], contender.results.values())):
                entry.failure = "the results changed while they were timed"
                continue
            entry.milliseconds = [round(t, 6) for t in samples[str(i)]]
            if contender.backward:
                parts = self.clock.parts(contender.order)
                entry.parts = {part: round(t, 6) for part, t in parts.items()}

    # ---- the gate itself, and the GPU

    def planted_faults(self, problem: Problem) -> None:
        """The gate must notice a wrong scale in everybody's kernels, or it is worth nothing."""
        x = Operands(problem, self.device)
        gates = {rounded: gate.Gate(problem, x.tensors, rounded) for rounded in (False, True)}
        attention = self.attention[MODES[0]]
        right = contenders.ours_forward(attention, x, BOTH)
        right.start()
        x.take(**right.results)

        def spoil(params: Params) -> None:
            params.scale *= _SPOILT
            params.scale_log2 *= _SPOILT

        attention.disturb = spoil
        spoilt = [contenders.ours_forward(attention, x, BOTH)]
        attention.disturb = None
        delta = contenders.ours_backward(attention, x, BOTH, problem.scoring())
        for entrant in peers.entrants(problem):
            for step in entrant.steps:
                _spoil(step.params[1])
            kernels = self.kernels[MODES[0]]
            spoilt.append(contenders.of_entrant(kernels, x, entrant, BOTH, delta))
        for contender in spoilt:
            contender.start()
            results = contenders.public(contender.results)
            try:
                gates[contender.rounded_query].check(results, strict=False)
            except AssertionError as error:
                print(f"planted fault noticed, {contender.name}: {error}", flush=True)
                continue
            raise AssertionError(
                f"a fault planted in {contender.name} went unnoticed: no figure of this run counts"
            )

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _see_whether_usable(self) -> None:
        try:
            self._synchronize()
        except RuntimeError:
            self.usable = False

    def attributes(self) -> dict[str, dict[str, dict[str, int]]]:
        """mode -> kernel -> registers, shared memory, spilled bytes, of all that were timed"""
        found: dict[str, dict[str, dict[str, int]]] = {mode: {} for mode in MODES}
        for record in self.records:
            for entry in record.entries:
                mode = self.archive(entry.mode)
                for name in entry.kernels if entry.milliseconds else ():
                    if name not in found[mode]:
                        found[mode][name] = self.kernels[mode].attributes(name)
        return found


def _spoil(params: ctypes.Structure) -> None:
    for name in ("scale", "scale_log2"):
        if hasattr(params, name):
            setattr(params, name, getattr(params, name) * _SPOILT)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:300]


def _write(bench: Bench, earlier: dict | None, output: Path) -> str:
    """Writes both files and returns the Markdown.

    ``earlier``: a result whose problems are kept, unless they were run anew.
    """
    records = [asdict(record) for record in bench.records]
    kernels = bench.attributes() if bench.usable else {}
    runs = [describe(PEERS_SOURCES)]
    if earlier is not None:
        anew = {record["problem"] for record in records}
        for record in records:
            record["run"] = len(earlier["runs"])
        records = [r for r in earlier["records"] if r["problem"] not in anew] + records
        runs = earlier["runs"] + runs
        kernels = {mode: earlier["kernels"].get(mode, {}) | kernels.get(mode, {}) for mode in MODES}
    result = {"runs": runs, "records": records, "kernels": kernels}
    output.mkdir(parents=True, exist_ok=True)
    (output / "peers.json").write_text(peers_report.json_lines(result))
    text = peers_report.page(result)
    (output / "peers.md").write_text(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", action="store_true", help="only the tables in docs/")
    parser.add_argument("--seconds", type=float, default=0.4, help="of turns, for each direction")
    parser.add_argument("--budget", type=float, default=1e9, help="no problem begins after these")
    parser.add_argument("--only", nargs="*", default=[], help='words of a problem: "D64", "causal"')
    parser.add_argument("--add-to", type=Path, help="a peers.json: its other problems are kept")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.docs:
        peers_report.write_docs(json.loads((options.output / "peers.json").read_text()))
        return
    earlier = json.loads(options.add_to.read_text()) if options.add_to else None
    began = time.monotonic()
    kernels = {mode: Kernels(path) for mode, path in PEERS_KERNELS.items()}
    bench = Bench(kernels, Planner(PEERS_PLANNER), GpuClock(options.seconds))
    chosen = [p for p in problems() if set(options.only) <= set(str(p).split())]
    names: dict[str, dict[str, None]] = {mode: {} for mode in MODES}
    for problem in chosen:
        for mode, of_problem in bench.names(problem).items():
            names[mode] |= dict.fromkeys(of_problem)
    for mode, of_mode in names.items():  # the longest first: the assembler is slowest there
        sizes = {name: len(kernels[mode].text(name)) for name in of_mode}
        kernels[mode].assemble(sorted(sizes, key=sizes.__getitem__, reverse=True))
    planted: set[tuple[str, bool]] = set()
    for problem in sorted(chosen, key=lambda p: p.length):
        found = {(entrant.peer, entrant.backward) for entrant in peers.entrants(problem)}
        if not found <= planted:
            bench.planted_faults(problem)
            planted |= found
    print(f"ready after {time.monotonic() - began:.0f} s", flush=True)
    for problem in chosen:
        if time.monotonic() - began > options.budget:
            print(f"no time for {problem}", flush=True)
            continue
        bench.run(problem)
        _write(
            bench, earlier, options.output
        )  # each time, so that a run that is cut off leaves results
        torch.cuda.empty_cache()
    print(_write(bench, earlier, options.output))
    failed = any(r.failure or any(e.failure for e in r.entries) for r in bench.records)
    sys.exit(not bench.usable or failed)


if __name__ == "__main__":
    main()
