"""Model B: traces of a kernel's loop body, played on a discrete-event model of one GPU core.

A `Trace` is what one simdgroup does for one block, in issue order. It keeps, beside the timing, the
counts that the engine can check (products by operand type, bytes by address space, exponentials,
shuffles, barriers).
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

SOURCE = Path(__file__).with_name("core_model.cpp")
BUILD = Path(__file__).resolve().parents[2] / "build" / "apple_model"
SIMDGROUP = 32
SCHEDULERS = 4
#: Published rate of the matrix unit, 101.7 of 128 FMA each core-cycle, as scheduler cycles for an
#: 8x8x8 product: 512 FMA at a quarter of it.
CEILING = 512 / (101.7 / SCHEDULERS)

ALU, MATRIX, EXP, THREADGROUP, BARRIER, DEVICE = range(6)
Handle = int | None


@dataclass(frozen=True)
class Parameters:
    """Constants of the core that nobody publishes; cycles unless said otherwise."""

    mma_half: float = 17.0  #: between two products with half operands and half sums
    mma_float: float = 18.0  #: with float sums, whatever the operands
    mma_latency: float = 2.0  #: of a product, in units of the above
    shared_latency: float = 40.0  #: of threadgroup memory
    shared_bytes: float = 64.0  #: of threadgroup memory each cycle, for the whole core
    shared_least: float = 1.0  #: of any access to threadgroup memory
    device_latency: float = 300.0
    device_bytes: float = 32.0  #: of device memory (through the caches) each cycle
    device_line: float = 0.5  #: for each cache line that an access touches
    device_least: float = 1.0  #: of any access to device memory by 32 lanes
    barrier: float = 20.0
    convert: float = 1.0  #: of a float from or to a half
    bfloat_pair: float = 3.0  #: to widen two bfloats
    shuffle_latency: float = 6.0
    alu_latency: float = 4.0
    bank_conflicts: bool = True
    shared_capacity: int = 60 * 1024  #: bytes of threadgroup memory of a core
    shared_granule: int | str = 1  #: bytes to which an allocation is rounded, or "power of two"
    address: float = 1.0  #: scale of the address arithmetic of a block
    pytorch_registers: int = 70  #: of PyTorch's prefill kernel before its tile's share
    unexplained: float = 0.0  #: share lost by PyTorch's kernel once a block has over 64 products
    slab_registers: int = 40  #: of mlx-train-perf's kernels besides their tiles
    slowdown: float = 1.0  #: of everything; cancels in ratios


#: core_model.cpp's Instruction.
_INSTRUCTION = np.dtype([("cost", "f8"), ("latency", "f8"), ("unit", "i4"), ("after", "i4", 3)])


@cache
def _library() -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or next(
        (c for c in ("clang++-19", "clang++", "g++", "c++") if shutil.which(c)), "c++"
    )
    identity = hashlib.sha256(SOURCE.read_bytes() + compiler.encode()).hexdigest()[:16]
    path = BUILD / f"core_model-{identity}.so"
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            made = Path(folder) / path.name
            flags = ["-std=c++17", "-O3", "-ffp-contract=off", "-shared", "-fPIC"]
            subprocess.run([compiler, *flags, str(SOURCE), "-o", str(made)], check=True)
            made.replace(path)
    library = ctypes.CDLL(str(path))
    library.simulate_core.restype = ctypes.c_double
    return library


class Trace:
    """The instructions of one simdgroup for one block."""

    def __init__(self, parameters: Parameters, partner: Trace | None = None):
        self.p = parameters
        #: What every second simdgroup does instead, in as many products and barriers.
        self.partner = partner
        self.instructions: list[tuple[float, float, int, tuple[int, ...]]] = []
        self.counts: Counter[str] = Counter()

    def _add(self, unit: int, cost: float, latency: float, after: Iterable[Handle]) -> int:
        index = len(self.instructions)
        distances = [index - x for x in after if x is not None][-3:]
        self.instructions.append((cost, latency, unit, (*distances, *[0] * (3 - len(distances)))))
        return index

    # ---- verbs; each returns a handle to wait for

    def alu(self, cycles: float, *after: Handle) -> Handle:
        if cycles <= 0:
            return next((x for x in after if x is not None), None)
        return self._add(ALU, cycles, self.p.alu_latency, after)

    def mma(self, operand: str, *after: Handle, sums: str = "float") -> int:
        """An 8x8x8 product of operands of a Metal type."""
        cost = self.p.mma_half if sums == "half" else self.p.mma_float
        self.counts[f"mma_{operand}"] += 1
        return self._add(MATRIX, cost, cost * self.p.mma_latency, after)

    def exp2(self, number: int, *after: Handle) -> int:
        self.counts["exp2"] += number
        return self._add(EXP, 4 * number, 4, after)

    def shuffle(self, *after: Handle) -> int:
        self.counts["shuffle"] += 1
        return self._add(ALU, 2, self.p.shuffle_latency, after)

    def convert(self, pairs: int, source: str, target: str, *after: Handle) -> Handle:
        """Pairs of elements to another Metal type."""
        if source == target or not pairs:
            return self.alu(0, *after)
        self.counts["fcvt"] += 2 * pairs
        if "bfloat" in (source, target):
            return self.alu(pairs * self.p.bfloat_pair, *after)
        return self.alu(pairs * 2 * self.p.convert, *after)

    def read_shared(self, nbytes: float, *after: Handle, conflict: float = 1) -> int:
        self.counts["threadgroup_bytes_read"] += nbytes
        return self._shared(nbytes, conflict, self.p.shared_latency, after)

    def write_shared(self, nbytes: float, *after: Handle, conflict: float = 1) -> int:
        self.counts["threadgroup_bytes_written"] += nbytes
        return self._shared(nbytes, conflict, self.p.shared_latency / 2, after)

    def _shared(self, nbytes: float, conflict: float, latency: float, after) -> int:
        if not self.p.bank_conflicts:
            conflict = 1
        cost = max(self.p.shared_least, nbytes / self.p.shared_bytes * conflict)
        return self._add(THREADGROUP, cost, latency, after)

    def read_device(
        self,
        nbytes: float,
        *after: Handle,
        lines: float = 0,
        cached: float = 0,
        moved: float | None = None,
    ) -> int:
        """cached: share that the first-level cache serves; moved: bytes, if lanes ask for the
        same ones."""
        self.counts["device_bytes_read"] += nbytes
        moved = nbytes if moved is None else moved
        cost = moved * (cached / 64 + (1 - cached) / self.p.device_bytes)
        latency = self.p.device_latency * (0.4 * cached + 1 - cached)
        least = max(self.p.device_least, lines * self.p.device_line)
        return self._add(DEVICE, max(cost, least), latency, after)

    def write_device(self, nbytes: float, *after: Handle, lines: float = 0) -> int:
        self.counts["device_bytes_written"] += nbytes
        least = max(self.p.device_least, lines * self.p.device_line)
        return self._add(DEVICE, max(nbytes / self.p.device_bytes, least), 50, after)

    def spill(self, nbytes: float, cached: float) -> None:
        """Writes a register to device memory and reads it again, which the engine's kernels never
        do."""
        kept = self.counts.copy()
        self.write_device(nbytes, lines=1)
        self.read_device(nbytes, lines=1, cached=cached)
        self.counts = kept
        self.counts["spilled_bytes"] += 2 * nbytes

    def barrier(self, *after: Handle) -> int:
        self.counts["barrier"] += 1
        return self._add(BARRIER, 0, 0, after)

    def pipelined(
        self,
        items: Sequence,
        load: Callable[[Any], Any],
        use: Callable[[Any, Any], Any],
        ahead: int,
    ) -> None:
        """load(item) for each item, `ahead` items before use(item, loaded)."""
        loaded = {}
        for i in range(len(items) + ahead):
            if i < len(items):
                loaded[i] = load(items[i])
            if i >= ahead:
                use(items[i - ahead], loaded.pop(i - ahead))

    @property
    def roles(self) -> list[Trace]:
        return [self] if self.partner is None else [self, self.partner]

    @property
    def mean_counts(self) -> dict[str, float]:
        """Of a simdgroup, over the roles."""
        total = sum((Counter(role.counts) for role in self.roles), Counter[str]())
        return {name: number / len(self.roles) for name, number in total.items()}

    @property
    def products(self) -> float:
        return sum(n for name, n in self.counts.items() if name.startswith("mma_"))


@dataclass(frozen=True)
class Run:
    """The core model's result for a trace: cycles of one scheduler for one product."""

    cycles: float
    matrix_busy: float
    shared_busy: float
    device_busy: float
    alu_busy: float


def simulate(
    trace: Trace,
    threadgroups: int,
    simdgroups: int,
    *,
    starts: int = 3,
    window: int = 5,
    warm_up: int = 2,
) -> Run:
    """The mean over `starts` different staggers of the resident threadgroups, each over about
    `window` blocks in which all of them run."""
    roles = trace.roles
    if any(x.products != trace.products for x in roles) or simdgroups % len(roles):
        raise ValueError("the simdgroups of a pair must do as many products each")
    instructions = [x for role in roles for x in role.instructions]
    lengths = (ctypes.c_int32 * len(roles))(*(len(role.instructions) for role in roles))
    body = np.array(instructions, _INSTRUCTION)
    utilisation = (ctypes.c_double * 4)()
    total = 0.0
    least = trace.products * trace.p.mma_half * simdgroups / SCHEDULERS  # cycles of a block
    for k in range(starts):
        stagger = 97.0 + 211 * k
        blocks = warm_up + window + 2 * int(stagger / least)
        cycles = _library().simulate_core(
            body.ctypes.data_as(ctypes.c_void_p),
            lengths,
            len(roles),
            threadgroups,
            simdgroups,
            blocks,
            warm_up,
            ctypes.c_double(trace.p.barrier),
            ctypes.c_double(stagger),
            utilisation,
        )
        if cycles <= 0:
            raise RuntimeError("the core model has no steady state")
        total += cycles
    per_product = total / starts * SCHEDULERS / (trace.products * simdgroups) * trace.p.slowdown
    return Run(per_product, *utilisation)


# ---- residency

#: Half-word registers of a thread, and threads of a core that fit: Mesa's table for G13
#: (src/asahi/compiler, agx_occupancy), a register file of 208 KiB.
_OCCUPANCY = (
    (112, 896),
    (128, 832),
    (136, 768),
    (144, 704),
    (160, 640),
    (184, 576),
    (208, 512),
    (232, 448),
    (256, 384),
)
REGISTER_FILE = 208 * 1024
MAX_REGISTERS = 128


def simdgroups_by_registers(registers: float) -> int:
    """Simdgroups of a core whose threads need that many 32-bit registers."""
    halves = 2 * registers
    if halves <= 104:
        return min(96, int(REGISTER_FILE / (2 * SIMDGROUP * max(halves, 8))))
    return next((n for size, n in _OCCUPANCY if halves <= size), _OCCUPANCY[-1][1]) // SIMDGROUP


def resident_threadgroups(
    p: Parameters, threadgroup_bytes: int, simdgroups: int, registers: float
) -> int:
    if p.shared_granule == "power of two":
        allocated = 1 << max(0, math.ceil(math.log2(max(threadgroup_bytes, 1))))
    else:
        granule = int(p.shared_granule)
        allocated = -(-threadgroup_bytes // granule) * granule
    by_memory = int(p.shared_capacity // max(allocated, 1))
    by_registers = simdgroups_by_registers(min(registers, MAX_REGISTERS)) // simdgroups
    return max(1, min(by_memory, by_registers))
