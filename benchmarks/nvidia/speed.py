"""Times our kernels beside PyTorch's own Metal kernel on an NVIDIA GPU.

``python -m benchmarks.nvidia.speed`` needs torch with CUDA and what ``build --speed`` made. Nothing
is timed before its numbers agree with float64 in the same run. It writes one JSON file and a
Markdown table; the exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from .paths import RESULTS, ROOT, SPEED_KERNELS, SPEED_PLANNER, SPEED_SOURCES

sys.path.insert(0, str(ROOT / "src"))

from orchard_ops.testing import assert_attention_close

from . import peer, reference, speed_report, timing
from .attention import Attention, lse_of
from .driver import Kernels, Launch
from .environment import describe
from .plans import Params, Planner, Scoring
from .timing import Spread
from .workloads import BACKWARD_LENGTHS, Workload, add_options, workloads

#: Milliseconds of each work in each round.
Clock = Callable[[dict[str, timing.Work]], dict[str, list[float]]]

_RESULTS = ("out", "lse", "dq", "dk", "dv")
_CHECKED_HEADS = 4


@dataclass
class Record:
    """One workload in one mode. Times are in milliseconds; a failed record has none."""

    work: str  # forward or backward
    dtype: str
    head_dim: int
    length: int
    causal: bool
    mode: str
    #: whose -> result -> largest error against float64, and that of same-dtype mathematics
    errors: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    #: kernel -> time of all its launches
    times: dict[str, Spread] = field(default_factory=dict)
    #: what -> times PyTorch's kernel (ours taken together, each of ours), round by round
    relative: dict[str, Spread] = field(default_factory=dict)
    #: the other mode has the same code: not timed again
    same_as: str = ""
    failure: str = ""
    seconds: float = 0.0


class Mathematics:
    """float64 attention and its same-dtype measure."""

    def __init__(self, operands: list[Tensor], scoring: Scoring):
        self._ref = reference.attention(*operands, None, scoring, torch.float64)
        self._eager = reference.attention(*operands, None, scoring, operands[0].dtype)

    def check(self, results: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        """result -> largest error against float64, and that of same-dtype mathematics

        Raises:
            AssertionError: by the rule of orchard_ops.testing.
        """
        ref, eager = self._ref, self._eager
        assert_attention_close([results.get(name) for name in _RESULTS], ref, eager)
        errors = {}
        for name, x in results.items():
            exact = getattr(ref, name).double()
            both = (x, getattr(eager, name))
            errors[name] = tuple((y.double() - exact).abs().max().item() for y in both)
        return errors


@dataclass
class Side:
    """Launches and the results that they write: our forward, our backward, or PyTorch's."""

    launches: list[Launch]
    results: dict[str, Tensor]
    is_peer: bool = False


class Operands:
    """Operands of a workload, and which results are right for them."""

    def __init__(self, work: Workload, device: str):
        self.work = work
        self.q, self.k, self.v, self.dout = work.operands(device)
        heads = work.batch * work.num_heads
        self._heads = torch.linspace(0, heads - 1, min(heads, _CHECKED_HEADS)).long().to(device)
        q, k, v, dout = (self._cut(x) for x in (self.q, self.k, self.v, self.dout))
        self._exact = Mathematics([q, k, v, dout], work.scoring)
        # Only from the query as its kernel rounds it can PyTorch's pass the same strict rule.
        q, scale = peer.rounded_query(q, work.scoring.scale)
        self._exact_for_peer = Mathematics([q, k, v, dout], replace(work.scoring, scale=scale))

    def _cut(self, x: Tensor) -> Tensor:
        """The heads that are compared, in one batch."""
        return x.flatten(0, 1)[self._heads].unsqueeze(0)

    def like_q(self) -> Tensor:
        return torch.full_like(self.q, torch.nan)

    def rows(self) -> Tensor:
        return torch.full(self.q.shape[:3], torch.nan, device=self.q.device)

    def row_stats(self) -> Tensor:
        return torch.full((*self.q.shape[:3], 2), torch.nan, device=self.q.device)

    def check(self, side: Side) -> dict[str, tuple[float, float]]:
        """Runs it once: some heads must agree with the mathematics, the others be finite."""
        for launch in side.launches:
            launch.start()
        for name, x in side.results.items():
            if not torch.isfinite(x).all():
                raise AssertionError(f"{name}: NaN or infinity")
        exact = self._exact_for_peer if side.is_peer else self._exact
        results = {name: self._cut(x) for name, x in side.results.items()}
        if "row_stats" in results:
            results["lse"] = lse_of(results.pop("row_stats"))
        return exact.check(results)


class Bench:
    """Times workloads on the kernels of each mode; the first mode is what others compare with."""

    def __init__(
        self, kernels: dict[str, Kernels], planner: Planner, clock: Clock, device: str = "cuda"
    ):
        self.kernels = kernels
        self.attention = {mode: Attention(k, planner) for mode, k in kernels.items()}
        self.planner = planner
        self.clock = clock
        self.device = device
        self.records: list[Record] = []
        self.timed: dict[str, set[str]] = {mode: set() for mode in kernels}
        self.usable = True

    def assemble(self, work: Workload, backward: bool) -> None:
        """Begins to assemble what it will run."""
        for mode, kernels in self.kernels.items():
            names = self._names(work, backward)
            kernels.assemble([name for name in names if not self._same_code(mode, name)])

    def _names(self, work: Workload, backward: bool) -> list[str]:
        return [work.prefill().name, *(x.name for x in work.plan(self.planner, backward))]

    def _same_code(self, mode: str, name: str) -> bool:
        """Whether the first mode, being another one, has the same kernel."""
        first = next(iter(self.kernels))
        return mode != first and self.kernels[mode].text(name) == self.kernels[first].text(name)

    # ---- launches

    def _forward(self, mode: str, x: Operands) -> Side:
        out, row_stats = x.like_q(), x.row_stats()
        attention, scoring = self.attention[mode], x.work.scoring
        launches = attention.prepare_forward(x.q, x.k, x.v, out, row_stats, scoring)
        return Side(launches, {"out": out, "row_stats": row_stats})

    def _backward(self, mode: str, x: Operands, out: Tensor, row_stats: Tensor) -> Side:
        delta = x.rows()
        dq, dk, dv = (x.like_q() for _ in range(3))
        attention, scoring = self.attention[mode], x.work.scoring
        elements = attention.ds_elements(x.q, x.k, x.v, out, x.dout, scoring)
        ds = torch.full((max(elements, 1),), torch.nan, device=self.device)
        launches = attention.prepare_backward(
            x.dout, None, x.q, x.k, x.v, out, row_stats, delta, ds, dq, dk, dv, scoring
        )
        return Side(launches, {"dq": dq, "dk": dk, "dv": dv})

    def _prefill(self, mode: str, x: Operands) -> Side:
        out = x.like_q()
        plan = peer.prefill(x.q, x.k, x.v, out, x.work.scoring.scale, x.work.causal)
        tensors = {"q": x.q, "k": x.k, "v": x.v, "out": out}
        buffers = {peer.BUFFERS[name]: tensor for name, tensor in tensors.items()}
        params = (peer.BUFFERS["params"], plan.params)
        launch = self.kernels[mode].prepare(plan.name, plan.groups, plan.threads, buffers, params)
        return Side([launch], {"out": out}, is_peer=True)

    # ---- records

    def run(self, work: Workload, backward: bool) -> None:
        """The forward in all modes, then the backward."""
        if not self.usable:
            return
        operands = Operands(work, self.device)
        for what in ("forward", "backward")[: 1 + backward]:
            for mode in self.kernels:
                self._attempt(what, mode, operands)

    def _attempt(self, what: str, mode: str, x: Operands) -> None:
        """Records the outcome, whatever it is. After a fault of the GPU nothing more runs."""
        if not self.usable:
            return
        work = x.work
        record = Record(what, work.dtype, work.head_dim, work.length, work.causal, mode)
        started = time.monotonic()
        try:
            names = self._names(work, what == "backward")
            if all(self._same_code(mode, name) for name in names):
                record.same_as = next(iter(self.kernels))
            else:
                self._time(record, mode, x)
                self.timed[mode].update(names)
            self._synchronize()
        except Exception as error:
            record.failure = f"{type(error).__name__}: {error}"
            record.times, record.relative = {}, {}
            print(f"FAILED {what} {work}, {mode}\n{traceback.format_exc()}", flush=True)
            try:
                self._synchronize()
            except RuntimeError:
                self.usable = False
        record.seconds = round(time.monotonic() - started, 3)
        self.records.append(record)
        print(_progress(record), flush=True)

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _time(self, record: Record, mode: str, x: Operands) -> None:
        """Checks all, times all kernels in turns, and looks whether the results are the same."""
        theirs = self._prefill(mode, x)
        ours = {"ours": self._forward(mode, x)}
        if record.work == "backward":
            forward = ours["ours"]
            results = forward.results
            ours = {"forward": forward, "ours": self._backward(mode, x, **results)}
        sides = {**ours, "PyTorch's": theirs}
        for name, side in sides.items():
            record.errors[name] = x.check(side)
        before = [y.clone() for side in sides.values() for y in side.results.values()]
        launches = [launch for side in sides.values() for launch in side.launches]
        times = self.clock({f"{x.name} {i}": x.start for i, x in enumerate(launches)})
        samples: dict[str, list[float]] = {}  # of all launches of a kernel together
        for launch, of_launch in zip(launches, times.values(), strict=True):
            before_it = samples.get(launch.name, [0.0] * len(of_launch))
            samples[launch.name] = [a + b for a, b in zip(before_it, of_launch, strict=True)]
        for side in sides.values():
            if len({launch.name for launch in side.launches}) < len(side.launches):
                for launch in side.launches:  # they share dS, and ran out of order
                    launch.start()
        after = [y for side in sides.values() for y in side.results.values()]
        if not all(map(torch.equal, before, after)):
            raise AssertionError("the results changed while they were timed")
        record.times = {name: Spread.of(of_kernel) for name, of_kernel in samples.items()}
        yardstick = samples[theirs.launches[0].name]
        for what, side in ours.items():
            names = dict.fromkeys(launch.name for launch in side.launches)
            sums = [sum(times) for times in zip(*(samples[name] for name in names))]
            record.relative[what] = _ratio(sums, yardstick)
            for name in names:
                record.relative[name] = _ratio(samples[name], yardstick)

    def planted_fault(self, work: Workload) -> None:
        """The check must notice a scale that is off by a tenth, or it is worth nothing."""

        def spoil(params: Params) -> None:
            params.scale *= 1.1
            params.scale_log2 *= 1.1

        x = Operands(work, self.device)
        attention = next(iter(self.attention.values()))
        attention.disturb = spoil
        forward = self._forward(next(iter(self.attention)), x)
        attention.disturb = None
        try:
            x.check(forward)
        except AssertionError as error:
            print(f"planted fault noticed: {error}", flush=True)
            return
        raise AssertionError("a planted fault went unnoticed: no figure of this run counts")

    def attributes(self) -> dict[str, dict[str, dict[str, int]]]:
        """mode -> kernel -> registers, shared memory, spilled bytes"""
        return {
            mode: {name: self.kernels[mode].attributes(name) for name in sorted(names)}
            for mode, names in self.timed.items()
        }


def _ratio(times: list[float], yardstick: list[float]) -> Spread:
    return Spread.of([a / b for a, b in zip(times, yardstick)])


def _progress(record: Record) -> str:
    mask = "causal" if record.causal else "dense"
    where = f"{record.work} {record.dtype} D{record.head_dim} L{record.length} {mask}"
    if record.failure:
        result = "FAILED"
    elif record.same_as:
        result = f"the code of {record.same_as}"
    else:
        spread = record.relative["ours"]
        result = f"{spread.median:.3f} of PyTorch's forward"
    return f"{where}, {record.mode}: {result} ({record.seconds} s)"


def _json_lines(result: dict) -> str:
    """JSON with a line for each record and each kernel."""
    records = ",\n".join(json.dumps(record) for record in result["records"])
    kernels = ",\n".join(
        f'"{mode}": {{\n'
        + ",\n".join(f'"{name}": {json.dumps(x)}' for name, x in kernels.items())
        + "}"
        for mode, kernels in result["kernels"].items()
    )
    environment = json.dumps(result["environment"])
    return (
        f'{{"environment": {environment},\n"records": [\n{records}\n],\n'
        f'"kernels": {{\n{kernels}\n}}}}\n'
    )


def _write(bench: Bench, output: Path) -> str:
    """Writes both files and returns the Markdown."""
    result = {
        "environment": describe(SPEED_SOURCES),
        "records": [asdict(record) for record in bench.records],
        "kernels": bench.attributes() if bench.usable else {},
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "speed.json").write_text(_json_lines(result))
    text = speed_report.table(result)
    (output / "speed.md").write_text(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--only", choices=("forward",), help="leaves out the backward")
    parser.add_argument("--lengths", nargs="+", type=int, help="instead of the usual ones")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each comparison")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    chosen = list(workloads(options.dtypes, options.head_dims, options.lengths))
    longest = max(options.lengths or BACKWARD_LENGTHS) if options.only != "forward" else 0
    kernels = {mode: Kernels(path) for mode, path in SPEED_KERNELS.items()}
    clock = functools.partial(timing.take_turns, seconds=options.seconds)
    bench = Bench(kernels, Planner(SPEED_PLANNER), clock)
    for work in chosen:
        bench.assemble(work, work.length <= longest)
    bench.planted_fault(chosen[0])
    for work in chosen:
        bench.run(work, work.length <= longest)
        _write(bench, options.output)  # each time, so that a run that is cut off leaves results
        torch.cuda.empty_cache()
    print(_write(bench, options.output))
    sys.exit(not bench.usable or any(record.failure for record in bench.records))


if __name__ == "__main__":
    main()
