"""python -m benchmarks.apple_model.fit: finds parameter sets that reproduce published timings.

Twenty numbers cannot determine some twenty constants, so no set is the truth. Of the sets
within 7 %, those that differ most from each other are kept: their spread shows what the data leave
open. The twelve of mlx-train-perf enter by their ratios alone: one factor is free for each set.
Writes ensemble.json: the sets, each point's error, and the leave-out errors: a search of its own,
bred and chosen by the others, predicts each of the first eight, and each kernel of mlx-train-perf.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import track

from .core_model import Parameters
from .ensemble import ENSEMBLE, evaluate, pessimism
from .peers import MetalFlashAttention, Prefill
from .slabs import Slab, blocks

PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text())
POINTS = PUBLISHED["points"]
TOLERANCE = 0.07
#: The measured ratio of the half-operand experiment is better known than the times.
RATIO_WEIGHT = 1.5
#: The points that enter by their ratios to each other.
SLABS = tuple(i for i, point in enumerate(POINTS) if point["kernel"] == "slab")
#: What is left out together: a point, or all of a kernel whose structures are one text.
LEFT_OUT: tuple[tuple[int, ...], ...] = (
    *((i,) for i in range(len(POINTS)) if i not in SLABS),
    *(
        tuple(i for i in SLABS if POINTS[i]["part"] == part)
        for part in dict.fromkeys(POINTS[i]["part"] for i in SLABS)
    ),
)

RANGES: dict[str, list[Any]] = dict(
    mma_half=[16.0, 16.5, 17.0, 17.5],
    mma_float=[17.0, 17.5, 18.0, 18.5],
    mma_latency=[1.0, 1.5, 2.0],
    shared_latency=[8.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 80.0],
    shared_bytes=[64.0, 96.0, 128.0],
    shared_least=[1.0, 2.0, 3.0],
    device_latency=[150.0, 300.0, 500.0, 800.0],
    device_bytes=[16.0, 32.0, 64.0],
    device_line=[0.0, 0.25, 0.5, 1.0],
    device_least=[1.0, 4.0, 8.0, 10.0],
    barrier=[10.0, 30.0, 60.0, 100.0],
    convert=[0.0, 0.0, 1.0],
    bfloat_pair=[2.0, 3.0, 4.0],  # no data: the spread of predictions for bfloat16
    bank_conflicts=[False, True],
    shared_capacity=[32768, 49152, 61440, 65536],
    shared_granule=[1, 8192, "power of two"],
    address=[0.5, 1.0, 3.0],
    pytorch_registers=[60, 70, 80],
    slab_registers=[20, 30, 40, 50],
    unexplained=[0.0, 0.0, 0.05, 0.1, 0.2],
    slowdown=[1.0, 1.03, 1.06, 1.09],
)


def tile(point: dict[str, Any], **changes: Any) -> Prefill:
    shape = {name: point[name] for name in ("bq", "bk", "simdgroups")}
    return Prefill(dtype="half", head_dim=128, **shape, **changes)


def milliseconds(cycles: float, products: float, blocks: int) -> float:
    """The time of `blocks` blocks on the device, with `products` products of all their
    simdgroups."""
    return cycles / 4 * products * blocks / (PUBLISHED["cores"] * PUBLISHED["gigahertz"] * 1e6)


def predicted(p: Parameters) -> list[float]:
    """Each point's prediction, in the point's own unit."""
    result = []
    played: dict[Slab, tuple[float, float]] = {}
    for point in POINTS:
        if point["kernel"] == "prefill":
            kernel = tile(point)
            run, _, trace = evaluate(kernel, p)
            cycles = run.cycles * pessimism(p, trace.products)
            products = trace.products * kernel.simdgroups
            result.append(milliseconds(cycles, products, point["blocks"]))
            if point is POINTS[0]:
                first = run.cycles
        elif point["kernel"] == "mfa":
            kernel = MetalFlashAttention(
                head_dim=point["head_dim"],
                keep_o=point["keep_o"],
                estimated_registers=point["registers"],
            )
            result.append(evaluate(kernel, p)[0].cycles)
        elif point["kernel"] == "slab":
            slab = Slab(part=point["part"], slab=point["slab"])
            if slab not in played:
                run, _, trace = evaluate(slab, p)
                played[slab] = run.cycles, trace.products * slab.passes
            cycles, products = played[slab]
            number = blocks(point["part"], point["rows"], **PUBLISHED["slab_problem"])
            result.append(milliseconds(cycles, products, number) / 1e3)
        else:
            result.append(evaluate(tile(POINTS[0], half_scores=True), p)[0].cycles / first)
    return result


def measured(point: dict[str, Any]) -> float:
    units = ("milliseconds", "cycles", "ratio", "seconds")
    return next(point[unit] for unit in units if unit in point)


def ratios(p: Parameters) -> list[float]:
    """Predicted / measured of each point; of SLABS as if their device were PUBLISHED's."""
    return [a / measured(point) for a, point in zip(predicted(p), POINTS, strict=True)]


def factor(errors: list[float], without: Sequence[int] = ()) -> float:
    """By what the times of SLABS, of which points may be left out, are off together."""
    logarithms = [math.log(errors[i]) for i in SLABS if i not in without]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else 1.0


def relative(errors: list[float], without: Sequence[int] = ()) -> list[float]:
    """The errors, of SLABS to each other."""
    common = factor(errors, without)
    return [x / common if i in SLABS else x for i, x in enumerate(errors)]


def rms(errors: list[float], without: Sequence[int] = ()) -> float:
    """The root mean square of the logarithms; points may be left out."""
    squares = [
        (math.log(x) * (RATIO_WEIGHT if "ratio" in POINTS[i] else 1)) ** 2
        for i, x in enumerate(relative(errors, without))
        if i not in without
    ]
    return (sum(squares) / len(squares)) ** 0.5


def worse(errors: list[float]) -> float:
    """rms of all points or of all but SLABS, whichever is more: twelve times that fit well must not
    outvote the others."""
    return max(rms(errors), rms(errors, SLABS))


Found = tuple[Parameters, list[float]]


def search(
    seed: int,
    evaluations: int,
    without: tuple[int, ...] = (),
    begin: Sequence[Parameters] = (),
) -> list[Found]:
    """Random sets at first, then variations of those that fit all points, or all but some. From
    the sets `begin` it goes on by variations alone, as `worse` says.

    What was measured at the points `without` has no part in it: the sets are bred by the others.
    """
    rng = random.Random(seed)
    pool: list[Found] = []
    seen: set[Parameters] = set()
    omitted = [without] if without else [(), *LEFT_OUT]
    choices = [0, 0, 0, *range(1, len(omitted))]
    # Breeding by one score from fewer parents gets to the tolerance in fewer evaluations.
    parents, fresh = (20, 0.1) if without else (40, 0.25)
    scores: list[list[float]] = []  # of each set, a number for each of `omitted`
    if begin:
        choices, fresh = [0], 0.0
        pool = [(p, ratios(p)) for p in begin]
        scores = [[worse(errors)] for _, errors in pool]
        seen = set(begin)
    for _ in track(range(evaluations), description=f"seed {seed}", transient=True):
        if (not begin and len(pool) < max(1, evaluations // 8)) or rng.random() < fresh:
            p = Parameters(**{name: rng.choice(values) for name, values in RANGES.items()})
        else:
            by = rng.choice(choices)
            best = sorted(range(len(pool)), key=lambda i: scores[i][by])[:parents]
            values = asdict(pool[rng.choice(best)][0])
            for name in rng.sample(list(RANGES), rng.choice([1, 2, 3, 5])):
                values[name] = rng.choice(RANGES[name])
            p = Parameters(**values)
        if p in seen or p.mma_half > p.mma_float:
            continue
        seen.add(p)
        errors = ratios(p)
        pool.append((p, errors))
        scores.append([worse(errors)] if begin else [rms(errors, i) for i in omitted])
    return pool


def different(pool: list[Found], number: int) -> list[Found]:
    """The three best, then greedily those that differ in most parameters from all chosen."""
    accepted = sorted((x for x in pool if worse(x[1]) < TOLERANCE), key=lambda x: worse(x[1]))
    chosen, rest = accepted[:3], accepted[3:]

    def distance(a: Found, b: Found) -> int:
        return sum(getattr(a[0], name) != getattr(b[0], name) for name in RANGES)

    nearest = [min(distance(x, y) for y in chosen) for x in rest]
    while rest and len(chosen) < number:
        i = max(range(len(rest)), key=lambda i: nearest[i] - 5 * worse(rest[i][1]))
        chosen.append(rest.pop(i))
        nearest.pop(i)
        nearest = [min(n, distance(x, chosen[-1])) for n, x in zip(nearest, rest, strict=True)]
    return chosen


def left_out(points: tuple[int, ...], seed: int, evaluations: int) -> list[dict[str, Any]]:
    """Predicted / measured of each of the points by up to 60 sets of a search that knows none of
    them; of SLABS to those that it knows."""
    pool = search(seed, evaluations, without=points)
    accepted = sorted(
        (x for x in pool if rms(x[1], points) < TOLERANCE), key=lambda x: rms(x[1], points)
    )[:60]
    return [_error(i, [relative(errors, points)[i] for _, errors in accepted]) for i in points]


def _error(point: int, errors: list[float]) -> dict[str, Any]:
    values = sorted(errors)
    cut = len(values) // 10
    return dict(
        point=POINTS[point]["name"],
        sets=len(values),
        median=round(statistics.median(values), 4),
        low=round(values[cut], 4),
        high=round(values[-1 - cut], 4),
    )


def plain(p: Parameters) -> dict[str, Any]:
    return {f.name: getattr(p, f.name) for f in fields(p)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluations", type=int, default=2000, help="of each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sets", type=int, default=40, help="kept of each seed")
    parser.add_argument(
        "--left-out-evaluations", type=int, default=640, help="of each search without points"
    )
    parser.add_argument("--left-out-seed", type=int, default=1)
    parser.add_argument(
        "--only-left-out", action="store_true", help="keep the sets, find their error anew"
    )
    parser.add_argument(
        "--go-on", action="store_true", help="from the sets that are there; their error stays"
    )
    parser.add_argument("--output", type=Path, default=ENSEMBLE)
    args = parser.parse_args()
    content = json.loads(ENSEMBLE.read_text())
    with ProcessPoolExecutor(os.cpu_count()) as processes:
        found = None
        if not args.go_on:
            task = partial(left_out, seed=args.left_out_seed, evaluations=args.left_out_evaluations)
            found = [processes.submit(task, points) for points in LEFT_OUT]
        if not args.only_left_out:
            begin = [Parameters(**x["parameters"]) for x in content["sets"]] if args.go_on else []
            task = partial(search, evaluations=args.evaluations, begin=begin)
            pools = list(processes.map(task, args.seeds))
            before = content if args.go_on else {}
            content |= fitted(pools, args.seeds, args.evaluations, args.sets, before)
            args.output.write_text(json.dumps(content, indent=1) + "\n")  # whatever comes next
        if found is not None:
            content["leave_one_out_by"] = (
                "a search for each point, or kernel, without it: --left-out-evaluations "
                f"{args.left_out_evaluations} --left-out-seed {args.left_out_seed}"
            )
            content["leave_one_out"] = [x for errors in found for x in errors.result()]
    args.output.write_text(json.dumps(content, indent=1) + "\n")
    for e in content["leave_one_out"]:
        spread = f"{e['median']:.2f} [{e['low']:.2f}..{e['high']:.2f}]"
        print(f"{e['point']:50s} {spread} of {e['sets']} sets")


def fitted(
    pools: list[list[Found]],
    seeds: list[int],
    evaluations: int,
    number: int,
    before: dict[str, Any],
) -> dict[str, Any]:
    """What ensemble.json holds of the sets, so many of each search; `before` is what it held if
    the searches went on from there."""
    sets: dict[Parameters, list[float]] = {}
    for pool in pools:
        sets |= dict(different([x for x in pool if x[0] not in sets], number))
    accepted = len({p for pool in pools for p, e in pool if worse(e) < TOLERANCE})
    print(f"{sum(map(len, pools))} sets tried, {accepted} accepted, {len(sets)} kept")
    command = (
        f"python -m benchmarks.apple_model.fit --evaluations {evaluations} "
        f"--seeds {' '.join(map(str, seeds))} --sets {number}"
    )
    return dict(
        made_by=f"{before['made_by']}; {command} --go-on" if before else command,
        published=PUBLISHED,
        points=[x["name"] for x in POINTS],
        sets=[
            dict(
                rms=round(rms(e), 5),
                rms_without_slabs=round(rms(e, SLABS), 5),
                predicted_over_measured=[round(x, 4) for x in relative(e)],
                slabs_factor=round(factor(e), 4),
                parameters=plain(p),
            )
            for p, e in sets.items()
        ],
    )


if __name__ == "__main__":
    main()
