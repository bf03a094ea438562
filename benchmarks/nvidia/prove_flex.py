"""Runs the kernels whose scores are functions on an NVIDIA GPU against float64.

``python -m benchmarks.nvidia.prove_flex`` needs torch with CUDA and what ``build --flex`` made. It
writes one JSON file with every comparison and a Markdown table. The exit status is 1 if anything
failed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import controls, flex_cases, flex_texts, reference
from .attention import Attention, lse_of
from .driver import Kernels
from .flex import FlexAttention
from .flex_cases import FlexCase, TrainedCase
from .flex_plans import FlexParams, FlexPlanner
from .flex_texts import Entry
from .paths import FLEX_KERNELS, FLEX_PLANNER, FLEX_SOURCES, FLEX_TEXTS, RESULTS
from .plans import Planner
from .prove import Prover, Record, compare, result_of, same_bits, store
from .report import table

_COMPARED = (*flex_cases.GROUPS, "trained tables")
_GROUPS = (*_COMPARED, "controls", "sanitizers", "under-sanitizer")
_SANITIZERS = ("memcheck", "racecheck", "synccheck")
_LISTED = ("long", "trained tables", "compute-sanitizer", "planted fault")


class FlexProver(Prover):
    module = "prove_flex"

    def __init__(self, kernels: Kernels, planner: FlexPlanner, texts: dict[str, Entry]):
        super().__init__(kernels, planner)
        self.attention = FlexAttention(kernels, planner)
        self.texts = texts

    def case(self, group: str, case: FlexCase) -> None:
        def work(record: Record) -> None:
            record.dtype = str(case.dtype).removeprefix("torch.")
            tables = case.tables()
            functions = case.functions(tables)
            mods = flex_texts.mods_of(self.texts[str(case)], functions, tables)
            dense = case.operands()
            q, k, v, dout = case.placed(dense[:4])
            dlse = dense[4]
            call = case.call(mods, q, k, v)

            def run() -> tuple[Tensor, ...]:
                out, row_stats = self.attention.forward(call)
                grads = self.attention.backward(call, dout, dlse, out, row_stats)
                return (out, call.lse(row_stats), *grads)

            results = run()
            if group == "under sanitizer":
                return
            record.repeats_bitwise = all(map(same_bits, results, run()))
            if not record.repeats_bitwise:
                raise AssertionError("a second run gives other bits")
            scoring = case.scoring(functions)
            ref = reference.attention(*dense, scoring, torch.float64)
            eager = reference.attention(*dense, scoring, case.dtype)
            compare(record, results, ref, eager)

        self.attempt(group, str(case), work)
        torch.cuda.empty_cache()

    def trained(self, case: TrainedCase) -> None:
        """As flex/additive.py runs it, up to the gradient of the mask."""

        def work(record: Record) -> None:
            record.dtype = str(case.case.dtype).removeprefix("torch.")
            attention = Attention(self.kernels, Planner(self.planner.library))
            attention.ran = self.attention.ran
            dense = case.case.operands()
            q, k, v, dout = case.case.placed(dense[:4])
            scoring = case.scoring(case.case.device)

            def run() -> tuple[Tensor | None, ...]:
                out, row_stats = attention.forward(q, k, v, scoring)
                grads = attention.backward_of_all(dout, None, q, k, v, out, row_stats, scoring)
                return (out, lse_of(row_stats, scoring.plain), *grads[:4])

            results = run()
            record.repeats_bitwise = all(
                x is None or same_bits(x, y) for x, y in zip(results, run())
            )
            if not record.repeats_bitwise:
                raise AssertionError("a second run gives other bits")
            ref = reference.attention(*dense, scoring, torch.float64)
            eager = reference.attention(*dense, scoring, case.case.dtype)
            compare(record, results, ref, eager)

        self.attempt("trained tables", str(case), work)

    def fault(self, label: str, case: FlexCase, disturb: Callable[[FlexParams], None]) -> None:
        """Passes if the case fails with disturbed parameters."""

        def work(record: Record) -> None:
            inner = FlexProver(self.kernels, self.planner, self.texts)
            inner.quiet = True
            inner.attention.disturb = disturb
            inner.case("control", case)
            if "AssertionError" not in inner.records[0].failure:
                raise AssertionError("the fault went unnoticed")
            record.noticed = inner.records[0].failure.split("\n")[0]

        self.attempt("planted fault", label, work)


def _run_groups(prover: FlexProver, chosen: list[str]) -> None:
    if set(_COMPARED) & set(chosen):
        prover.kernels.assemble(prover.kernels.names)
    for group, problems in flex_cases.GROUPS.items():
        if group in chosen:
            for case in problems():
                prover.case(group, case)
    if "trained tables" in chosen:
        for trained in flex_cases.trained():
            prover.trained(trained)
    if "controls" in chosen:
        for fault in controls.disturbed_parameters_of_flex():
            prover.fault(*fault)
    if "sanitizers" in chosen:
        for tool in _SANITIZERS:
            prover.sanitizer(tool)
        prover.sanitizer("memcheck", "keys")
        prover.sanitizer("racecheck", "barriers")


def _store(result: dict, output: Path) -> str:
    """Writes both files and returns the Markdown."""
    title = "FlexAttention's kernels on an NVIDIA GPU"
    text = table(result, title, FlexProver.module, _LISTED)
    store(result, output, "flex", text)
    return text


def _join(folders: Sequence[Path], output: Path) -> bool:
    """Makes one result of several runs of some groups. Returns whether a problem failed."""
    parts = [json.loads((folder / "flex.json").read_text()) for folder in folders]
    if len({part["environment"]["sources"]["digest"] for part in parts}) != 1:
        raise SystemExit("prove_flex: the runs to be joined are of different kernels")
    records = [record for part in parts for record in part["records"]]
    kernels = {name: of for part in parts for name, of in part["kernels"].items()}
    environment = parts[0]["environment"]
    _store({"environment": environment, "records": records, "kernels": kernels}, output)
    return any(record["failure"] for record in records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", nargs="+", choices=_GROUPS, default=_GROUPS[:-1])
    parser.add_argument("--plant", choices=("keys", "barriers"), help="a fault, under-sanitizer")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--join", nargs="+", type=Path, metavar="FOLDER", help="run nothing: join earlier --outputs"
    )
    options = parser.parse_args()
    if options.join:
        sys.exit(_join(options.join, options.output))
    mutate = controls.without_barriers if options.plant == "barriers" else bytes
    kernels, planner = Kernels(FLEX_KERNELS, mutate), FlexPlanner(FLEX_PLANNER)
    prover = FlexProver(kernels, planner, flex_texts.read(FLEX_TEXTS))
    if "under-sanitizer" in options.groups:
        if options.plant == "keys":
            prover.attention.disturb = controls.far_too_many_rows
        for case in list(flex_cases.small())[: 1 if options.plant else None]:
            prover.case("under sanitizer", case)
        sys.exit(prover.has_failed())
    _run_groups(prover, options.groups)
    print(_store(result_of(prover, FLEX_SOURCES), options.output))
    sys.exit(prover.has_failed())


if __name__ == "__main__":
    main()
