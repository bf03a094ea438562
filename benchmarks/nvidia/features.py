"""What features cost on an NVIDIA GPU, each beside the plain kernels of the same run.

``python -m benchmarks.nvidia.features`` needs torch with CUDA and what ``build --features`` made.
Half fragments are multiplied as float ones ("equal-rate"). A feature's launches, those of maps and
hulls included, run between two runs of the plain ones. Where a feature hides pairs, its time is
also given by the ideal: the plain time times the share of pairs in blocks that are seen. Nothing is
timed before its numbers agree with float64. It writes one JSON file and a Markdown table after each
comparison; ``--docs`` puts the tables of that file into docs/performance-tables.md instead.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .paths import FEATURES_KERNELS, FEATURES_PLANNER, FEATURES_SOURCES, RESULTS, ROOT

sys.path.insert(0, str(ROOT / "src"))

from orchard_ops.testing import assert_attention_close

from . import features_report, reference, timing
from .attention import Attention, lse_of
from .driver import Kernels, Launch
from .environment import describe
from .feature_works import HEAD_DIMS, Comparison, Work, comparisons, seen_pairs, share_of_work
from .plans import Params, Planner, Scoring
from .timing import Spread

#: As timing.between, without its seconds.
Clock = Callable[[timing.Work, Mapping[str, timing.Work]], dict[str, list[tuple[float, float]]]]

_RESULTS = ("out", "lse", "dq", "dk", "dv", "dmask", "dsinks")


@dataclass
class Record:
    """A feature beside its yardstick, forward or backward."""

    work: str  # forward or backward
    feature: str
    yardstick: str
    head_dim: int
    length: int
    batch: int
    num_heads: int
    #: pairs in blocks that are seen, by the yardstick's pairs; None where nothing is hidden
    share: float | None = None
    #: result -> largest error against float64, and that of same-dtype mathematics
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    kernels: list[str] = field(default_factory=list)
    milliseconds: Spread | None = None
    #: its time by the yardstick's, round by round
    ratio: Spread | None = None
    failure: str = ""
    seconds: float = 0.0


@dataclass
class Side:
    """Launches, and the results that they write."""

    launches: list[Launch]
    results: dict[str, Tensor]

    def start(self) -> None:
        for launch in self.launches:
            launch.start()


class Problem:
    """A work with its operands, prepared for both directions; one query head is checked."""

    def __init__(self, work: Work, attention: Attention, planner: Planner, device: str):
        self.work, self.device = work, device
        self._attention, self._planner = attention, planner
        self.scoring = work.scoring(device)
        self.q, self.k, self.v, self.dout = work.operands(device)
        self._head = work.num_heads // 2

    def _nan(self, like: Tensor) -> Tensor:
        return torch.full_like(like, torch.nan)  # its strides too

    def forward(self) -> Side:
        out = self._nan(self.q)
        row_stats = torch.full((*out.shape[:3], 2), torch.nan, device=self.device)
        operands = (self.q, self.k, self.v)
        launches = self._attention.prepare_forward(*operands, out, row_stats, self.scoring)
        return Side(launches, {"out": out, "row_stats": row_stats})

    def ds_elements(self) -> int:
        operands = (self.q, self.k, self.v, self.q, self.dout)
        return self._attention.ds_elements(*operands, self.scoring)

    def backward(self, forward: Side, ds: Tensor) -> Side:
        """ds: a buffer for dS that others use too."""
        s, q, k, v, dout = self.scoring, self.q, self.k, self.v, self.dout
        dq, dk, dv = (self._nan(x) for x in (q, k, v))
        results = {"dq": dq, "dk": dk, "dv": dv}
        delta = torch.full(q.shape[:3], torch.nan, device=self.device)
        more: dict[str, Tensor] = {}
        if s.sinks is not None:
            results["dsinks"] = more["dsinks"] = torch.full_like(s.sinks, torch.nan)
            parts = (*q.shape[:2], -(-q.shape[2] // 8))
            more["sink_parts"] = torch.full(parts, torch.nan, device=self.device)
        if s.mask_grad and s.mask is not None:
            results["dmask"] = more["dmask"] = torch.full_like(s.mask, torch.nan)
            plan = self._planner.backward(q, k, v, q, dout, s)
            if plan.dmask_part_elements:
                parts = (plan.dmask_part_elements,)
                more["dmask_parts"] = torch.full(parts, torch.nan, device=self.device)
        written = forward.results
        ds.fill_(torch.nan)
        launches = self._attention.prepare_backward(
            dout, None, q, k, v, written["out"], written["row_stats"], delta, ds, dq, dk, dv, s,
            more,
        )  # fmt: skip
        return Side(launches, results)

    def lse(self, row_stats: Tensor) -> Tensor:
        return lse_of(row_stats, self.scoring.plain)

    @functools.cached_property
    def _mathematics(self) -> tuple[reference.MathResult, reference.MathResult]:
        head = slice(self._head, self._head + 1)
        operands = [x[:, head] for x in (self.q, self.k, self.v, self.dout)]
        scoring = of_head(self.scoring, head)
        ref = reference.attention(*operands, None, scoring, torch.float64)
        return ref, reference.attention(*operands, None, scoring, self.q.dtype)

    def check(self, side: Side) -> dict[str, tuple[float, float]]:
        """Runs it once: one head must agree with the mathematics, the others be finite.

        Raises:
            AssertionError: by the rule of orchard_ops.testing.
        """
        side.start()
        results = {}
        for name, x in side.results.items():
            if not torch.isfinite(x).all():
                raise AssertionError(f"{name}: NaN or infinity")
            head = slice(self._head, self._head + 1)
            results[name] = x[head] if name == "dsinks" else x[:, head]
        if "row_stats" in results:
            results["lse"] = self.lse(results.pop("row_stats"))
        ref, eager = self._mathematics
        assert_attention_close([results.get(name) for name in _RESULTS], ref, eager)
        errors = {}
        for name, x in results.items():
            exact = getattr(ref, name).double()
            both = (x, getattr(eager, name))
            errors[name] = tuple((y.double() - exact).abs().max().item() for y in both)
        return errors


def of_head(s: Scoring, head: slice) -> Scoring:
    """What decides the scores of these heads of each batch entry."""
    changes: dict[str, Tensor] = {}
    for name in ("mask", "alibi_slopes", "key_ranges"):
        x = getattr(s, name)
        if x is not None and x.shape[1] > 1:
            changes[name] = x[:, head]
    if s.sinks is not None:
        changes["sinks"] = s.sinks[head]
    return Scoring(**{**vars(s), **changes})


class Bench:
    def __init__(self, kernels: Kernels, planner: Planner, clock: Clock, device: str = "cuda"):
        self.kernels, self.planner, self.clock, self.device = kernels, planner, clock, device
        self.attention = Attention(kernels, planner)
        self.records: list[Record] = []
        self.usable = True

    def _problem(self, work: Work) -> Problem:
        return Problem(work, self.attention, self.planner, self.device)

    def run(self, comparison: Comparison) -> None:
        """Forward, then backward, of all works of a comparison."""
        problems = {}
        for work in (comparison.yardstick, *comparison.works):
            problems[work] = self._problem(work)
        ds = torch.empty(max(1, *(x.ds_elements() for x in problems.values())), device=self.device)
        forwards: dict[Work, Side] = {}
        for backward in (False, True):
            self._compare(comparison, backward, problems, forwards, ds)

    def _compare(
        self,
        comparison: Comparison,
        backward: bool,
        problems: dict[Work, Problem],
        forwards: dict[Work, Side],
        ds: Tensor,
    ) -> None:
        """Checks all, times what passes, and looks whether the results are the same."""
        started = time.monotonic()
        sides: dict[Work, Side] = {}
        records = {}
        yardstick = comparison.yardstick
        for work in (yardstick, *comparison.of(backward)):
            records[work] = self._record(work, yardstick, backward)

            def prepare(work: Work = work) -> None:
                side = problems[work].forward() if work not in forwards else forwards[work]
                forwards[work] = side
                if backward:
                    side.start()
                    side = problems[work].backward(side, ds)
                records[work].errors = problems[work].check(side)
                sides[work] = side

            self._attempt(records[work], prepare)
        if yardstick in sides:

            def measure() -> None:
                before = {work: _bits(side) for work, side in sides.items()}
                works = {str(work): side.start for work, side in sides.items() if work != yardstick}
                samples = self.clock(sides[yardstick].start, works)
                for work, side in sides.items():
                    if not all(map(torch.equal, before[work], side.results.values())):
                        raise AssertionError(f"{work}: the results changed while they were timed")
                    if work != yardstick:
                        milliseconds, ratios = zip(*samples[str(work)])
                        records[work].milliseconds = Spread.of(milliseconds)
                        records[work].ratio = Spread.of(ratios)

            self._attempt(records[yardstick], measure)
        records[yardstick].seconds = round(time.monotonic() - started, 3)
        failed = records.pop(yardstick)
        self.records += ([failed] if failed.failure else []) + list(records.values())
        print(_progress(failed, list(records.values())), flush=True)

    def _record(self, work: Work, yardstick: Work, backward: bool) -> Record:
        kernels = work.plan(self.planner, backward)
        seen = seen_pairs(work, self.device)
        share = None
        if seen is not None:
            pairs, of_yardstick = (x.batch * x.num_heads * x.length**2 for x in (work, yardstick))
            share = share_of_work(kernels, seen) * pairs / of_yardstick
        return Record(
            "backward" if backward else "forward",
            work.feature,
            yardstick.feature,
            work.head_dim,
            yardstick.length,
            yardstick.batch,
            work.num_heads,
            share,
            kernels=list(dict.fromkeys(kernel.name for kernel in kernels)),
        )

    def _attempt(self, record: Record, action: Callable[[], None]) -> None:
        """Records a failure. After a fault of the GPU nothing more runs."""
        if not self.usable:
            record.failure = record.failure or "not run: the GPU failed before"
            return
        try:
            action()
            self._synchronize()
        except Exception as error:
            record.failure = f"{type(error).__name__}: {error}"
            print(f"FAILED {record.feature}\n{traceback.format_exc()}", flush=True)
            try:
                self._synchronize()
            except RuntimeError:
                self.usable = False

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def planted_fault(self, work: Work) -> None:
        """The check must notice a scale that is off by a tenth, or it is worth nothing."""

        def spoil(params: Params) -> None:
            params.scale *= 1.1
            params.scale_log2 *= 1.1

        problem = self._problem(work)
        self.attention.disturb = spoil
        forward = problem.forward()
        self.attention.disturb = None
        try:
            problem.check(forward)
        except AssertionError as error:
            print(f"planted fault noticed: {error}", flush=True)
            return
        raise AssertionError("a planted fault went unnoticed: no figure of this run counts")

    def attributes(self) -> dict[str, dict[str, int]]:
        """kernel -> registers, shared memory, spilled bytes"""
        names = sorted({name for x in self.records if x.ratio for name in x.kernels})
        return {name: self.kernels.attributes(name) for name in names}


def _bits(side: Side) -> list[Tensor]:
    return [x.clone() for x in side.results.values()]


def _progress(yardstick: Record, records: list[Record]) -> str:
    sizes = f"B{yardstick.batch} H{yardstick.num_heads} L{yardstick.length} D{yardstick.head_dim}"
    lines = [f"{yardstick.work}, {sizes} ({yardstick.seconds} s) {yardstick.failure}"]
    for x in records:
        ideal = f", {x.ratio.median / x.share:.3f} of ideal" if x.ratio and x.share else ""
        result = f"{x.ratio.median:.3f} of {x.yardstick}{ideal}" if x.ratio else "not timed"
        lines.append(f"  {x.feature}: {x.failure or result}")
    return "\n".join(lines)


def _write(bench: Bench, output: Path) -> None:
    result = {
        "environment": describe(FEATURES_SOURCES),
        "records": [asdict(record) for record in bench.records],
        "kernels": bench.attributes() if bench.usable else {},
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "features.json").write_text(features_report.json_lines(result))
    (output / "features.md").write_text(features_report.page(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--docs", action="store_true", help="only docs/performance-tables.md, from the file"
    )
    parser.add_argument("--head-dims", nargs="+", type=int, choices=HEAD_DIMS, default=HEAD_DIMS)
    parser.add_argument("--seconds", type=float, default=6.0, help="for each comparison")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.docs:
        features_report.write_docs(json.loads((options.output / "features.json").read_text()))
        return
    clock = functools.partial(timing.between, seconds=options.seconds)
    bench = Bench(Kernels(FEATURES_KERNELS), Planner(FEATURES_PLANNER), clock)
    chosen = list(comparisons(tuple(options.head_dims)))
    bench.kernels.assemble(bench.kernels.names)
    bench.planted_fault(chosen[0].yardstick)
    for comparison in chosen:
        bench.run(comparison)
        _write(bench, options.output)  # each time, so that a run that is cut off leaves results
        torch.cuda.empty_cache()
    print((options.output / "features.md").read_text())
    sys.exit(not bench.usable or any(record.failure for record in bench.records))


if __name__ == "__main__":
    main()
