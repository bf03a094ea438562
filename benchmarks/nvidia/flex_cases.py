"""The problems of prove_flex.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import planner as plain

from . import flex_mods
from .attention import Guarded
from .cases import DTYPES, place
from .flex import SCRATCH, Call, Functions
from .flex_mods import Tables
from .flex_plans import FlexPlanner, Mods
from .plans import Kernel, Planner, Scoring


@dataclass(frozen=True)
class FlexCase:
    """One attention problem, by the names of its mods."""

    q_len: int
    kv_len: int
    head_dim: int
    dtype: torch.dtype
    score: str = ""
    mask: str = ""
    batch: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    value_dim: int | None = None
    layout: str = "rows"
    has_dlse: bool = False
    scratch_bytes: int = SCRATCH
    blocks: tuple[int, int] | None = None  # queries and keys of a block, with lists of blocks
    shared: tuple[bool, bool] = (False, False)  # whether these are the same for batches, heads
    density: float | None = None  # of blocks that are seen, all of each; else partial ones as well

    device = "cuda"

    def __str__(self) -> str:
        parts = [
            self.score or "no score_mod",
            self.mask or "no mask_mod",
            str(self.dtype).removeprefix("torch."),
            f"B{self.batch} H{self.num_heads}/{self.num_kv_heads}",
            f"L{self.q_len} S{self.kv_len} D{self.head_dim} {self.layout}",
        ]
        parts += [f"values {self.value_dim}"] * (self.value_dim is not None)
        parts += ["dlse"] * self.has_dlse
        if self.blocks is not None:
            of = [name for name, one in zip(("batches", "heads"), self.shared) if one]
            parts.append(f"blocks of {self.blocks[0]} by {self.blocks[1]}")
            parts += [f"shared by {' and '.join(of)}"] * bool(of)
            parts += [f"density {self.density}"] * (self.density is not None)
        if self.scratch_bytes != SCRATCH:
            parts.append(f"scratch {self.scratch_bytes >> 20} MiB")
        return ", ".join(parts)

    def but(self, **changes: object) -> FlexCase:
        return replace(self, **changes)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.batch, self.num_heads, self.q_len, self.kv_len

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.head_dim)

    def tables(self) -> Tables:
        return Tables(*self.sizes, "cpu" if self.device == "meta" else self.device)

    def functions(self, tables: Tables) -> Functions:
        """The mods, whose captures are in `tables` afterwards."""
        score = flex_mods.SCORES[self.score](tables) if self.score else None
        mask = flex_mods.MASKS[self.mask](tables) if self.mask else None
        blocks = self.blocks or (1, 1)
        return Functions(score, mask, self.states(), *blocks, self.sizes)

    def states(self) -> Tensor | None:
        """Of each block 0, 1 or 2: hidden, asked, seen. One row of three or more sees nothing."""
        if self.blocks is None:
            return None
        rows, cols = (-(-n // block) for n, block in zip(self.sizes[2:], self.blocks))
        batch, heads = (1 if one else n for one, n in zip(self.shared, self.sizes))
        generator = torch.Generator().manual_seed(9)
        drawn = torch.rand(batch, heads, rows, cols, generator=generator)
        if self.density is not None:
            states = (drawn < self.density).to(torch.uint8) * 2
        else:
            states = (drawn > 0.4).to(torch.uint8) + (drawn > 0.8).to(torch.uint8)
            if rows > 2:
                states[:, :, rows // 2] = 0
        return states.to("cpu" if self.device == "meta" else self.device)

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v, dout and dlse or None, dense."""
        generator = torch.Generator(self.device).manual_seed(1)
        width = self.value_dim or self.head_dim

        def draw(heads: int, length: int, width: int) -> Tensor:
            shape = (self.batch, heads, length, width)
            return torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)

        q = draw(self.num_heads, self.q_len, self.head_dim)
        dout = draw(self.num_heads, self.q_len, width)
        k = draw(self.num_kv_heads, self.kv_len, self.head_dim)
        v = draw(self.num_kv_heads, self.kv_len, width)
        dlse = None
        if self.has_dlse:
            dlse = torch.randn(q.shape[:3], generator=generator, device=self.device)
        return q, k, v, dout, dlse

    def call(self, mods: Mods, q: Tensor, k: Tensor, v: Tensor) -> Call:
        return Call(q, k, v, mods, self.scale, self.scratch_bytes)

    def scoring(self, functions: Functions) -> Scoring:
        return Scoring(self.scale, functions=functions)

    def placed(self, dense: tuple[Tensor, ...]) -> list[Tensor]:
        return [place(x, self.layout) for x in dense]


#: In turn for the mods: each of them meets a dtype and a width.
_DIMS = (64, 128, 80, 192, 37, 256, 96)
_LAYOUTS = ("rows", "heads inside", "rows", "every second column")


def scores() -> Iterator[FlexCase]:
    """Each score_mod; the first ones with each mask_mod beside, some with lists of blocks."""
    masks = list(flex_mods.MASKS)
    blocks = (None, None, (128, 128), None, (48, 80), (37, 53), None, (64, 32))
    for n, score in enumerate(flex_mods.SCORES):
        mask = masks[n] if n < len(masks) else ""
        yield FlexCase(
            517 + 64 * (n % 4), 741 + 50 * (n % 3), _DIMS[n % 7], DTYPES[n % 3], score, mask,
            num_kv_heads=(2, 4, 1)[n % 3], layout=_LAYOUTS[n % 4], has_dlse=n % 2 == 0,
            scratch_bytes=SCRATCH if n % 4 else 0, blocks=blocks[n % 8],
            shared=(n % 3 == 0, n % 2 == 0),
        ).but(**_OWN_LENGTHS.get(mask, {}))  # fmt: skip


def masks() -> Iterator[FlexCase]:
    """Some mask_mods without a score_mod, whose exponentials are powers of two."""
    for n, mask in enumerate(("causal", "documents", "by_heads", "hidden_keys", "dilated")):
        yield FlexCase(
            741, 517 + 100 * n, _DIMS[(n + 3) % 7], DTYPES[(n + 1) % 3], mask=mask,
            num_kv_heads=(4, 2, 1)[n % 3], has_dlse=n % 2 == 1,
            scratch_bytes=SCRATCH if n % 2 else 0,
        )  # fmt: skip


_OWN_LENGTHS = {
    "neighbourhood": {"q_len": 1024, "kv_len": 1024},
    "block_diffusion": {"q_len": 1000, "kv_len": 1000},
}


def blocks() -> Iterator[FlexCase]:
    """Lists of blocks of many sizes, alone and beside mods; some rows of blocks see nothing."""
    base = FlexCase(1029, 773, 64, DTYPES[0])
    yield base.but(blocks=(128, 128))
    yield base.but(blocks=(128, 128), shared=(True, True), dtype=DTYPES[1], head_dim=128)
    yield base.but(blocks=(33, 47), mask="causal", dtype=DTYPES[2], shared=(False, True))
    yield base.but(blocks=(1, 773), mask="pairs", dtype=DTYPES[1])
    yield base.but(blocks=(1029, 16), mask="documents", score="alibi", head_dim=192)
    yield base.but(blocks=(256, 64), mask="by_heads", score="softcap", dtype=DTYPES[2])
    yield base.but(blocks=(5, 7), score="gated", head_dim=256, dtype=DTYPES[1], has_dlse=True)


def long() -> Iterator[FlexCase]:
    """Lengths that models have."""
    half, bfloat, single = DTYPES
    base = FlexCase(8192, 8192, 64, half, batch=1)
    yield base.but(score="alibi", mask="causal")
    yield base.but(score="softcap", dtype=bfloat, head_dim=128)
    yield base.but(score="relative_bias", dtype=single, num_heads=2, num_kv_heads=1)
    yield base.but(mask="causal_documents", head_dim=128)
    yield base.but(
        mask="window", head_dim=256, dtype=bfloat, blocks=(128, 128), shared=(True, True)
    )
    yield base.but(mask="pairs", num_heads=2, num_kv_heads=2)
    yield base.but(mask="neighbourhood", dtype=bfloat, q_len=6144, kv_len=6144)
    yield base.but(score="tree_0", mask="condition_0", head_dim=192, q_len=4099, kv_len=8191)
    yield base.but(score="eight_tables", q_len=8191, kv_len=9001, head_dim=128)
    yield base.but(score="hashed_noise", mask="prefix_lm", q_len=16352, kv_len=16352, num_heads=2)
    yield base.but(blocks=(128, 128), density=0.1, shared=(True, False), head_dim=128)


def small() -> Iterator[FlexCase]:
    """For compute-sanitizer, which is slow; every tensor is an allocation of its own."""
    base = FlexCase(70, 51, 64, DTYPES[0], layout="tight", batch=1, num_heads=2, num_kv_heads=1)
    yield base.but(score="eight_tables", mask="causal")
    yield base.but(score="softcap", blocks=(20, 12), mask="pairs", dtype=DTYPES[2], head_dim=128)
    yield base.but(score="full_bias", blocks=(32, 32), dtype=DTYPES[1], head_dim=253)
    yield base.but(mask="documents", score="gated", scratch_bytes=0, has_dlse=True)


@dataclass(frozen=True)
class TrainedCase:
    """A table (1 or B, heads, places) that is added to the scores, and that is trained.

    flex/additive.py makes an additive mask of it, whose gradient the kernels of flash_attn have;
    the sum over the places that read an element is PyTorch's indexing.
    """

    case: FlexCase
    by_batch: bool = False

    def __str__(self) -> str:
        return f"table[{'b, ' * self.by_batch}h, q - kv], {self.case}"

    def scoring(self, device: str) -> Scoring:
        batch, heads, q_len, kv_len = self.case.sizes
        generator = torch.Generator().manual_seed(6)
        table = torch.randn(batch if self.by_batch else 1, heads, 257, generator=generator)
        rows, keys = torch.arange(q_len), torch.arange(kv_len)
        mask = table[:, :, (rows[:, None] - keys).clamp(-128, 128) + 128].contiguous()
        return Scoring(self.case.scale, mask=mask.to(device), mask_grad=True)

    def kernels(self, planner: Planner) -> dict[str, Kernel]:
        """What it runs, by name."""
        q, k, v, out, dout = on_meta(self.case).shaped()
        scoring = self.scoring("cpu")
        kernels = planner.forward(q, k, v, out, scoring).kernels
        kernels += planner.backward(q, k, v, out, dout, scoring).kernels
        return {kernel.name: kernel for kernel in kernels}


def trained() -> Iterator[TrainedCase]:
    base = FlexCase(517, 741, 64, DTYPES[0])
    yield TrainedCase(base)
    yield TrainedCase(base.but(q_len=1029, head_dim=128, dtype=DTYPES[1]), by_batch=True)
    yield TrainedCase(base.but(kv_len=517, head_dim=80, dtype=DTYPES[2]))


GROUPS = {"score_mods": scores, "mask_mods": masks, "lists of blocks": blocks, "long": long}


class _OnMeta(FlexCase):
    """A case whose operands are never made; its tables are, on the CPU."""

    device = "meta"

    def shaped(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, out and dout, where FlexAttention has them."""

        def empty(heads: int, length: int, width: int) -> Tensor:
            sizes = (self.batch, heads, length, width)
            return _place(torch.empty(sizes, dtype=self.dtype, device="meta"), self.layout)

        width = self.value_dim or self.head_dim
        q = empty(self.num_heads, self.q_len, self.head_dim)
        k = empty(self.num_kv_heads, self.kv_len, self.head_dim)
        v = empty(self.num_kv_heads, self.kv_len, width)
        dout = empty(self.num_heads, self.q_len, width)
        return q, k, v, _MetaGuarded().in_order_of(q, width), dout


def on_meta(case: FlexCase) -> _OnMeta:
    return _OnMeta(**vars(case))


class _MetaGuarded(Guarded):
    device = "meta"


def _place(x: Tensor, layout: str) -> Tensor:
    """With the strides and the offset that cases.place gives."""
    if layout == "tight":
        return x
    b, h, l, d = x.shape
    if layout == "every second column":
        return x.new_empty(b, h, l, 2 * d)[..., 1::2]
    whole = x.new_empty(x.numel() + 1024)[1024:]
    if layout == "heads inside":
        return whole.view(b, l, h, d).transpose(1, 2)
    return whole.view(b, h, l, d)


def kernels_of(planner: FlexPlanner, case: FlexCase, mods: Mods) -> dict[str, plain.Kernel]:
    """What a case runs, by name."""
    *operands, out, dout = on_meta(case).shaped()
    numbers = (mods, case.scale, case.scratch_bytes)
    plans = [planner.plan(*numbers, *operands, out, *more) for more in ((), (dout,))]
    return {kernel.name: kernel for plan in plans for kernel in plan.kernels}
