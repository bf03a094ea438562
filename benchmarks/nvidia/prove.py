"""Runs every kernel variant on an NVIDIA GPU against float64.

``python -m benchmarks.nvidia.prove`` needs torch with CUDA and what build.py made. It writes one
JSON file with every comparison and a Markdown table. The exit status is 1 if anything failed. What
has passed lies in build/nvidia/proof.jsonl, and what an earlier machine left in the results'
proof.jsonl, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .paths import BUILD, KERNELS, PLANNER, RESULTS, ROOT, SOURCES

sys.path.insert(0, str(ROOT / "src"))

from orchard_ops.testing import MathResult, assert_attention_close

from . import cases, controls, exact, far, reference
from .attention import Attention, lse_of
from .driver import Kernels
from .environment import describe
from .plans import Params, Planner
from .report import table

_RESULTS = ("out", "lse", "dq", "dk", "dv", "dmask", "dsinks")
_GROUPS = (
    "variants",
    "options",
    "scores",
    "ranges",
    "parts",
    "exact",
    "long",
    "far",
    "controls",
    "sanitizers",
    "under-sanitizer",
)
_SANITIZERS = ("memcheck", "racecheck", "synccheck")
_PATIENCE = 150  # seconds for one of them


@dataclass
class Record:
    """One problem: forward and backward, or a run of compute-sanitizer."""

    group: str
    case: str
    dtype: str = ""
    kernels: list[str] = field(default_factory=list)
    #: result -> largest error against float64, and that of same-dtype mathematics
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    repeats_bitwise: bool | None = None
    failure: str = ""
    not_run: str = ""
    #: of a planted fault: what was said
    noticed: str = ""
    seconds: float = 0.0


def _largest_error(x: Tensor, ref: Tensor) -> float:
    finite = torch.isfinite(ref)
    error = (x.double() - ref.double())[finite].abs()
    return error.max().item() if error.numel() else 0.0


def same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


def compare(
    record: Record, results: Iterable[Tensor | None], ref: MathResult, eager: MathResult
) -> None:
    results = tuple(results)
    for name, x in zip(_RESULTS, results):
        if x is None:
            continue
        exact = getattr(ref, name)
        record.errors[name] = (
            _largest_error(x, exact),
            _largest_error(getattr(eager, name), exact),
        )
    assert_attention_close(results, ref, eager)


class Progress:
    """What has passed with these very kernels, a line for each problem."""

    def __init__(self, path: Path, digest: str, kept: Path = RESULTS / "proof.jsonl"):
        """`kept` is in the repository: what an unfinished run on another machine has left."""
        self.path, self.digest = path, digest
        lines = [line for x in (kept, path) if x.exists() for line in x.read_text().splitlines()]
        known = [Record(**line["record"]) for line in map(json.loads, lines)
                 if line["digest"] == digest]  # fmt: skip
        self.known = {(record.group, record.case): record for record in known}

    def add(self, record: Record) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"digest": self.digest, "record": asdict(record)}) + "\n")


class Prover:
    module = "prove"
    quiet = False
    """Whether failures are not printed: those of planted faults."""

    def __init__(self, kernels: Kernels, planner: Planner, progress: Progress | None = None):
        self.kernels = kernels
        self.planner = planner
        self.attention = Attention(kernels, planner)
        self.records: list[Record] = []
        self.usable = True
        self._progress = progress

    def attempt(self, group: str, case: str, work: Callable[[Record], None]) -> None:
        """Records the outcome, whatever it is. After a fault of the GPU nothing more runs."""
        if not self.usable:
            return
        if self._progress is not None and (group, case) in self._progress.known:
            record = self._progress.known[group, case]
            for name in record.kernels:
                self.attention.ran[name] = self.attention.ran.get(name, 0) + 1
            self.records.append(record)
            return
        record = Record(group, case)
        before = dict(self.attention.ran)
        started = time.monotonic()
        try:
            work(record)
            torch.cuda.synchronize()
        except Exception as error:
            record.failure = f"{type(error).__name__}: {error}"
            if not self.quiet:
                print(f"FAILED {group}: {case}\n{traceback.format_exc()}", flush=True)
            self._look_after_gpu()
        record.seconds = round(time.monotonic() - started, 3)
        ran = self.attention.ran
        record.kernels = sorted(name for name in ran if ran[name] != before.get(name, 0))
        self.records.append(record)
        if self._progress is not None and record.kernels and not record.failure:
            self._progress.add(record)

    def _look_after_gpu(self) -> None:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            self.usable = False

    def case(self, group: str, case: cases.Case) -> None:
        def work(record: Record) -> None:
            record.dtype = str(case.dtype).removeprefix("torch.")
            dense = case.operands()
            scoring = case.scoring
            placed = [cases.place(x, case.layout) for x in dense[:4]]
            dlse = None if dense[4] is None else dense[4].clone()
            cases.hide_unseen(case, (*placed, dlse))

            def run() -> tuple[Tensor | None, ...]:
                q, k, v, dout = placed
                out, row_stats = self.attention.forward(q, k, v, scoring)
                grads = self.attention.backward_of_all(dout, dlse, q, k, v, out, row_stats, scoring)
                return (out, lse_of(row_stats, scoring.plain), *grads)

            results = run()
            if group == "under sanitizer":
                return
            record.repeats_bitwise = all(
                same_bits(x, y) for x, y in zip(results, run()) if x is not None
            )
            if not record.repeats_bitwise:
                raise AssertionError("a second run gives other bits")
            ref = reference.attention(*dense, scoring, torch.float64)
            eager = reference.attention(*dense, scoring, case.dtype)
            compare(record, results, ref, eager)

        self.attempt(group, str(case), work)

    def exact(self, case: cases.Case) -> None:
        def work(record: Record) -> None:
            record.dtype = str(case.dtype).removeprefix("torch.")
            exact.check(self.attention, case)

        self.attempt("exact", str(case), work)

    def far(self, case: far.FarCase) -> None:
        label, run = case

        def work(record: Record) -> None:
            operands, scoring, results = run(self.attention)
            record.dtype = str(operands[0].dtype).removeprefix("torch.")
            ref = reference.attention(*operands, None, scoring, torch.float64)
            eager = reference.attention(*operands, None, scoring, operands[0].dtype)
            compare(record, results, ref, eager)

        self.attempt("far addresses", label, work)
        gc.collect()
        torch.cuda.empty_cache()

    def sanitizer(self, tool: str, fault: str = "") -> None:
        """Runs the small cases in a process of their own under compute-sanitizer.

        With a planted fault it passes if the tool speaks.
        """

        def work(record: Record) -> None:
            program = shutil.which("compute-sanitizer") or shutil.which(
                "compute-sanitizer", path="/usr/local/cuda/bin"
            )
            if program is None:
                record.not_run = "compute-sanitizer is not installed"
                return
            environment = dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
            command = [program, "--tool", tool, "--error-exitcode", "9"]
            command += [sys.executable, "-m", f"benchmarks.nvidia.{self.module}", "--groups"]
            command += ["under-sanitizer", *(["--plant", fault] if fault else [])]
            options = {"env": environment, "cwd": ROOT, "capture_output": True, "text": True}
            done = subprocess.run(command, timeout=_PATIENCE, check=False, **options)
            lines = [line.strip("= ") for line in done.stdout.splitlines() if "SUMMARY" in line]
            summary = " ".join(lines)
            if fault:
                record.noticed = summary
            else:
                record.case += f": {summary}"
            silent = re.search(r"SUMMARY: 0 (errors|hazards)", summary)
            if fault and (silent or not summary):
                raise AssertionError(f"the fault went unnoticed: {summary}")
            if not fault and (done.returncode or not silent):
                raise AssertionError(f"{done.stdout[-3000:]}{done.stderr[-1000:]}")

        title = "planted fault" if fault else "compute-sanitizer"
        self.attempt(title, f"{fault} ({tool})" if fault else tool, work)

    def control(self, label: str, case: cases.Case, disturb: Callable[[Params], None]) -> None:
        """Passes if the case fails with disturbed parameters."""

        def work(record: Record) -> None:
            inner = Prover(self.kernels, self.planner)
            inner.quiet = True
            inner.attention.disturb = disturb
            inner.case("control", case)
            if "AssertionError" not in inner.records[0].failure:
                raise AssertionError("the fault went unnoticed")
            record.noticed = inner.records[0].failure.split("\n")[0]

        self.attempt("planted fault", label, work)

    def has_failed(self) -> bool:
        return not self.usable or any(record.failure for record in self.records)

    def every_kernel_has_run(self) -> None:
        def work(record: Record) -> None:
            missing = set(self.kernels.names) - set(self.attention.ran)
            if missing:
                raise AssertionError(f"never ran: {sorted(missing)}")

        self.attempt("every variant", "all kernels of the archive have run", work)


def _json_lines(result: dict) -> str:
    """JSON with a line for each problem and each kernel."""
    records = ",\n".join(json.dumps(record) for record in result["records"])
    kernels = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in result["kernels"].items())
    environment = json.dumps(result["environment"])
    return (
        f'{{"environment": {environment},\n"records": [\n{records}\n],\n'
        f'"kernels": {{\n{kernels}\n}}}}\n'
    )


def result_of(prover: Prover, sources: Path) -> dict:
    """What is stored of a run: where it was, every problem, and every kernel that ran."""
    ran = sorted(prover.attention.ran) if prover.usable else []
    return {
        "environment": describe(sources),
        "records": [asdict(record) for record in prover.records],
        "kernels": {name: prover.kernels.attributes(name) for name in ran},
    }


def store(result: dict, output: Path, name: str = "proof", text: str = "") -> None:
    """Writes both files of a result."""
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.json").write_text(_json_lines(result))
    (output / f"{name}.md").write_text(text or table(result))


def _join(folders: Sequence[Path], output: Path) -> bool:
    """Makes one result of several runs, each of some groups. Returns whether a problem failed."""
    parts = [json.loads((folder / "proof.json").read_text()) for folder in folders]
    if len({part["environment"]["sources"]["digest"] for part in parts}) != 1:
        raise SystemExit("prove: the runs to be joined are of different kernels")
    records = [record for part in parts for record in part["records"]]
    groups = list(dict.fromkeys(record["group"] for record in records))
    result = {
        "environment": parts[0]["environment"],
        "records": sorted(records, key=lambda record: groups.index(record["group"])),
        "kernels": {name: of for part in parts for name, of in part["kernels"].items()},
    }
    with zipfile.ZipFile(KERNELS) as archive:
        left = sorted({Path(name).stem for name in archive.namelist()} - set(result["kernels"]))
    if left:
        raise SystemExit(f"prove: {len(left)} kernels have not run: {', '.join(left[:5])}, ...")
    store(result, output)
    return any(record["failure"] for record in result["records"])


def _run_groups(prover: Prover, chosen: list[str], stride: int, part: int, parts: int) -> None:
    """One part of the problems of these groups, each stride-th of them."""
    share = part * stride, None, parts * stride
    names = prover.kernels.names
    groups = {
        "variants": ("every variant", cases.every_variant(cases.head_dims(names))),
        "options": ("options", cases.options()),
        "scores": ("scores", cases.scores()),
        "ranges": ("key ranges", cases.ranges()),
        "parts": ("keys in parts", cases.parts()),
        "long": ("long sequences", cases.long()),
    }
    if stride == 1:
        wanted = {}
        for group in set(chosen) & set(cases.GROUPS):
            wanted |= cases.kernels_of(prover.planner, cases.GROUPS[group]())
        others = set(chosen) - set(cases.GROUPS) - {"sanitizers"}
        needed = names if others else [name for name in names if name in wanted]
        # The parts share what is assembled, so that each begins elsewhere.
        begin = len(needed) * part // parts
        prover.kernels.assemble(needed[begin:] + needed[:begin])
    for key, (title, problems) in groups.items():
        if key in chosen:
            for case in itertools.islice(problems, *share):
                prover.case(title, case)
    if {"variants", *cases.GROUPS} <= set(chosen) and stride == parts == 1:
        prover.every_kernel_has_run()
    if "exact" in chosen:
        for case in itertools.islice(exact.cases(), *share):
            prover.exact(case)
    if "far" in chosen:
        for case in itertools.islice(far.cases(), *share):
            prover.far(case)
    if "sanitizers" in chosen:
        for tool in _SANITIZERS:
            prover.sanitizer(tool)
        prover.sanitizer("memcheck", "keys")
        prover.sanitizer("racecheck", "barriers")
    if "controls" in chosen:
        for control in controls.disturbed_parameters():
            prover.control(*control)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", nargs="+", choices=_GROUPS, default=_GROUPS[:-1])
    parser.add_argument("--stride", type=int, default=1, help="only each n-th case of a group")
    parser.add_argument(
        "--part", default="0/1", metavar="K/N", help="one of N parts of each group, for N GPUs"
    )
    parser.add_argument("--plant", choices=("keys", "barriers"), help="a fault, under-sanitizer")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--join", nargs="+", type=Path, metavar="FOLDER", help="run nothing: join earlier --outputs"
    )
    options = parser.parse_args()
    if options.join:
        sys.exit(_join(options.join, options.output))
    mutate = controls.without_barriers if options.plant == "barriers" else bytes
    progress = None
    if options.plant is None and "under-sanitizer" not in options.groups:
        progress = Progress(BUILD / "proof.jsonl", json.loads(SOURCES.read_text())["digest"])
    prover = Prover(Kernels(KERNELS, mutate), Planner(PLANNER), progress)
    if "under-sanitizer" in options.groups:
        if options.plant == "keys":
            prover.attention.disturb = controls.too_many_keys
        for case in itertools.islice(cases.small(), 2 if options.plant else None):
            prover.case("under sanitizer", case)
        sys.exit(prover.has_failed())
    part, parts = map(int, options.part.split("/"))
    _run_groups(prover, options.groups, options.stride, part, parts)
    store(result_of(prover, SOURCES), options.output)
    print((options.output / "proof.md").read_text())
    sys.exit(prover.has_failed())


if __name__ == "__main__":
    main()
