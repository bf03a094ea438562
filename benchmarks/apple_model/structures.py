"""The kernels as structures: what one simdgroup does for one block, by parameters alone.

A structure knows its trace for the core model, its threadgroup memory and an estimate of its
registers. tests/test_apple_model.py holds the traces of real kernels to the engine's counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .core_model import SIMDGROUP, Handle, Parameters, Trace

SIZES = {"half": 2, "bfloat": 2, "float": 4}
METAL = {"float16": "half", "bfloat16": "bfloat", "float32": "float"}
MISCELLANEOUS_REGISTERS = 18  #: addresses, loop counters, strides
CHUNK = 16  #: bytes of a staging access
MAX_REGISTERS = 128

#: Device rows of the own simdgroup, read again in every block: share found in the L1 cache.
REREAD_CACHED = 0.5


def _words(operand: str) -> int:
    """32-bit registers of a lane for a fragment, whose two elements it holds."""
    return 2 if operand == "float" else 1


def run_ahead(registers: float) -> int:
    """Fragment loads that the compiler moves ahead of their use."""
    return 4 if registers <= 112 else 2


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What all the kernels share. Subclasses say what a block does."""

    dtype: str  #: Metal type of the tensors
    head_dim: int  #: of the template: padded
    score_operand: str  #: operand type of S = Q K^T and dP = dO V^T
    value_operand: str  #: operand type of the products with P and dS
    simdgroups: int = 4
    split: int = 1  #: simdgroups that share rows, each with its part of head_dim
    #: The depth of S is summed in this many chains, one after the other.
    chains: int = 1

    @property
    def size(self) -> int:
        return SIZES[self.dtype]

    @property
    def depth(self) -> int:
        """Fragments along the simdgroup's part of head_dim."""
        return self.head_dim // 8 // self.split

    @property
    def row_bytes(self) -> int:
        """Of a staged row; 16 bytes of padding keep rows off the same banks."""
        return self.head_dim * self.size + CHUNK

    def registers(self) -> dict[str, float]:
        raise NotImplementedError

    def threadgroup_bytes(self) -> int:
        raise NotImplementedError

    def trace(self, p: Parameters) -> Trace:
        raise NotImplementedError

    @property
    def register_estimate(self) -> float:
        return sum(self.registers().values())

    @property
    def spilled(self) -> float:
        return max(0.0, self.register_estimate - MAX_REGISTERS)

    @property
    def ahead(self) -> int:
        return run_ahead(self.register_estimate)

    # ---- verbs

    def stage(self, t: Trace, rows: int, blocks: int = 1) -> None:
        """Device rows to threadgroup memory by all threads, the barriers around included."""
        t.barrier()
        threads = self.simdgroups * SIMDGROUP
        chunks = rows * self.head_dim * self.size / CHUNK
        steps = max(1, math.ceil(chunks / threads)) * blocks
        nbytes = chunks * CHUNK * blocks / self.simdgroups / steps
        loads = [t.read_device(nbytes) for _ in range(steps)]
        for load in loads:
            t.write_shared(nbytes, load, conflict=1.25)
        t.barrier()

    def read_pair(self, t: Trace) -> Handle:
        """A fragment of a staged block as it lies."""
        return t.read_shared(64 * self.size)

    def read_transposed(self, t: Trace) -> Handle:
        """A fragment of the transposed block: two scalar loads."""
        t.read_shared(32 * self.size)
        return t.read_shared(32 * self.size)

    def read_rows(self, t: Trace) -> Handle:
        """A fragment of the simdgroup's own device rows, eight cache lines."""
        return t.read_device(64 * self.size, lines=8, cached=REREAD_CACHED)

    def product_ABt(self, t: Trace, rows: int, columns: int, streamed: bool) -> list[Handle]:
        """rows x columns fragments of A B^T over the depth; A in registers or streamed from device
        rows, B a staged block. What is loaded is converted where it is used."""
        operand = self.score_operand
        sums: dict[tuple[int, int, int], Handle] = {}
        left: dict[tuple[int, int], Handle] = {}
        for chain in range(self.chains):

            def load(item: tuple[int, int]) -> Handle:
                d, c = item
                if c == 0 and streamed:
                    left.update({(r, d): self.read_rows(t) for r in range(rows)})
                return self.read_transposed(t)

            def use(item: tuple[int, int], b: Handle, chain: int = chain) -> None:
                d, c = item
                if c == 0 and streamed:
                    for r in range(rows):
                        left[r, d] = t.convert(1, self.dtype, operand, left[r, d])
                b = t.convert(1, self.dtype, operand, b)
                for r in range(rows):
                    before = sums.get((chain, r, c))
                    sums[chain, r, c] = t.mma(operand, before, b, left.get((r, d)))

            depth = range(chain, self.depth, self.chains)
            t.pipelined([(d, c) for d in depth for c in range(columns)], load, use, self.ahead)
            if chain:
                for r in range(rows):
                    for c in range(columns):
                        sums[0, r, c] = t.alu(2, sums[0, r, c], sums[chain, r, c])
        return [sums[0, r, c] for r in range(rows) for c in range(columns)]

    def product_AB(self, t: Trace, rows: int, depth: int, after: Handle = None,
                   left: list[list[tuple[str, Handle]]] | None = None) -> None:  # fmt: skip
        """rows x self.depth fragments of A B with B a staged block of `depth` fragments. A is in
        registers once `after` is done, or was loaded: left[r][k] is (type, handle)."""
        operand = self.value_operand
        sums: dict[tuple[int, int], Handle] = {}
        operands: dict[tuple[int, int], Handle] = {}

        def use(item: tuple[int, int], b: Handle) -> None:
            k, c = item
            if c == 0 and left:
                for r in range(rows):
                    source, handle = left[r][k]
                    operands[r, k] = t.convert(1, source, operand, handle)
            b = t.convert(1, self.dtype, operand, b)
            for r in range(rows):
                before = sums.get((r, c), after)
                sums[r, c] = t.mma(operand, before, b, operands.get((r, k)))

        items = [(k, c) for k in range(depth) for c in range(self.depth)]
        t.pipelined(items, lambda _: self.read_pair(t), use, self.ahead)

    def exchange(self, t: Trace, fragments: list[Handle]) -> list[Handle]:
        """Sums partial fragments of the simdgroups that share rows, in a fixed order."""
        if self.split == 1:
            return fragments
        for x in fragments:
            t.write_shared(256, x)
        t.barrier()
        result = []
        for x in fragments:
            for _ in range(self.split - 1):
                x = t.alu(2, x, t.read_shared(256))
            result.append(x)
        return result

    def exchange_bytes(self, fragments: int) -> int:
        return 0 if self.split == 1 else self.simdgroups * fragments * 256

    def spill(self, t: Trace) -> None:
        """Registers beyond the thread's limit go out and in once for each block."""
        for _ in range(math.ceil(self.spilled)):
            t.spill(4 * SIMDGROUP, REREAD_CACHED)


def _last(handles: list[Handle], number: int = 3) -> list[Handle]:
    return handles[-number:]


@dataclass(frozen=True, kw_only=True)
class Forward(Structure):
    """Forward: 8 R rows of queries for each simdgroup (or `split` of them), BK keys a block."""

    rows: int = 1  #: R
    bk: int = 32
    keep_q: bool = True  #: Q in registers, else read from device memory in each block
    shared_buffer: bool = False  #: K and V one after the other in one buffer: four barriers
    score_cycles: int = 2  #: ALU operations on a fragment for scale, score changes

    @property
    def bq(self) -> int:
        return 8 * self.rows * self.simdgroups // self.split

    def registers(self) -> dict[str, float]:
        columns, words = self.bk // 8, _words(self.score_operand)
        base = dict(
            o=2 * self.depth * self.rows,
            q=self.depth * self.rows * words if self.keep_q else 2 * self.rows * words,
            s=2 * columns * self.rows,
            loads=4 * max(words, _words(self.value_operand)),
            statistics=3 * self.rows,
            staging=4,
            miscellaneous=MISCELLANEOUS_REGISTERS,
        )
        if self.chains > 1:
            base["chains"] = 2 * columns * self.rows
        return base

    def threadgroup_bytes(self) -> int:
        blocks = 1 if self.shared_buffer else 2
        exchange = self.exchange_bytes(self.rows * self.bk // 8)
        return blocks * self.bk * self.row_bytes + exchange

    def trace(self, p: Parameters) -> Trace:
        t = Trace(p)
        columns = self.bk // 8
        self.stage(t, self.bk, 1 if self.shared_buffer else 2)
        s = self.product_ABt(t, self.rows, columns, not self.keep_q)
        s = self.exchange(t, s)
        if self.shared_buffer:
            self.stage(t, self.bk)
        self.spill(t)
        weights = []
        for r in range(self.rows):
            row = s[r * columns : (r + 1) * columns]
            x = t.alu((2 + self.score_cycles) * columns, *_last(row))
            for _ in range(2):
                x = t.alu(1, t.shuffle(x))
            x = t.exp2(1, t.alu(3, x))
            for _ in range(columns):
                e = t.exp2(2, t.alu(2, x))
                e = t.alu(2, e)
                weights.append(t.convert(1, "float", self.value_operand, e))
        rescaled = t.alu(2 * self.depth * self.rows + 10 * p.address, *_last(weights))
        self.product_AB(t, self.rows, columns, rescaled)
        return t


@dataclass(frozen=True, kw_only=True)
class BackwardDq(Structure):
    """dq: 8 R rows of queries for each simdgroup, BK keys a block, three products."""

    rows: int = 1
    bk: int = 16
    keep: bool = True  #: Q and dO in registers
    shared_buffer: bool = False  #: V for dP first, then K for S and dQ, in one buffer
    score_cycles: int = 4  #: scale, difference to lse, to powers of two

    @property
    def bq(self) -> int:
        return 8 * self.rows * self.simdgroups // self.split

    def registers(self) -> dict[str, float]:
        columns, words = self.bk // 8, _words(self.score_operand)
        return dict(
            dq=2 * self.depth * self.rows,
            q_and_dout=2 * self.rows * words * (self.depth if self.keep else 2),
            s_and_dp=(4 if self.chains == 1 else 6) * columns * self.rows,
            ds=columns * self.rows * _words(self.value_operand),
            loads=4 * max(words, _words(self.value_operand)),
            statistics=2 * self.rows,
            staging=4,
            miscellaneous=MISCELLANEOUS_REGISTERS,
        )

    def threadgroup_bytes(self) -> int:
        blocks = 1 if self.shared_buffer else 2
        exchange = self.exchange_bytes(2 * self.rows * self.bk // 8)
        return blocks * self.bk * self.row_bytes + exchange

    def trace(self, p: Parameters) -> Trace:
        t = Trace(p)
        columns = self.bk // 8
        self.stage(t, self.bk, 1 if self.shared_buffer else 2)
        s = self.product_ABt(t, self.rows, columns, not self.keep)
        if self.shared_buffer:
            self.stage(t, self.bk)
        dp = self.product_ABt(t, self.rows, columns, not self.keep)
        both = self.exchange(t, s + dp)
        s, dp = both[: len(s)], both[len(s) :]
        self.spill(t)
        ds = []
        for a, b in zip(s, dp, strict=True):
            x = t.exp2(2, t.alu(self.score_cycles + 2, a))
            ds.append(t.convert(1, "float", self.value_operand, t.alu(4, x, b)))
        first = t.alu(10 * p.address, *_last(ds)) or ds[-1]
        self.product_AB(t, self.rows, columns, first)
        return t


@dataclass(frozen=True, kw_only=True)
class BackwardDkv(Structure):
    """dk and dv: 8 R keys for each simdgroup (or `split` of them), BQ queries a block, four
    products; transposed, so that P^T and dS^T are left operands."""

    rows: int = 1
    bq: int = 16
    keep: bool = True  #: K and V in registers
    shared_buffer: bool = False  #: Q, dO and Q again in one buffer: six barriers
    store: str | None = None  #: type in which dS^T goes to device memory for BackwardDqStored
    score_cycles: int = 4

    @property
    def keys(self) -> int:
        return 8 * self.rows * self.simdgroups // self.split

    def registers(self) -> dict[str, float]:
        columns, words = self.bq // 8, _words(self.score_operand)
        value_words = _words(self.value_operand)
        return dict(
            dk_and_dv=4 * self.depth * self.rows,
            k_and_v=2 * self.rows * words * (self.depth if self.keep else 2),
            s_and_dp=(4 if self.chains == 1 else 6) * columns * self.rows,
            p_and_ds=2 * columns * self.rows * (value_words if value_words == 1 else 0),
            loads=4 * max(words, value_words),
            staging=4,
            miscellaneous=MISCELLANEOUS_REGISTERS,
        )

    def threadgroup_bytes(self) -> int:
        blocks = 1 if self.shared_buffer else 2
        exchange = self.exchange_bytes(2 * self.rows * self.bq // 8)
        return blocks * self.bq * self.row_bytes + exchange

    def trace(self, p: Parameters) -> Trace:
        t = Trace(p)
        columns = self.bq // 8
        self.stage(t, self.bq, 1 if self.shared_buffer else 2)
        s = self.product_ABt(t, self.rows, columns, not self.keep)
        if self.shared_buffer:
            self.stage(t, self.bq)
        dp = self.product_ABt(t, self.rows, columns, not self.keep)
        both = self.exchange(t, s + dp)
        s, dp = both[: len(s)], both[len(s) :]
        self.spill(t)
        # lse and delta of two query rows for each fragment, one load each: a line serves all lanes.
        for _ in range(4 * columns):
            statistics = t.read_device(4 * SIMDGROUP, lines=1, cached=REREAD_CACHED, moved=32)
        weights, ds = [], []
        for a, b in zip(s, dp, strict=True):
            x = t.exp2(2, t.alu(self.score_cycles + 2, a, statistics))
            weights.append(t.convert(1, "float", self.value_operand, x))
            y = t.alu(4, x, b)
            ds.append(t.convert(1, "float", self.value_operand, y))
            if self.store:
                y = t.convert(1, "float", self.store, y)
                nbytes = 64 * SIZES[self.store] / self.split
                t.write_device(nbytes, y, lines=nbytes / 128)
        first = t.alu(12 * p.address, *_last(weights), *_last(ds, 1)) or ds[-1]
        self.product_AB(t, self.rows, columns, first)
        if self.shared_buffer:
            self.stage(t, self.bq)
        self.product_AB(t, self.rows, columns, first)
        return t


@dataclass(frozen=True, kw_only=True)
class BackwardDqStored(Structure):
    """dq = dS K from the dS tiles that BackwardDkv stored: one product."""

    rows: int = 2
    bk: int = 32
    store: str = "float"

    @property
    def bq(self) -> int:
        return 8 * self.rows * self.simdgroups // self.split

    def registers(self) -> dict[str, float]:
        words = _words(self.value_operand)
        return dict(
            dq=2 * self.depth * self.rows,
            ds=self.bk // 8 * self.rows * max(words, _words(self.store)),
            loads=4 * words,
            staging=4,
            miscellaneous=MISCELLANEOUS_REGISTERS,
        )

    def threadgroup_bytes(self) -> int:
        return self.bk * self.row_bytes

    def trace(self, p: Parameters) -> Trace:
        t = Trace(p)
        columns, nbytes = self.bk // 8, 64 * SIZES[self.store]
        self.stage(t, self.bk)
        self.spill(t)
        # Every tile of 8 x 8 lies in one piece, so a fragment is one or two lines.
        tiles = [
            [(self.store, t.read_device(nbytes, lines=2)) for _ in range(columns)]
            for _ in range(self.rows)
        ]
        self.product_AB(t, self.rows, columns, left=tiles)
        return t
