"""What others published and no fit knows, beside what the fitted sets say of it.

Of published.json's `held_out`: whole passes of mlx-train-perf's backward, which are several
launches, by the set's own factor for its kernels; and MLX's forward on chips after the M2, as if
their cores were those of an M1 Max with another clock.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .core_model import Parameters
from .ensemble import Spread, ensemble, evaluate, pessimism
from .fit import PUBLISHED, factor, milliseconds, ratios
from .peers import prefill
from .slabs import Slab, blocks

POINTS = PUBLISHED["held_out"]
TOGETHER = "mlx-train-perf, all its times on 32 cores"
NO_LEAST = "the same, if an access took the port for its bytes and lines alone"


def _slab(point: dict[str, Any], p: Parameters, common: float) -> float:
    kernel = Slab(part=point["part"], slab=point["slab"])
    run, _, trace = evaluate(kernel, p)
    products = trace.products * kernel.passes
    number = blocks(point["part"], point["rows"], **PUBLISHED["slab_problem"])
    return milliseconds(run.cycles, products, number) / 1e3 / point["seconds"] / common


def _steel(point: dict[str, Any], p: Parameters) -> float:
    kernel = prefill(point["dtype"], point["head_dim"])
    run, _, trace = evaluate(kernel, p)
    number = point["heads"] * (point["length"] // kernel.bq) * (point["length"] // kernel.bk)
    cycles = run.cycles * pessimism(p, trace.products)
    chip = PUBLISHED["chips"][point["chip"]]
    device = PUBLISHED["cores"] * PUBLISHED["gigahertz"]
    time = milliseconds(cycles, trace.products * kernel.simdgroups, number)
    return time * device / (chip["cores"] * chip["gigahertz"]) / point["milliseconds"]


def rows(step: int = 1) -> list[dict[str, Any]]:
    """Predicted / measured of each point, and of all times of mlx-train-perf together as if its M1
    Max had 32 cores, of which the fit takes the ratios alone; also without device_least."""
    values: dict[str, list[float]] = {TOGETHER: [], NO_LEAST: []}
    for p in ensemble(step):
        common = factor(ratios(p))
        values[TOGETHER].append(common)
        values[NO_LEAST].append(factor(ratios(replace(p, device_least=1.0))))
        for point in POINTS:
            own = _slab(point, p, common) if point["kernel"] == "slab" else _steel(point, p)
            values.setdefault(point["name"], []).append(own)
    spreads = {name: Spread.of(found) for name, found in values.items()}
    return [
        dict(point=name, median=round(s.median, 4), low=round(s.low, 4), high=round(s.high, 4))
        for name, s in spreads.items()
    ]
