"""Runs the kernels for caches of keys and values on an NVIDIA GPU against float64.

``python -m benchmarks.nvidia.prove_caches`` needs torch with CUDA and what ``build --caches`` made.
It writes one JSON file with every comparison and a Markdown table. The exit status is 1 if anything
failed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.planner import DecodeParams

from . import append_cases, cache_cases, controls, few_queries
from .append_cases import AppendCase
from .attention import lse_of
from .cache_cases import CacheCase
from .caches import CachePlanner, Caches
from .cases import Case
from .driver import Kernels
from .paths import CACHES_KERNELS, CACHES_PLANNER, CACHES_SOURCES, RESULTS
from .prove import Prover, Record, result_of, same_bits, store
from .report import table

_COMPARED = (*cache_cases.GROUPS, "few queries", "appended")
_GROUPS = (*_COMPARED, "controls", "sanitizers", "under-sanitizer")
_SANITIZERS = ("memcheck", "racecheck", "synccheck")
_LISTED = ("128k keys", "compute-sanitizer", "planted fault")


class CacheProver(Prover):
    module = "prove_caches"

    def __init__(self, kernels: Kernels, planner: CachePlanner):
        super().__init__(kernels, planner)
        self.attention = Caches(kernels, planner)

    def decode(self, group: str, case: CacheCase, only_once: bool = False) -> None:
        """One call; a second one, and those of each sequence alone, must have its bits."""

        def work(record: Record) -> None:
            record.dtype = str(case.dtype).removeprefix("torch.")
            rows = case.rows()
            call = case.call(rows)
            results = self.attention.decode(call)
            if only_once:
                return
            again = self.attention.decode(call)
            record.repeats_bitwise = all(map(same_bits, results, again))
            if not record.repeats_bitwise:
                raise AssertionError("a second run gives other bits")
            record.errors = case.check(rows, *results)
            if len(case.lengths) > 1:
                for b in range(len(case.lengths)):
                    alone = self.attention.decode(call.sequence(b))
                    if not all(same_bits(x[b : b + 1], y) for x, y in zip(results, alone)):
                        raise AssertionError(f"sequence {b} alone gives other bits")

        self.attempt(group, str(case), work)

    def forward(self, case: Case) -> None:
        def work(record: Record) -> None:
            record.dtype = str(case.dtype).removeprefix("torch.")
            dense = case.operands()
            call = few_queries.placed(case, dense)
            out, row_stats = self.attention.forward(call)
            again = self.attention.forward(call)
            record.repeats_bitwise = all(map(same_bits, (out, row_stats), again))
            if not record.repeats_bitwise:
                raise AssertionError("a second run gives other bits")
            lse = lse_of(row_stats, call.scoring.plain)
            record.errors = few_queries.check(case, dense, out, lse)

        self.attempt("few queries", str(case), work)

    def append(self, case: AppendCase) -> None:
        def work(record: Record) -> None:
            record.dtype = str(case.dtype).removeprefix("torch.")
            call = case.call()
            self.attention.append(call)
            case.check(call)

        self.attempt("appended", str(case), work)

    def fault(
        self, label: str, case: CacheCase | AppendCase, disturb: Callable[[DecodeParams], None]
    ) -> None:
        """Passes if the case fails with disturbed parameters."""

        def work(record: Record) -> None:
            inner = CacheProver(self.kernels, self.planner)
            inner.quiet = True
            inner.attention.disturb = disturb
            if isinstance(case, AppendCase):
                inner.append(case)
            else:
                inner.decode("control", case)
            if "AssertionError" not in inner.records[0].failure:
                raise AssertionError("the fault went unnoticed")
            record.noticed = inner.records[0].failure.split("\n")[0]

        self.attempt("planted fault", label, work)


def _run_groups(prover: CacheProver, chosen: list[str]) -> None:
    if set(_COMPARED) & set(chosen):
        prover.kernels.assemble(sorted(prover.kernels.names, key=_effort))
    for group, problems in cache_cases.GROUPS.items():
        if group in chosen:
            for case in problems():
                prover.decode(group, case)
    if "few queries" in chosen:
        for case in few_queries.forwards():
            prover.forward(case)
    if "appended" in chosen:
        for case in append_cases.appends():
            prover.append(case)
    if set(_COMPARED) <= set(chosen):
        prover.every_kernel_has_run()
    if "controls" in chosen:
        for fault in controls.disturbed_parameters_of_caches():
            prover.fault(*fault)
    if "sanitizers" in chosen:
        for tool in _SANITIZERS:
            prover.sanitizer(tool)
        prover.sanitizer("memcheck", "keys")
        prover.sanitizer("racecheck", "barriers")


def _effort(name: str) -> tuple[bool, str]:
    """Kernels that are soon assembled come first."""
    return ("float16" not in name, name)


def _store(result: dict, options: argparse.Namespace) -> str:
    """Writes both files and returns the Markdown."""
    title = "The kernels for caches on an NVIDIA GPU"
    text = table(result, title, CacheProver.module, _LISTED)
    store(result, options.output, options.name, text)
    return text


def _join(paths: list[Path], options: argparse.Namespace) -> bool:
    """Makes one result of several runs of the same kernels. Returns whether a problem failed."""
    parts = [json.loads(path.read_text()) for path in paths]
    if len({part["environment"]["sources"]["digest"] for part in parts}) != 1:
        raise SystemExit("prove_caches: the results to be joined are of different kernels")
    records = [record for part in parts for record in part["records"]]
    kernels = {name: of for part in parts for name, of in part["kernels"].items()}
    _store(
        {"environment": parts[0]["environment"], "records": records, "kernels": kernels}, options
    )
    return any(record["failure"] for record in records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", nargs="+", choices=_GROUPS, default=_GROUPS[:-1])
    parser.add_argument("--plant", choices=("keys", "barriers"), help="a fault, under-sanitizer")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--name", default="caches", help="of the two files")
    parser.add_argument(
        "--join", nargs="+", metavar="NAME", help="run nothing: join earlier results of that --name"
    )
    options = parser.parse_args()
    if options.join:
        sys.exit(_join([options.output / f"{name}.json" for name in options.join], options))
    mutate = controls.without_barriers if options.plant == "barriers" else bytes
    prover = CacheProver(Kernels(CACHES_KERNELS, mutate), CachePlanner(CACHES_PLANNER))
    if "under-sanitizer" in options.groups:
        if options.plant == "keys":
            prover.attention.disturb = controls.far_too_many_keys
        for case in list(cache_cases.small())[: 1 if options.plant else None]:
            prover.decode("under sanitizer", case, only_once=True)
        sys.exit(prover.has_failed())
    _run_groups(prover, options.groups)
    print(_store(result_of(prover, CACHES_SOURCES), options))
    sys.exit(prover.has_failed())


if __name__ == "__main__":
    main()
