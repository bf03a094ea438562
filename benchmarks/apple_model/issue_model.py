"""Model A: issue cycles of a simdgroup as a weighted sum of its exact counts.

Weights are published rates of the Apple7/8 GPU (philipturner/metal-benchmarks) where there are any.
Nothing waits for anything in it, so its number is optimistic, and free of noise.
"""

from __future__ import annotations

from dataclasses import dataclass

from .core_model import SCHEDULERS
from .counts import PREFILL, Counts

#: Cycles of a scheduler for each instruction of a simdgroup. Products of half and of float operands
#: cost the same: published are 17 and 18, with half and with float sums, and ours are float.
MMA = 18.0
FLOAT = {"fadd": 1, "fmul": 1, "fma": 1, "fminmax": 1, "fcmp": 1, "select": 1, "fdiv": 7}
CONVERT = {"fcvt": 1, "icvt": 1}
#: Half of the integer operations of this IR: the rest would be folded into addressing. Divisions
#: are by constants.
ADDRESS = {"int": 0.5, "icmp": 0.5, "imul": 2, "idiv": 2, "gep": 0.5}
EXP2 = 4.0
SHUFFLE = 2.0
BRANCH = 2.0
ACCESS = {
    "load_threadgroup": 1.0,
    "store_threadgroup": 1.0,
    "load_device": 1.0,
    "store_device": 1.0,
}
#: PyTorch's kernel is written element by element where neighbours lie side by side; Apple's
#: compiler joins such accesses. (Ours ask for pairs and chunks themselves.)
JOINED = {
    "load_threadgroup": 0.5,
    "store_threadgroup": 0.6,
    "load_device": 0.25,
    "store_device": 0.25,
}
PORT_BYTES = 64  #: of threadgroup memory for each cycle of the core


@dataclass(frozen=True)
class Issue:
    """Cycles of one simdgroup for one block (or for what it does once)."""

    products: float
    parts: dict[str, float]  #: issue cycles by what spends them
    port: float  #: cycles of the core's threadgroup port

    @property
    def cycles(self) -> float:
        """Four simdgroups issue side by side, all share the port, and the two overlap."""
        return max(sum(self.parts.values()), SCHEDULERS * self.port)

    @property
    def per_product(self) -> float:
        return self.cycles / self.products


def products(values: dict[str, float]) -> float:
    return sum(values.get(f"mma_{x}", 0) for x in ("half", "bfloat", "float"))


def issue(family: str, counts: Counts, once: bool = False) -> Issue:
    values = counts.once if once else counts.steady

    def weigh(weights: dict[str, float]) -> float:
        return sum(weight * values.get(name, 0) for name, weight in weights.items())

    parts = dict(
        mma=MMA * products(values),
        float=weigh(FLOAT),
        convert=weigh(CONVERT),
        address=weigh(ADDRESS),
        exp2=EXP2 * (values.get("exp2", 0) + values.get("log2", 0)),
        shuffle=SHUFFLE * values.get("shuffle", 0),
        branch=BRANCH * values.get("branch", 0),
        access=weigh(JOINED if family == PREFILL else ACCESS),
    )
    moved = values.get("threadgroup_bytes_read", 0) + values.get("threadgroup_bytes_written", 0)
    return Issue(products(values), parts, moved / PORT_BYTES)
