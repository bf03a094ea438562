"""The kernels as structures: what one simdgroup does for one block, by parameters alone.

A structure knows its trace for the core model, its threadgroup memory and an estimate of its
registers. tests/proof/test_apple_model.py holds the traces of real kernels to the engine's counts.
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
#: Left operands stay in registers while they and the sums take no more (shaders/loader.h).
OPERAND_REGISTERS = 96

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
    value_operand: str  #: operand type of the products with P (forward, dv)
    ds_operand: str = "float"  #: operand type of the products with dS
    simdgroups: int = 4
    #: The depth of S is summed in this many chains, one after the other.
    chains: int = 1
    #: Cycles for addresses and branches of a block, in units of Parameters.address.
    address_cycles: float = 20.0

    @property
    def staged(self) -> str:
        """Type of a staged block: converted when it is staged, not when it is read."""
        return self.score_operand

    @property
    def size(self) -> int:
        return SIZES[self.dtype]

    @property
    def depth(self) -> int:
        """Fragments along head_dim."""
        return self.head_dim // 8

    @property
    def row_bytes(self) -> int:
        """The stride of a staged row. 16 bytes of padding keep rows off the same banks."""
        return self.head_dim * SIZES[self.staged] + CHUNK

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

    def rows_at_once(self, rows: int) -> int:
        """Rows of a staged block that are fetched at once: a power of two for which there are
        threads (shaders/loader.h)."""
        fitting = self.simdgroups * SIMDGROUP // (self.head_dim * self.size // CHUNK)
        return min(1 << max(fitting.bit_length(), 1) - 1, rows)

    def fetch(self, t: Trace, rows: int, blocks: int = 1) -> list[Handle]:
        """Device rows to the registers of all threads, in chunks."""
        steps = math.ceil(rows / self.rows_at_once(rows)) * blocks
        nbytes = rows * self.head_dim * self.size * blocks / self.simdgroups / steps
        return [t.read_device(nbytes) for _ in range(steps)]

    def put(self, t: Trace, rows: int, fetched: list[Handle], blocks: int = 1) -> None:
        """Writes what was fetched to threadgroup memory, as operands."""
        elements = rows * self.head_dim * blocks / self.simdgroups / len(fetched)
        for chunk in fetched:
            chunk = t.convert(elements / SIMDGROUP / 2, self.dtype, self.staged, chunk)
            # At most 16 bytes of a lane go in one access.
            parts = max(1, SIZES[self.staged] // self.size)
            for _ in range(parts):
                t.write_shared(elements * SIZES[self.staged] / parts, chunk, conflict=1.25)

    def stage(self, t: Trace, rows: int, blocks: int = 1) -> None:
        """Device rows to threadgroup memory by all threads, the barriers around included."""
        fetched = self.fetch(t, rows, blocks)
        t.barrier()
        self.put(t, rows, fetched, blocks)
        t.barrier()

    def read_pair(self, t: Trace, direct: bool = False) -> Handle:
        """A fragment of a staged block (or of device rows) as it lies."""
        if direct:
            return t.read_device(64 * self.size, lines=8, cached=REREAD_CACHED)
        return t.read_shared(64 * SIZES[self.staged])

    def read_transposed(self, t: Trace, direct: bool = False) -> Handle:
        """A fragment of the transposed block: two scalar loads."""
        if direct:
            t.read_device(32 * self.size, lines=8, cached=REREAD_CACHED)
            return t.read_device(32 * self.size, lines=8, cached=REREAD_CACHED)
        t.read_shared(32 * SIZES[self.staged])
        return t.read_shared(32 * SIZES[self.staged])

    def read_rows(self, t: Trace) -> Handle:
        """A fragment of the simdgroup's own device rows, eight cache lines."""
        return t.read_device(64 * self.size, lines=8, cached=REREAD_CACHED)

    def product_ABt(
        self, t: Trace, rows: int, columns: int, streamed: bool, direct: bool = False
    ) -> list[Handle]:
        """rows x columns fragments of A B^T over the depth; A in registers or streamed from device
        rows, B a staged block or device rows. What is loaded from the device is converted where it
        is used."""
        operand = self.score_operand
        sums: dict[tuple[int, int, int], Handle] = {}
        left: dict[tuple[int, int], Handle] = {}
        for chain in range(self.chains):

            def load(item: tuple[int, int]) -> Handle:
                d, c = item
                if c == 0 and streamed:
                    left.update({(r, d): self.read_rows(t) for r in range(rows)})
                return self.read_transposed(t, direct)

            def use(item: tuple[int, int], b: Handle, chain: int = chain) -> None:
                d, c = item
                if c == 0 and streamed:
                    for r in range(rows):
                        left[r, d] = t.convert(1, self.dtype, operand, left[r, d])
                b = t.convert(1, self.dtype if direct else self.staged, operand, b)
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

    def product_AB(
        self, t: Trace, operand: str, rows: int, depth: int, after: Handle, direct: bool = False
    ) -> None:
        """rows x self.depth fragments of A B; B is a staged block (or device rows) of `depth`
        fragments, A is in registers once `after` is done."""
        sums: dict[tuple[int, int], Handle] = {}

        def use(item: tuple[int, int], b: Handle) -> None:
            _, c = item
            b = t.convert(1, self.dtype if direct else self.staged, operand, b)
            for r in range(rows):
                sums[r, c] = t.mma(operand, sums.get((r, c), after), b)

        items = [(k, c) for k in range(depth) for c in range(self.depth)]
        t.pipelined(items, lambda _: self.read_pair(t, direct), use, self.ahead)

    def spill(self, t: Trace) -> None:
        """Registers beyond the thread's limit go out and in once for each block."""
        for _ in range(math.ceil(self.spilled)):
            t.spill(4 * SIMDGROUP, REREAD_CACHED)


def _last(handles: list[Handle], number: int = 3) -> list[Handle]:
    return handles[-number:]


#: Numbers of a query row that make weights of scores: origin and logarithm of the sum.
STATISTICS = 2
#: ALU operations on a fragment of weights: scale, two differences.
WEIGHT_CYCLES = 6
#: ALU operations on a transposed fragment besides: the logarithms of its queries are kept finite.
FINITE_CYCLES = 2


def read_statistics(t: Trace, columns: int, numbers: int) -> Handle:
    """Reads so many numbers of two query rows for each fragment, by one load for each row: a line
    serves all lanes."""
    last = None
    nbytes = 4 * numbers
    for _ in range(2 * columns):
        last = t.read_device(nbytes * SIMDGROUP, lines=1, cached=REREAD_CACHED, moved=8 * nbytes)
    return last


def keeps(sums: int, operands: int, rows: int, columns: int, operand: str) -> bool:
    """Whether the kernels hold so many left operands of rows x columns in registers beside so many
    sums."""
    return rows * columns * (4 * sums + SIZES[operand] * operands) / 16 <= OPERAND_REGISTERS


@dataclass(frozen=True, kw_only=True)
class Forward(Structure):
    """Forward: 8 R rows of queries for each simdgroup, BK keys a block.

    The trace is of a block in which no origin of the exponentials moves.
    """

    rows: int = 1  #: R
    bk: int = 32
    keep_q: bool = True  #: Q in registers, else read from device memory in each block
    #: K and V staged side by side (2), one after the other in one buffer with four barriers (1), or
    #: read from device memory by each simdgroup (0).
    buffers: int = 2
    score_cycles: int = 2  #: ALU operations on a fragment for scale, score changes

    @property
    def bq(self) -> int:
        return 8 * self.rows * self.simdgroups

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
        return self.buffers * self.bk * self.row_bytes if self.buffers else CHUNK

    def trace(self, p: Parameters) -> Trace:
        t = Trace(p)
        columns, direct = self.bk // 8, self.buffers == 0
        if not direct:
            self.stage(t, self.bk, self.buffers)
        s = self.product_ABt(t, self.rows, columns, not self.keep_q, direct)
        if self.buffers == 1:
            v = self.fetch(t, self.bk)
            t.barrier()
            self.put(t, self.bk, v)
        self.spill(t)
        above = None
        for r in range(self.rows):
            row = s[r * columns : (r + 1) * columns]
            above = t.alu((2 + self.score_cycles) * columns + 2, above, *_last(row))
        within = t.alu(1, t.shuffle(above))  # origins stay where they are
        weights = []
        for _ in range(self.rows * columns):
            e = t.alu(2, t.exp2(2, t.alu(2, within)))
            weights.append(t.convert(1, "float", self.value_operand, e))
        first = t.alu(self.address_cycles * p.address, *_last(weights)) or weights[-1]
        if self.buffers == 1:
            t.barrier()
        self.product_AB(t, self.value_operand, self.rows, columns, first, direct)
        return t


@dataclass(frozen=True, kw_only=True)
class BackwardDq(Structure):
    """dq: 8 R rows of queries for each simdgroup, BK keys a block, three products."""

    rows: int = 1
    bk: int = 16
    keep: bool = True  #: Q and dO in registers
    score_cycles: int = WEIGHT_CYCLES

    @property
    def bq(self) -> int:
        return 8 * self.rows * self.simdgroups

    def registers(self) -> dict[str, float]:
        columns, words = self.bk // 8, _words(self.score_operand)
        return dict(
            dq=2 * self.depth * self.rows,
            q_and_dout=2 * self.rows * words * (self.depth if self.keep else 2),
            s_and_dp=(4 if self.chains == 1 else 6) * columns * self.rows,
            loads=4 * max(words, _words(self.ds_operand)),
            statistics=3 * self.rows,
            staging=4,
            miscellaneous=MISCELLANEOUS_REGISTERS,
        )

    def threadgroup_bytes(self) -> int:
        return 2 * self.bk * self.row_bytes

    def trace(self, p: Parameters) -> Trace:
        t = Trace(p)
        columns = self.bk // 8
        self.stage(t, self.bk, 2)
        s = self.product_ABt(t, self.rows, columns, not self.keep)
        dp = self.product_ABt(t, self.rows, columns, not self.keep)
        self.spill(t)
        ds = []
        for a, b in zip(s, dp, strict=True):
            x = t.exp2(2, t.alu(self.score_cycles, a))
            ds.append(t.convert(1, "float", self.ds_operand, t.alu(4, x, b)))
        first = t.alu(self.address_cycles * p.address, *_last(ds)) or ds[-1]
        self.product_AB(t, self.ds_operand, self.rows, columns, first)
        return t


@dataclass(frozen=True, kw_only=True)
class BackwardDkv(Structure):
    """dk and dv: 8 keys for each simdgroup, BQ queries a block, four products;
    transposed, so that P^T and dS^T are left operands."""

    rows: int = 1
    bq: int = 16
    keep: bool = True  #: K and V in registers
    store: bool = False  #: dS^T goes to device memory for BackwardDqStored, as floats
    score_cycles: int = WEIGHT_CYCLES + FINITE_CYCLES

    @property
    def keys(self) -> int:
        return 8 * self.rows * self.simdgroups

    def registers(self) -> dict[str, float]:
        columns, words = self.bq // 8, _words(self.score_operand)
        return dict(
            dk_and_dv=4 * self.depth * self.rows,
            k_and_v=2 * self.rows * words * (self.depth if self.keep else 2),
            # While S is summed: S, delta, origin and the logarithm of the sum. The last two go
            # before dP comes, and P as operand comes after both.
            s_and_statistics=(8 if self.chains == 1 else 10) * columns * self.rows,
            loads=4 * max(words, _words(self.ds_operand)),
            staging=4,
            miscellaneous=MISCELLANEOUS_REGISTERS,
        )

    def threadgroup_bytes(self) -> int:
        return 2 * self.bq * self.row_bytes

    def trace(self, p: Parameters) -> Trace:
        t = Trace(p)
        columns = self.bq // 8
        stats, delta = (read_statistics(t, columns, n) for n in (STATISTICS, 1))
        self.stage(t, self.bq, 2)
        s = self.product_ABt(t, self.rows, columns, not self.keep)
        dp = self.product_ABt(t, self.rows, columns, not self.keep)
        self.spill(t)
        scaled = 2 if self.value_operand == "half" else 0  # P goes up in half's range
        weights, ds = [], []
        for a, b in zip(s, dp, strict=True):
            x = t.exp2(2, t.alu(self.score_cycles, a, stats))
            weights.append(t.convert(1, "float", self.value_operand, t.alu(scaled, x)))
            y = t.alu(4, x, b, delta)
            ds.append(t.convert(1, "float", self.ds_operand, y))
            if self.store:
                t.write_device(256, y, lines=2)
        first = t.alu(self.address_cycles * p.address, *_last(weights), *_last(ds, 1)) or ds[-1]
        self.product_AB(t, self.value_operand, self.rows, columns, first)
        self.product_AB(t, self.ds_operand, self.rows, columns, first)
        return t


@dataclass(frozen=True, kw_only=True)
class BackwardDkvPairs(Structure):
    """dk and dv: 8 keys for each two simdgroups, BQ queries a block, two products each. The first
    does S, P and dV, the second dP, dS and dK; P goes over in threadgroup memory as floats."""

    bq: int = 16
    keep: bool = True  #: K, or V, in registers
    store: bool = False  #: dS^T goes to device memory for BackwardDqStored, as floats
    score_cycles: int = WEIGHT_CYCLES + FINITE_CYCLES

    @property
    def keys(self) -> int:
        return 8 * self.simdgroups // 2

    def registers(self) -> dict[str, float]:
        columns, words = self.bq // 8, _words(self.score_operand)
        return dict(
            dk_or_dv=2 * self.depth,
            k_or_v=words * (self.depth if self.keep else 2),
            # The first: S and two statistics. The second: dP, P and delta, where chains are added
            # up before P is read.
            tiles_and_statistics=(6 if self.chains == 1 else 8) * columns,
            loads=4 * max(words, _words(self.ds_operand)),
            staging=4,
            miscellaneous=MISCELLANEOUS_REGISTERS,
        )

    def threadgroup_bytes(self) -> int:
        handed_over = self.simdgroups // 2 * self.bq // 8 * 256
        return 2 * self.bq * self.row_bytes + handed_over

    def trace(self, p: Parameters) -> Trace:
        return self._role(Trace(p, partner=self._role(Trace(p), second=True)), second=False)

    def _role(self, t: Trace, second: bool) -> Trace:
        columns = self.bq // 8
        statistics = read_statistics(t, columns, 1 if second else STATISTICS)  # 1: delta
        self.stage(t, self.bq, 2)
        sums = self.product_ABt(t, 1, columns, not self.keep)  # S or dP
        self.spill(t)
        left = []
        if second:
            t.barrier()
            for b in sums:
                y = t.alu(4, t.read_shared(256), b, statistics)
                left.append(y)
                if self.store:
                    t.write_device(256, y, lines=2)
        else:
            for a in sums:
                x = t.exp2(2, t.alu(self.score_cycles, a, statistics))
                t.write_shared(256, x)
                left.append(x)
            t.barrier()
        first = t.alu(self.address_cycles * t.p.address, *_last(left)) or left[-1]
        self.product_AB(t, self.ds_operand, 1, columns, first)
        return t


@dataclass(frozen=True, kw_only=True)
class BackwardDqStored(Structure):
    """dq = dS K from the dS tiles that BackwardDkv stored: one product."""

    rows: int = 2
    bk: int = 32

    @property
    def bq(self) -> int:
        return 8 * self.rows * self.simdgroups

    def registers(self) -> dict[str, float]:
        words = _words(self.ds_operand)
        return dict(
            dq=2 * self.depth * self.rows,
            ds=2 * self.bk // 8 * self.rows,
            loads=4 * words,
            staging=4,
            miscellaneous=MISCELLANEOUS_REGISTERS,
        )

    def threadgroup_bytes(self) -> int:
        return self.bk * self.row_bytes

    def trace(self, p: Parameters) -> Trace:
        t = Trace(p)
        columns = self.bk // 8
        # Every tile of 8 x 8 lies in one piece; it is transposed by two scalar loads.
        tiles = []
        for _ in range(self.rows * columns):
            t.read_device(4 * SIMDGROUP, lines=2)
            tiles.append(t.read_device(4 * SIMDGROUP, lines=2, cached=1))
        self.stage(t, self.bk)
        self.spill(t)
        first = t.alu(self.address_cycles * p.address, *_last(tiles)) or tiles[-1]
        self.product_AB(t, self.ds_operand, self.rows, columns, first)
        return t
