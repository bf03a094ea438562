"""The kernels of mlx-train-perf as structures: forward, dQ and dK/dV, by the width of their slab.

One simdgroup is a threadgroup. It owns 32 rows and goes over blocks of 32 others. Scores are 4 x 4
tiles of float sums; operands are read from device memory, an element of each lane at a time, and
nothing is staged. The sums of D columns are held a slab at a time, and everything that leads to the
scores is done anew for each slab, so that the body that repeats is a slab's pass over one block.

tests/proof/test_apple_model_fit.py holds the traces to the engine's counts of the text in its
wheel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from .core_model import MAX_REGISTERS, SIMDGROUP, Handle, Parameters, Trace
from .structures import REREAD_CACHED, SIZES

TILES = 4  #: of 8 rows, on either side of the scores
ROWS = 8 * TILES
#: A step takes 16 bytes of a cache line of 128: the first level has the line from the step before,
#: seven times of eight.
FROM_LINE = 7 / 8


@dataclass(frozen=True, kw_only=True)
class Slab:
    """A kernel with sums of `slab` columns."""

    part: str  #: forward, dq or dkv
    slab: int
    head_dim: int = 128
    dtype: str = "bfloat"
    simdgroups: int = 1
    #: How long the core model plays it: a block is long, and its simdgroups are independent.
    played: ClassVar[dict[str, int]] = dict(starts=1, window=3, warm_up=1)

    @property
    def passes(self) -> int:
        return self.head_dim // self.slab

    @property
    def sums(self) -> int:
        """Registers of a lane for one sum of a slab; dk/dv has two."""
        return 2 * TILES * self.slab // 8

    def registers(self, p: Parameters) -> float:
        scores = 2 * TILES * TILES * (1 if self.part == "forward" else 2)  # S, and dP
        operands = 2 * 2 * TILES
        sums = self.sums * (2 if self.part == "dkv" else 1)
        return p.slab_registers + scores + operands + sums

    def threadgroup_bytes(self) -> int:
        return 0

    def trace(self, p: Parameters) -> Trace:
        t = Trace(p)
        if self.part == "dkv":
            for _ in range(4 * TILES):  # lse and delta of two queries of a lane
                t.read_device(4 * SIMDGROUP, lines=1, cached=FROM_LINE)
        address = t.alu(30 * p.address)
        s = self._scores(t, address)
        if self.part == "forward":
            self._product(t, self._softmax(t, s), p)
            return t
        weights: list[Handle] = [t.exp2(2, t.alu(8, x)) for x in s]
        if self.part == "dkv":
            self._product(t, weights, p)
        dp = self._scores(t, weights[-1])
        ds: list[Handle] = [t.alu(6, x, y) for x, y in zip(weights, dp, strict=True)]
        self._product(t, ds, p)
        return t

    def _fragments(self, t: Trace, lines: Sequence[int]) -> list[Handle]:
        """Two elements of a lane each, by a load each: all loads, then what converts them."""
        nbytes = SIZES[self.dtype] * SIMDGROUP
        loads = [
            [t.read_device(nbytes, lines=n, cached=FROM_LINE) for _ in range(2)] for n in lines
        ]
        return [t.convert(1, self.dtype, "float", *pair) for pair in loads]

    def _scores(self, t: Trace, after: Handle) -> list[Handle]:
        """S or dP, of which a step loads all operands before its products. A fragment touches a
        line for each of 8 rows, a transposed one for each of 4 by either load."""
        sums = [after] * (TILES * TILES)
        for _ in range(self.head_dim // 8):
            operands = self._fragments(t, [8] * TILES + [4] * TILES)
            for i in range(TILES * TILES):
                left, right = operands[i // TILES], operands[TILES + i % TILES]
                sums[i] = t.mma("float", sums[i], left, right)
        return sums

    def _softmax(self, t: Trace, s: list[Handle]) -> list[Handle]:
        above: Handle = None
        for r in range(TILES):
            above = t.alu(8 * TILES, above, *s[r * TILES : (r + 1) * TILES][-2:])
            above = t.alu(1, t.shuffle(t.alu(1, t.shuffle(above))))
            above = t.exp2(1, above)  # what the sums so far are scaled by
        weights: list[Handle] = []
        for _ in range(TILES):
            weights += [t.exp2(2, t.alu(6, above)) for _ in range(TILES)]
            total = t.alu(2 * TILES, weights[-1])
            t.alu(1, t.shuffle(t.alu(1, t.shuffle(total))))
        t.alu(self.sums, above)
        return weights

    def _product(self, t: Trace, weights: list[Handle], p: Parameters) -> None:
        """The sums += weights times rows of the block, a column of tiles after the other. Sums
        without registers come from memory and go back; in the forward twice, as they are scaled."""
        spilled = max(0.0, self.registers(p) - MAX_REGISTERS)
        products = 2 if self.part == "dkv" else 1
        times = 2 if self.part == "forward" else 1
        of_sums = min(self.sums, spilled / products)
        self._spill(t, round(spilled / products - of_sums))  # scores, where the sums are small
        columns = self.slab // 8
        waiting = 0.0
        for _ in range(columns):
            waiting += of_sums * times / columns
            self._spill(t, int(waiting))
            waiting -= int(waiting)
            sums: list[Handle] = [None] * TILES
            for k, right in enumerate(self._fragments(t, [8] * TILES)):
                for r in range(TILES):
                    sums[r] = t.mma("float", sums[r], right, weights[r * TILES + k])

    @staticmethod
    def _spill(t: Trace, registers: int) -> None:
        for _ in range(registers):
            t.spill(4 * SIMDGROUP, REREAD_CACHED)


@cache
def blocks(part: str, rows: int, length: int, heads: int, kv_heads: int) -> int:
    """Blocks of 32 x 32 scores of a causal problem, of its last `rows` queries alone."""
    first = length - rows
    if part == "dkv":
        of_keys = (-(-(length - max(first, key)) // ROWS) for key in range(0, length, ROWS))
        return sum(of_keys) * kv_heads * (heads // kv_heads)
    return sum(range(first // ROWS + 1, length // ROWS + 1)) * heads
