"""Structures of other people's kernels: what the model is fitted to and compared with."""

from __future__ import annotations

from dataclasses import dataclass

from .core_model import Handle, Parameters, Trace
from .structures import SIMDGROUP, SIZES


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """PyTorch's prefill_attention (MLX's steel attention): Q, K^T and V in threadgroup memory, 8
    rows for each simdgroup, float operands, K and V in one buffer."""

    dtype: str
    head_dim: int
    bq: int
    bk: int
    simdgroups: int
    half_scores: bool = False  #: the measured experiment with half operands in S

    @property
    def size(self) -> int:
        return SIZES[self.dtype]

    def registers(self, p: Parameters) -> float:
        return (
            p.pytorch_registers + 0.7 * self.bk + 0.5 * (self.head_dim - 128) + (self.size == 4) * 6
        )

    def threadgroup_bytes(self) -> int:
        pad = 16 // self.size
        q = self.bq * (self.head_dim + pad)
        kv = max((self.bk + pad) * self.head_dim, self.bk * (self.head_dim + pad))
        return self.size * (q + kv)

    def trace(self, p: Parameters) -> Trace:
        t = Trace(p)
        size, columns, depth = self.size, self.bk // 8, self.head_dim // 8
        elements = self.bk * self.head_dim // (self.simdgroups * SIMDGROUP)  # of a lane
        loads = -(-elements * size // 8)

        def load_block() -> list[int]:
            return [t.read_device(256, lines=min(32, elements * size // 4)) for _ in range(loads)]

        score_operand = self.dtype if self.half_scores else "float"
        t.barrier()
        loaded = load_block()
        for i in range(elements):
            conflict = min(8, self.head_dim // elements)
            t.write_shared(32 * size, loaded[i * size // 8], conflict=conflict)
        t.barrier()
        s: list[Handle] = [None] * columns
        for _ in range(depth):
            # Barriers of the simdgroup around: all loads, then all conversions, then the products.
            q, *k = [t.read_shared(64 * size) for _ in range(1 + columns)]
            ready = t.convert(1 + columns, self.dtype, score_operand, q, k[-1])
            for c in range(columns):
                s[c] = t.mma(score_operand, s[c], k[c], ready)
        largest = t.alu(6 * columns, *s[-3:])
        t.barrier()
        for x in load_block():
            t.write_shared(256, x, conflict=2)
        for _ in range(columns):
            x = t.alu(1, t.shuffle(t.alu(1, largest)))
            largest = t.alu(2, t.shuffle(x))
        total = t.exp2(2 * columns + 1, t.alu(4 * columns, largest))
        for _ in range(columns):
            x = t.alu(1, t.shuffle(t.alu(1, total)))
            total = t.alu(2, t.shuffle(x))
        t.alu(2 * depth + int(30 * p.address), total)
        t.barrier()
        o: dict[int, Handle] = {}

        def multiply(d: int, v: Handle) -> None:
            o[d] = t.mma("float", o.get(d), t.convert(1, self.dtype, "float", v))

        # At head_dim 128 barriers keep each load where it is.
        t.pipelined(
            [d for d in range(depth) for _ in range(columns)],
            lambda _: t.read_shared(64 * size),
            multiply,
            0 if self.head_dim == 128 else 4,
        )
        return t


def prefill(dtype: str, head_dim: int) -> Prefill:
    """The tile that PyTorch dispatches (Attention.mm of torch 2.13 to 2.15)."""
    bq, bk, simdgroups = {256: (16, 8, 2), 128: (32, 16, 4)}.get(head_dim, (32, 32, 4))
    return Prefill(dtype=dtype, head_dim=head_dim, bq=bq, bk=bk, simdgroups=simdgroups)


@dataclass(frozen=True, kw_only=True)
class MetalFlashAttention:
    """The forward of metal-flash-attention on M1: 8 rows for each simdgroup, half operands (and
    half sums in S), blocks of [BK x 32] by asynchronous copies, the transposed K fragment as two
    scalar loads."""

    head_dim: int
    keep_o: bool  #: O in registers, else in device memory between blocks
    estimated_registers: float
    bk: int = 128
    head_block: int = 32
    simdgroups: int = 4

    def registers(self, p: Parameters) -> float:
        return self.estimated_registers

    def threadgroup_bytes(self) -> int:
        return self.bk * self.head_block * 2

    def trace(self, p: Parameters) -> Trace:
        t = Trace(p)
        columns, depth = self.bk // 8, self.head_block // 8
        parts = range(self.head_dim // self.head_block)
        share = self.threadgroup_bytes() / self.simdgroups
        s: list[Handle] = [None] * columns

        def copy() -> None:
            t.barrier()
            t.barrier(t.read_device(share))

        for _ in parts:
            copy()

            def load(_item):
                t.read_shared(64)
                return t.read_shared(64)

            def use(c, k):
                s[c] = t.mma("half", s[c], k, sums="half")

            t.pipelined([c for _ in range(depth) for c in range(columns)], load, use, 4)
        x = t.alu(32, *s[-3:])
        x = t.alu(1, t.shuffle(x))
        x = t.alu(3, t.shuffle(x))
        if self.keep_o:
            x = t.alu(self.head_dim // 4, x)
        for _ in range(8):
            x = t.alu(4, t.exp2(4, t.alu(4, x)))
        x = t.alu(1, t.shuffle(x))
        x = t.alu(3, t.shuffle(x))
        for _ in parts:
            copy()
            first = x
            if not self.keep_o:
                read = [t.read_device(256) for _ in range(depth)]
                first = t.alu(self.head_block // 4, read[-1])
            o: dict[int, Handle] = {}

            def add(d, v, o=o, first=first):
                o[d] = t.mma("float", o.get(d, first), v)

            t.pipelined(
                [d for _ in range(columns) for d in range(depth)],
                lambda _d: t.read_shared(128),
                add,
                4,
            )
            if not self.keep_o:
                for d in range(depth):
                    t.write_device(256, o[d])
        return t
