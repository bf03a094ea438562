"""Everything the two models say about the kernels of the plan, beside the error they are known to
have."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

from . import counts, held_out, kernels
from .core_model import CEILING, MAX_REGISTERS, Parameters
from .ensemble import ENSEMBLE, Spread, ensemble, evaluate, pessimism, registers_of
from .fit import PUBLISHED, milliseconds
from .issue_model import issue
from .problems import Keys, Problem, blocks, products, tail
from .structures import METAL, SIZES, Structure

DTYPES = tuple(counts.DTYPES)
HEAD_DIMS = counts.HEAD_DIMS
PROBLEM = Problem(4096)  #: of the ratios to PyTorch's kernel
LENGTHS = (1024, 2048, 4096, 8192, 16384)
#: Memory for dS in bytes: the default of native/attention.cpp, and none.
SCRATCH = (256 << 20, 0)
#: The unfused backward of a math path, on M1 Max: GEMMs at the matrix unit's published ceiling,
#: traffic of the (L, L) tensors at the memory's rate, the two one after the other; no skipping of
#: masked blocks. Optimistic: S and P of half precision tensors may well be float32.
UNFUSED_GEMMS = 4
UNFUSED_PASSES = 8  #: over S, P and their gradients, in the tensors' type
MEMORY_BANDWIDTH = 400e9
MMA_FLOPS = 8.44e12


@dataclass(frozen=True)
class Result:
    """Model B's cycles for a product of one kernel, for every parameter set."""

    kernel: Any
    cycles: tuple[float, ...]
    pessimistic: tuple[float, ...]
    residents: tuple[int, ...]
    products: float  #: of a simdgroup and block

    def times(
        self, problem: Problem, pessimistic: bool = False, keys: Keys | None = None
    ) -> list[float]:
        """Milliseconds on the published device, of every parameter set."""
        n = products(self.kernel, self.products, problem, keys)
        values = self.pessimistic if pessimistic else self.cycles
        return [milliseconds(c, n, 1) for c in values]


@cache
def result(family: str, dtype: str, head_dim: int, step: int = 1) -> Result:
    return simulate(kernels.structure(family, dtype, head_dim), step)


def simulate(kernel: Any, step: int = 1) -> Result:
    cycles, pessimistic, residents = [], [], []
    for p in ensemble(step):
        run, resident, trace = evaluate(kernel, p)
        cycles.append(run.cycles)
        pessimistic.append(run.cycles * pessimism(p, trace.products))
        residents.append(resident)
    return Result(kernel, tuple(cycles), tuple(pessimistic), tuple(residents), trace.products)


def _divide(a: list[float], b: list[float]) -> list[float]:
    return [x / y for x, y in zip(a, b, strict=True)]


def _spread(values: Any) -> list[float]:
    s = Spread.of(list(values))
    return [round(x, 4) for x in (s.median, s.low, s.high)]


def kernel_row(family: str, dtype: str, head_dim: int, step: int = 1) -> dict[str, Any]:
    r = result(family, dtype, head_dim, step)
    counted = counts.count(family, dtype, head_dim)
    wrong = kernels.disagreements(r.kernel, counted)
    if wrong:
        raise RuntimeError(f"the trace of {family} {dtype} {head_dim} left its kernel: {wrong}")
    registers = registers_of(r.kernel, Parameters())
    row: dict[str, Any] = dict(
        family=family,
        dtype=dtype,
        head_dim=head_dim,
        a_cycles=round(issue(family, counted).per_product, 3),
        b_cycles=_spread(r.cycles),
        b_pessimistic=round(statistics.median(r.pessimistic), 4),
        of_ceiling=round(CEILING / statistics.median(r.cycles), 4),
        registers=round(registers, 1),
        spills=isinstance(r.kernel, Structure) and registers > MAX_REGISTERS,
        threadgroup_bytes=counted.threadgroup_bytes,
        simdgroups_per_core=statistics.median(r.residents),
    )
    if isinstance(r.kernel, Structure):
        row["tile"] = _tile(r.kernel)
    if family == kernels.FORWARD:
        peer = result(kernels.PREFILL, dtype, head_dim, step)
        base = peer.times(PROBLEM)
        row["ratio"] = _spread(_divide(r.times(PROBLEM), base))
        row["pessimistic_ratio"] = _spread(_divide(r.times(PROBLEM, True), base))
        row["a_ratio"] = round(
            row["a_cycles"]
            / issue(kernels.PREFILL, counts.count(kernels.PREFILL, dtype, head_dim)).per_product
            * products(r.kernel, r.products, PROBLEM)
            / products(peer.kernel, peer.products, PROBLEM),
            4,
        )
    return row


def _tile(kernel: Structure) -> dict[str, Any]:
    names = (
        "rows",
        "bq",
        "bk",
        "keys",
        "keep_q",
        "keep",
        "buffers",
        "score_operand",
        "value_operand",
        "ds_operand",
        "store",
    )
    return {x: getattr(kernel, x) for x in names if hasattr(kernel, x)}


def unfused_backward(dtype: str, head_dim: int, problem: Problem) -> float:
    """Milliseconds."""
    pairs = problem.length**2 * problem.heads
    gemms = UNFUSED_GEMMS * 2 * pairs * head_dim / MMA_FLOPS
    moved = UNFUSED_PASSES * SIZES[METAL[dtype]] * pairs
    return 1e3 * (gemms + moved / MEMORY_BANDWIDTH)


def _delta_milliseconds(dtype: str, head_dim: int, problem: Problem) -> float:
    """O and dO once through memory: attention_backward_delta does nothing else for long."""
    size = SIZES[METAL[dtype]]
    return 1e3 * 2 * problem.length * problem.heads * head_dim * size / MEMORY_BANDWIDTH


def ds_milliseconds(launch: counts.Launch, head_dim: int, problem: Problem) -> float:
    """dS of the dispatch once through memory, of the blocks that are not skipped; on the query's
    side also the sums of dq, from the dispatch before and to the next."""
    first, last, n = launch.key_begin, launch.key_end, problem.length
    elements = (last - first) * (n - (first + last) / 2 if problem.causal else n)
    if launch.family == kernels.DQ_FROM_DS:
        elements += n * head_dim * ((first > 0) + (last < n))
    return 1e3 * SIZES["float"] * elements * launch.heads / MEMORY_BANDWIDTH


def backward_row(
    dtype: str, head_dim: int, problem: Problem, scratch_bytes: int, step: int = 1
) -> dict[str, Any]:
    """The backward as the plan launches it with so much memory for dS. If dS goes through memory, a
    kernel takes as long as the longer of its own work and its share of that traffic; `not hidden`
    is their sum."""
    launches = counts.backward_launches(
        dtype, head_dim, problem.length, problem.heads, scratch_bytes, PUBLISHED["cores"]
    )
    loops = Counter(launch for launch in launches if launch.family != counts.DELTA)
    stores = any(launch.family == kernels.DQ_FROM_DS for launch in loops)
    delta = _delta_milliseconds(dtype, head_dim, problem)
    total = [delta] * len(ensemble(step))
    pessimistic, exposed, with_tails = list(total), list(total), list(total)
    tails = []
    for launch, number in loops.items():
        part = Problem(problem.length, launch.heads, problem.causal)
        keys = (launch.key_begin, launch.key_end)
        r = result(launch.family, dtype, head_dim, step)
        if len(blocks(r.kernel, part, keys)) != launch.blocks:
            raise RuntimeError(f"{launch} has other threadgroups than its structure")
        moved = ds_milliseconds(launch, head_dim, problem) if stores else 0.0
        slots = PUBLISHED["cores"] * int(statistics.median(r.residents)) // r.kernel.simdgroups
        tails.append(tail(r.kernel, part, slots, keys))
        times = zip(r.times(part, keys=keys), r.times(part, True, keys), strict=True)
        for i, (ms, worse) in enumerate(times):
            total[i] += number * max(ms, moved)
            pessimistic[i] += number * max(worse, moved)
            exposed[i] += number * (ms + moved)
            with_tails[i] += number * max(ms * tails[-1], moved)
    unfused = unfused_backward(dtype, head_dim, problem)
    return dict(
        dtype=dtype,
        head_dim=head_dim,
        length=problem.length,
        heads=problem.heads,
        causal=problem.causal,
        products=5 if stores else 7,
        launches=len(launches),
        milliseconds=_spread(total),
        pessimistic_milliseconds=round(statistics.median(pessimistic), 4),
        exposed_milliseconds=round(statistics.median(exposed), 4),
        tail_milliseconds=round(statistics.median(with_tails), 4),
        tail=[round(x, 3) for x in tails],
        key_parts=len({launch.key_begin for launch in loops}),
        unfused_milliseconds=round(unfused, 4),
        speedup=_spread([unfused / x for x in total]),
        worst_speedup=round(
            unfused / max(statistics.median(x) for x in (pessimistic, exposed, with_tails)),
            4,
        ),
    )


def published_row(step: int = 1) -> dict[str, Any]:
    """PyTorch's kernel on the problem of its published times: float16, head_dim 128, causal."""
    r = result(kernels.PREFILL, "float16", 128, step)
    a = issue(kernels.PREFILL, counts.count(kernels.PREFILL, "float16", 128))
    blocks = PUBLISHED["points"][0]["blocks"]
    work = r.products * r.kernel.simdgroups
    return dict(
        a_milliseconds=round(milliseconds(a.per_product, work, blocks), 3),
        b_milliseconds=_spread(milliseconds(c, work, blocks) for c in r.cycles),
        published=PUBLISHED["totals"],
    )


def _different_plans(dtype: str, head_dim: int, length: int) -> list[int]:
    """The budgets of SCRATCH that lead to different launches."""
    heads = Problem(length).heads
    sizes = (dtype, head_dim, length, heads)
    plans = {x: counts.backward_launches(*sizes, x, PUBLISHED["cores"]) for x in SCRATCH}
    return [x for i, x in enumerate(SCRATCH) if plans[x] not in [plans[y] for y in SCRATCH[:i]]]


def everything(step: int = 1) -> dict[str, Any]:
    cases = [
        (f, d, n)
        for f in kernels.FAMILIES
        for d in DTYPES
        for n in HEAD_DIMS
        if counts.has(f, d, n)
    ]
    counts.compile_all([(*case, "") for case in cases])
    fitted = json.loads(ENSEMBLE.read_text())
    return dict(
        made_by="python -m benchmarks.apple_model",
        ran_on="no Apple GPU: counts of the simulator, rates and timings published by others",
        device=PUBLISHED["device"],
        parameter_sets=len(ensemble(step)),
        leave_one_out=fitted["leave_one_out"],
        held_out=held_out.rows(step),
        published=published_row(step),
        kernels=[kernel_row(*case, step) for case in cases],
        backward=[
            backward_row(dtype, head_dim, Problem(length, causal=causal), scratch, step)
            for dtype in DTYPES
            for head_dim in (64, 128)
            for causal in (True, False)
            for length in LENGTHS
            for scratch in _different_plans(dtype, head_dim, length)
        ],
    )
