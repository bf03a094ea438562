"""Times our decode beside a copy and beside PyTorch's own Metal kernels, on an NVIDIA GPU.

``python -m benchmarks.nvidia.decode_speed`` needs torch with CUDA and what ``build --caches`` made.
Nothing is timed before its numbers agree with float64 in the same run. It writes one JSON file and
a Markdown table; the exit status is 1 if anything failed. ``--docs`` puts the tables of that file
into docs/ instead.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.planner import CachePlan, DecodeParams

from .paths import CACHES_PLANNER, CACHES_SOURCES, DECODE_KERNELS, RESULTS, ROOT

sys.path.insert(0, str(ROOT / "src"))

from orchard_ops.testing import assert_attention_close

from . import decode_peer, decode_report, reference, timing
from .attention import Guarded
from .caches import CachePlanner, Caches
from .decode_works import PARTS, DecodeWork, works
from .driver import Kernels, Launch
from .environment import describe
from .timing import Spread, Work

#: Milliseconds of each work in each round.
Clock = Callable[[dict[str, Work]], dict[str, list[float]]]

OURS, AGAIN, MERGE, PEER, COPY = "ours", "ours again", "merge alone", "PyTorch's", "copy"
_COPIED = 1 << 30  # bytes


@dataclass
class Record:
    """One workload. Times are in milliseconds of one call; a failed record has none."""

    work: str
    dtype: str
    head_dim: int
    length: int
    batch: int
    group: int
    q_len: int
    page_size: int
    kv_bytes: int
    #: threadgroups that the plan divides a sequence's keys between, and those of the whole decode
    parts: int = 0
    threadgroups: int = 0
    #: what -> result -> largest error against float64, and that of same-dtype mathematics
    errors: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    #: of a call's launches together: "ours", "ours, tensor-cores", "PyTorch's", "512 parts", ...
    times: dict[str, Spread] = field(default_factory=dict)
    #: bytes of keys and values a second, by those of the copy in the same round (read and written)
    of_copy: dict[str, Spread] = field(default_factory=dict)
    #: PyTorch's time by ours in the same round
    speedup: dict[str, Spread] = field(default_factory=dict)
    #: the second measurement of the same launches by the first, in the same round
    null: Spread | None = None
    copied_per_second: float = 0.0
    #: what is not timed, as its results are wrong -> what is wrong
    left_out: dict[str, str] = field(default_factory=dict)
    failure: str = ""
    seconds: float = 0.0


class Exact:
    """What is right for some groups of heads of a set of operands."""

    def __init__(self, work: DecodeWork, q: Tensor, k: Tensor, v: Tensor):
        self._group = work.group
        last = (work.batch - 1, work.num_kv_heads - 1)
        self._places = list(dict.fromkeys([(0, 0), last]))
        self._of: list[tuple] = []
        for b, head in self._places:
            if work.page_size:
                table = work.call(q, k, v).places.table
                assert table is not None
                keys, values = (x[table[b].long(), head].flatten(0, 1)[None, None] for x in (k, v))
            else:
                keys, values = (x[b, head][None, None] for x in (k, v))
            queries = self._cut(q, b, head)
            dout = torch.zeros_like(queries)
            pair = (
                reference.attention(queries, keys, values, dout, None, work.scoring, dtype)
                for dtype in (torch.float64, q.dtype)
            )
            self._of.append(tuple(pair))

    def _cut(self, x: Tensor, b: int, head: int) -> Tensor:
        heads = slice(head * self._group, (head + 1) * self._group)
        return x[b : b + 1, heads]

    def check(self, results: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        """result -> largest error against float64, and that of same-dtype mathematics

        Raises:
            AssertionError: by the rule of orchard_ops.testing; or a number that is not finite.
        """
        errors = {name: (0.0, 0.0) for name in results}
        for name, x in results.items():
            if not torch.isfinite(x).all():
                raise AssertionError(f"{name}: NaN or infinity")
        for (b, head), (ref, eager) in zip(self._places, self._of):
            cut = {name: self._cut(x, b, head) for name, x in results.items()}
            assert_attention_close([cut.get(name) for name in ("out", "lse")], ref, eager)
            for name, x in cut.items():
                exact = getattr(ref, name).double()
                both = (x, getattr(eager, name))
                pair = [(y.double() - exact).abs().max().item() for y in both]
                errors[name] = tuple(map(max, errors[name], pair))
        return errors


@dataclass
class Side:
    """Launches for one set of operands after the other, and what they write."""

    launches: list[list[Launch]]
    results: list[dict[str, Tensor]]

    def run(self) -> None:
        for launch in itertools.chain.from_iterable(self.launches):
            launch.start()


class Bench:
    def __init__(
        self,
        kernels: dict[str, Kernels],
        planner: CachePlanner,
        clock: Clock,
        device: str = "cuda",
        copied: int = _COPIED,
        parts: Sequence[int] = PARTS,
    ):
        self.kernels = kernels
        self.caches = {mode: Caches(k, planner) for mode, k in kernels.items()}
        self.planner = planner
        self.clock = clock
        self.device = device
        self.parts = parts
        self.records: list[Record] = []
        self.timed: dict[str, set[str]] = {mode: set() for mode in kernels}
        self.usable = True
        source, target = (
            torch.empty(copied, dtype=torch.uint8, device=device).random_(0, 256) for _ in range(2)
        )
        self._copy = lambda: target.copy_(source)
        self._copied = 2 * copied

    # ---- launches

    def _ours(
        self, work: DecodeWork, mode: str, sets: Sequence[tuple[Tensor, ...]], parts: int = 0
    ) -> Side:
        guarded = _Scratch(self.device)
        launches, results = [], []
        for q, k, v in sets:
            out = torch.full_like(q, torch.nan)
            lse = torch.full(q.shape[:3], torch.nan, device=q.device)
            call = work.in_parts(work.call(q, k, v), parts)
            launches.append(self.caches[mode].prepare_decode(call, out, lse, guarded))
            results.append({"out": out, "lse": lse})
        return Side(launches, results)

    def _theirs(self, work: DecodeWork, sets: Sequence[tuple[Tensor, ...]]) -> Side:
        launches, results = [], []
        for q, k, v in sets:
            out = torch.full_like(q, torch.nan)
            kernels = self.kernels["native"]
            launches.append(decode_peer.prepare(kernels, q, k, v, out, work.scoring.scale))
            results.append({"out": out})
        return Side(launches, results)

    def _sides(self, work: DecodeWork, sets: Sequence[tuple[Tensor, ...]]) -> dict[str, Side]:
        sides = {}
        for mode in work.modes:
            name = OURS if mode == "native" else f"{OURS}, {mode}"
            sides[name] = self._ours(work, mode, sets)
        for parts in self._parts(work):
            sides[f"{parts} parts"] = self._ours(work, work.modes[-1], sets, parts)
        if work.has_peer:
            sides[PEER] = self._theirs(work, sets)
        return sides

    def _parts(self, work: DecodeWork) -> list[int]:
        """Other numbers than the plan's, half to four times it; with more, some have no key."""
        own = self.plan(work).params.parts
        most = min(4 * own, work.length // 256)
        return [n for n in self.parts if n != own and own // 2 <= n <= most]

    def plan(self, work: DecodeWork) -> CachePlan:
        call = work.shaped()
        return self.planner.decode(call, torch.empty_like(call.q))

    # ---- records

    def run(self, work: DecodeWork) -> None:
        """Records the outcome, whatever it is. After a fault of the GPU nothing more runs."""
        if not self.usable:
            return
        names = ("dtype", "head_dim", "length", "batch", "group", "q_len", "page_size", "kv_bytes")
        record = Record(str(work), **{name: getattr(work, name) for name in names})
        started = time.monotonic()
        try:
            plan = self.plan(work)
            record.parts = plan.params.parts
            groups = plan.kernels[0].groups
            record.threadgroups = groups[0] * groups[1]
            self._time(record, work)
            self._synchronize()
        except Exception as error:
            record.failure = f"{type(error).__name__}: {error}"
            record.times, record.of_copy, record.speedup, record.null = {}, {}, {}, None
            print(f"FAILED {work}\n{traceback.format_exc()}", flush=True)
            try:
                self._synchronize()
            except RuntimeError:
                self.usable = False
        record.seconds = round(time.monotonic() - started, 3)
        self.records.append(record)
        print(decode_report.progress(asdict(record)), flush=True)

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _time(self, record: Record, work: DecodeWork) -> None:
        """Checks all, times all in turns, and looks whether the results are the same."""
        sets = [work.operands(self.device, seed) for seed in range(work.copies)]
        exact = Exact(work, *sets[0])
        sides = self._sides(work, sets)
        for name, side in list(sides.items()):
            side.run()
            try:
                record.errors[name] = exact.check(side.results[0])
            except AssertionError as error:
                if name == OURS:
                    raise
                record.left_out[name] = str(error)
                del sides[name]
        del exact
        before = [x.clone() for side in sides.values() for y in side.results for x in y.values()]
        if self.device == "cuda":
            torch.cuda.empty_cache()
        # A graph reads as many bytes as the copy moves: launching it takes no larger a share.
        again = max(1, -(-self._copied // (work.kv_bytes * len(sets))))
        calls = {name: (side.run, len(side.launches)) for name, side in sides.items()}
        calls[AGAIN] = calls[OURS]
        # Its scratch holds the sums of the last set, so that it has results of its own.
        merging = self._ours(work, "native", sets)
        merging.run()
        merges = [launches[-1] for launches in merging.launches]
        calls[MERGE] = (lambda: [x.start() for x in merges], len(merges))
        starts = {name: self._replayed(run, again) for name, (run, _) in calls.items()}
        samples = self.clock({**starts, COPY: self._copy})
        after = [x for side in sides.values() for y in side.results for x in y.values()]
        if not all(map(torch.equal, before, after)):
            raise AssertionError("the results changed while they were timed")
        times = {name: [x / (n * again) for x in samples[name]] for name, (_, n) in calls.items()}
        self._compare(record, times, samples[COPY])
        for mode in work.modes:
            self.timed[mode].update(self._names(sides, mode))

    def _names(self, sides: dict[str, Side], mode: str) -> set[str]:
        wanted = [OURS, PEER] if mode == "native" else [f"{OURS}, {mode}"]
        chosen = (sides[name].launches[0] for name in wanted if name in sides)
        return {launch.name for launches in chosen for launch in launches}

    def _replayed(self, run: Callable[[], object], again: int) -> Work:
        """Many runs as one graph: the host would take longer to launch them than the GPU to run."""

        def all_of_it() -> None:
            for _ in range(again):
                run()

        if self.device != "cuda":
            return all_of_it
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.capture_begin()
            all_of_it()
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return graph.replay

    def _compare(self, record: Record, times: dict[str, list[float]], copy: list[float]) -> None:
        rates = [self._copied / ms for ms in copy]
        record.copied_per_second = 1e3 * Spread.of(rates).median
        record.times = {name: Spread.of(x) for name, x in times.items()}
        record.times[COPY] = Spread.of(copy)
        for name, of_call in times.items():
            if name not in (MERGE, AGAIN):
                shares = [record.kv_bytes / ms / rate for ms, rate in zip(of_call, rates)]
                record.of_copy[name] = Spread.of(shares)
            if PEER in times and name not in (MERGE, AGAIN, PEER):
                record.speedup[name] = Spread.of(_ratios(times[PEER], of_call))
        record.null = Spread.of(_ratios(times[AGAIN], times[OURS]))

    def planted_fault(self, work: DecodeWork) -> None:
        """The check must notice a scale that is off by a hundredth, or it is worth nothing."""

        def spoil(params: DecodeParams) -> None:
            params.attention.scale *= 1.01

        sets = [work.operands(self.device)]
        exact = Exact(work, *sets[0])
        caches = self.caches["native"]
        caches.disturb = spoil
        side = self._ours(work, "native", sets)
        caches.disturb = None
        side.run()
        try:
            exact.check(side.results[0])
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


def _ratios(times: list[float], yardstick: list[float]) -> list[float]:
    return [a / b for a, b in zip(times, yardstick)]


class _Scratch(Guarded):
    """Memory that one call after the other writes its parts into."""

    def __init__(self, device: str):
        super().__init__()
        self.device = device
        self._kept: dict[tuple[int, ...], Tensor] = {}

    def dense(self, sizes: list[int], dtype: torch.dtype) -> Tensor:
        key = tuple(sizes)
        if key not in self._kept:
            self._kept[key] = torch.full(sizes, torch.nan, dtype=dtype, device=self.device)
        return self._kept[key]


def _result_of(bench: Bench) -> dict:
    return {
        "environment": describe(CACHES_SOURCES),
        "records": [asdict(record) for record in bench.records],
        "kernels": bench.attributes() if bench.usable else {},
    }


def _write(result: dict, output: Path) -> str:
    """Writes both files and returns the Markdown."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "decode.json").write_text(decode_report.json_lines(result))
    text = decode_report.page(result)
    (output / "decode.md").write_text(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each comparison")
    parser.add_argument(
        "--stop-after", type=float, default=1e9, help="seconds; begins no more work"
    )
    parser.add_argument("--match", default="", help="only works whose name contains this")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--join", nargs="+", type=Path, metavar="FOLDER", help="run nothing: join earlier --outputs"
    )
    parser.add_argument("--docs", action="store_true", help="only docs/, from the file")
    options = parser.parse_args()
    if options.docs:
        decode_report.write_docs(json.loads((options.output / "decode.json").read_text()))
        return
    if options.join:
        results = [json.loads((folder / "decode.json").read_text()) for folder in options.join]
        print(_write(decode_report.join(results), options.output))
        return
    started = time.monotonic()
    kernels = {mode: Kernels(path) for mode, path in DECODE_KERNELS.items()}

    def clock(starts: dict[str, Work]) -> dict[str, list[float]]:
        return timing.take_turns(starts, options.seconds)

    bench = Bench(kernels, CachePlanner(CACHES_PLANNER), clock)
    for of_mode in kernels.values():
        of_mode.assemble(of_mode.names)
    chosen = [work for work in works() if options.match in str(work)]
    bench.planted_fault(chosen[0])
    for work in chosen:
        if time.monotonic() - started > options.stop_after:
            print(f"no time for {work}", flush=True)
            continue
        bench.run(work)
        torch.cuda.empty_cache()
    print(_write(_result_of(bench), options.output))
    wrong = any(record.failure or record.left_out for record in bench.records)
    sys.exit(not bench.usable or wrong)


if __name__ == "__main__":
    main()
