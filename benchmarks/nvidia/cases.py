"""The problems that prove.py puts to the kernels, and where their operands lie."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import listed
from .plans import Kernel, Planner, Scoring

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SEED = 0x0123_4567_89AB_CDEF
_MARGIN = 1024
_SCRATCH = 256 << 20


@dataclass(frozen=True)
class Case:
    """One attention problem. Layouts: see `place`."""

    q_len: int
    kv_len: int
    head_dim: int
    dtype: torch.dtype
    batch: int = 1
    num_heads: int = 2
    num_kv_heads: int = 1
    layout: str = "rows"
    dropout_p: float = 0.0
    window_left: int = -1
    window_right: int = -1
    diagonal: int = 0
    scale: float | None = None
    has_dlse: bool = False
    scratch_bytes: int = _SCRATCH  # for dS
    stores_ds: bool = False  # in turns, too, whatever they take
    value_dim: int | None = None  # head_dim unless given
    softcap: float = 0.0
    mask: str = ""  # its kind: "bool", "same" (the operands' dtype), "float32"
    mask_full: tuple[bool, bool, bool, bool] = (True, True, True, True)  # of (B, H, L, S)
    hides: str = "scattered"  # "padding", "documents", "blocks": what the mask hides
    mask_grad: bool = False
    alibi: bool = False
    sinks: bool = False
    ranges: str = ""  # a kind of listed.KINDS
    ranges_full: tuple[bool, bool] = (True, True)  # of (B, H), where numbers are "any"

    def __str__(self) -> str:
        parts = [
            str(self.dtype).removeprefix("torch."),
            f"B{self.batch} H{self.num_heads}/{self.num_kv_heads}",
            f"L{self.q_len} S{self.kv_len} D{self.head_dim} {self.layout}",
        ]
        if (self.window_left, self.window_right, self.diagonal) == (-1, 0, 0):
            parts.append("causal")
        elif (self.window_left, self.window_right, self.diagonal) != (-1, -1, 0):
            parts.append(f"window {self.window_left}, {self.window_right} at {self.diagonal}")
        parts += [f"dropout {self.dropout_p}"] * (self.dropout_p > 0)
        parts += [f"scale {self.scale}"] * (self.scale is not None)
        parts += ["dlse"] * self.has_dlse
        parts += [f"values {self.value_dim}"] * (self.value_dim is not None)
        parts += [f"softcap {self.softcap}"] * (self.softcap > 0)
        if self.mask:
            full = "".join(name for name, keep in zip("BHLS", self.mask_full) if keep)
            parts.append(f"{self.mask} mask {full} {self.hides}" + " dmask" * self.mask_grad)
        parts += ["alibi"] * self.alibi + ["sinks"] * self.sinks
        if self.ranges:
            full = "".join(name for name, keep in zip("BH", self.ranges_full) if keep)
            parts.append(f"ranges: {self.ranges}" + f" {full}" * (self.ranges == "any"))
        if self.scratch_bytes != _SCRATCH:
            parts.append(f"scratch {self.scratch_bytes >> 20} MiB")
        return " ".join(parts)

    def but(self, **changes: object) -> Case:
        return replace(self, **changes)

    @property
    def scoring(self) -> Scoring:
        return Scoring(
            self.head_dim**-0.5 if self.scale is None else self.scale,
            self.dropout_p,
            SEED,
            self.window_left,
            self.window_right,
            self.diagonal,
            self.scratch_bytes,
            stores_ds=self.stores_ds,
            softcap=self.softcap,
            mask_grad=self.mask_grad,
            **self._score_tensors(),
        )

    device = "cuda"

    def _score_tensors(self) -> dict[str, Tensor | None]:
        if not (self.mask or self.alibi or self.sinks or self.ranges):
            return {}
        generator = None
        if self.device != "meta":
            generator = torch.Generator(self.device).manual_seed(2)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device)

        slopes = draw(self.batch, self.num_heads).abs() / 64 if self.alibi else None
        sinks = draw(self.num_heads) if self.sinks else None
        return {
            "mask": self._mask(draw),
            "alibi_slopes": slopes,
            "sinks": sinks,
            "key_ranges": self._key_ranges(),
        }

    def _key_ranges(self) -> Tensor | None:
        if not self.ranges:
            return None
        sizes = (self.q_len, self.kv_len, self.batch, self.num_heads)
        return listed.draw(self.ranges, *sizes, self.ranges_full).to(self.device)

    def _mask(self, draw: Callable[..., Tensor]) -> Tensor | None:
        if not self.mask:
            return None
        full = (self.batch, self.num_heads, self.q_len, self.kv_len)
        shape = [n if keep else 1 for n, keep in zip(full, self.mask_full)]
        rows = torch.arange(shape[2], device=self.device)[:, None]
        keys = torch.arange(shape[3], device=self.device)
        values = draw(*shape)
        hidden = {
            "scattered": values > 1.0,
            "padding": (keys >= shape[3] * 2 // 3).expand(shape),
            "documents": (rows // 300 != keys // 300).expand(shape),
            "blocks": ((rows // 32 * 7 + keys // 32 * 5) % 3 > 0).expand(shape),
        }[self.hides]
        if self.mask == "bool":
            return ~hidden.contiguous()
        values = values.to(self.dtype if self.mask == "same" else torch.float32)
        return values.masked_fill(hidden, -torch.inf)

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


def place(x: Tensor, layout: str) -> Tensor:
    """x somewhere inside of memory full of NaN; "tight" is an allocation of its own.

    "rows": dense (B, H, L, D). "heads inside": dense (B, L, H, D). "every second column".
    """
    b, h, l, d = x.shape
    if layout == "tight":
        return x.clone()
    if layout == "every second column":
        buffer = torch.full((b, h, l, 2 * d), torch.nan, dtype=x.dtype, device=x.device)
        view = buffer[..., 1::2]
    else:
        sizes = (b, l, h, d) if layout == "heads inside" else (b, h, l, d)
        buffer = torch.full((x.numel() + 2 * _MARGIN,), torch.nan, dtype=x.dtype, device=x.device)
        view = buffer[_MARGIN:-_MARGIN].view(sizes)
        view = view.transpose(1, 2) if layout == "heads inside" else view
    return view.copy_(x)


def hide_unseen(case: Case, x: tuple[Tensor | None, ...]) -> None:
    """Puts NaN into queries (q, dout, dlse) that see no key, and keys (k, v) that none sees.

    By windows and key ranges, not by masks. Beside sinks every lse has a gradient: that of a row
    without a key is its sink's.
    """
    if case.ranges:
        _hide_unlisted(case, x)
        return
    left, right = (w if w >= 0 else 1 << 30 for w in (case.window_left, case.window_right))
    rows = range(-case.diagonal - right, case.kv_len - case.diagonal + left)
    keys = range(case.diagonal - left, case.q_len + case.diagonal + right)
    q, k, v, dout, dlse = x
    dlse = None if case.sinks else dlse
    for tensors, seen in (((q, dout, dlse), rows), ((k, v), keys)):
        for tensor in tensors:
            if tensor is not None:
                tensor[:, :, : max(seen.start, 0)] = torch.nan
                tensor[:, :, max(seen.stop, 0) :] = torch.nan


def _hide_unlisted(case: Case, x: tuple[Tensor | None, ...]) -> None:
    sizes = (case.batch, case.num_heads, case.num_kv_heads, case.kv_len)
    rows, keys = listed.unseen(case.scoring, *sizes)
    q, k, v, dout, dlse = x
    dlse = None if case.sinks else dlse
    for tensors, hidden in (((q, dout, dlse), rows), ((k, v), keys)):
        for tensor in tensors:
            if tensor is not None:
                tensor[hidden.to(tensor.device)] = torch.nan


def head_dims(names: list[str]) -> list[int]:
    """The head dims that the variants are made for."""
    return sorted({int(width) for name in names for width in re.findall(r"_d(\d+)_", name)})


def every_variant(dims: list[int]) -> Iterator[Case]:
    """Each variant twice: with its full head dim and with a padded one.

    Wide heads run with dS stored and without it. The budget has room for all of dS.
    """
    for dtype, dim, p in itertools.product(DTYPES, dims, (0.0, 0.25)):
        chunk = 16 // dtype.itemsize
        for scratch_bytes in (_SCRATCH, 0) if dim >= 64 else (_SCRATCH,):
            base = Case(
                1029,
                773,
                dim,
                dtype,
                batch=2,
                num_heads=4,
                num_kv_heads=2,
                dropout_p=p,
                scratch_bytes=scratch_bytes,
            )
            yield base
            yield base.but(
                head_dim=dim - chunk,
                layout="heads inside",
                q_len=773,
                kv_len=1029,
                window_right=0,
                diagonal=256,
            )
            yield base.but(head_dim=dim - 3, q_len=773, kv_len=1029)
            yield base.but(layout="every second column", window_left=100, window_right=37)


def options() -> Iterator[Case]:
    """Windows, grouped heads, odd lengths, scales, a gradient of lse, heavy dropout, little or no
    scratch.
    """
    for dtype in DTYPES:
        base = Case(1000, 1111, 64, dtype, batch=2, num_heads=6, num_kv_heads=2)
        yield base.but(num_kv_heads=6)
        yield base.but(num_kv_heads=1, window_right=0, diagonal=111)
        yield base.but(window_right=0)
        yield base.but(window_right=0, diagonal=-300)  # rows without a key
        yield base.but(window_left=255, window_right=0, diagonal=111)
        yield base.but(window_left=0, window_right=0)
        yield base.but(window_left=64, window_right=200, dropout_p=0.1)
        yield base.but(has_dlse=True, window_right=0)
        yield base.but(has_dlse=True, dropout_p=0.5, layout="heads inside")
        yield base.but(dropout_p=0.9, head_dim=128)
        yield base.but(scale=0.01, head_dim=96)
        yield base.but(scale=1.0, head_dim=80, window_right=0)
        yield base.but(scale=0.5, kv_len=9000)  # largest scores rise for long, little by little
        yield base.but(q_len=1, num_heads=32, num_kv_heads=8, head_dim=128, kv_len=5000)
        yield base.but(kv_len=1)
        # A group's query heads are divided: 3 parts, without dS and with it, 8 of 3 heads, 8 of 2.
        yield base.but(kv_len=300, scratch_bytes=14 << 20, dropout_p=0.1)
        yield base.but(kv_len=300, scratch_bytes=64 << 20, dropout_p=0.1)
        yield base.but(kv_len=37, batch=1, num_heads=24, num_kv_heads=1, head_dim=128)
        yield base.but(kv_len=70, num_heads=16, num_kv_heads=1, head_dim=248, has_dlse=True)
        yield base.but(q_len=3, kv_len=2, head_dim=1)
        yield base.but(q_len=4099, kv_len=4097, head_dim=256, batch=1, num_heads=2, num_kv_heads=1)
        yield base.but(scratch_bytes=0, window_right=0, has_dlse=True)
        storing = base.but(stores_ds=True)
        yield storing.but(scratch_bytes=14 << 20, window_right=0)  # one of four key heads at a time
        yield storing.but(scratch_bytes=32 << 20, head_dim=128, dropout_p=0.1)  # two, two
        # Heads of a group in turns: one at a time; half of the keys of one; two, under a window.
        alone = storing.but(num_kv_heads=1)
        yield alone.but(scratch_bytes=6 << 20, window_right=0, diagonal=111)
        yield alone.but(scratch_bytes=4 << 20, head_dim=128, dropout_p=0.1)
        yield alone.but(scratch_bytes=4 << 20, window_left=255, window_right=0, diagonal=111)
        # Keys of a window share places.
        yield storing.but(scratch_bytes=8 << 20, num_kv_heads=6, window_left=100, window_right=27)
        yield storing.but(scratch_bytes=8 << 20, head_dim=80, window_left=9, window_right=50,
                          diagonal=300)  # fmt: skip


def long() -> Iterator[Case]:
    half, bfloat, single = DTYPES
    base = Case(32768, 32768, 64, half, num_heads=4, num_kv_heads=2, window_right=0)
    yield base
    yield base.but(dtype=bfloat, head_dim=128, num_kv_heads=1)
    yield base.but(dtype=single, num_heads=2, num_kv_heads=1)
    yield base.but(window_right=-1, num_heads=1, num_kv_heads=1)
    yield base.but(dtype=bfloat, dropout_p=0.1, num_heads=2, num_kv_heads=2)
    yield base.but(head_dim=128, window_left=1023)
    yield base.but(head_dim=256, q_len=8192, diagonal=24576, num_heads=2)
    yield base.but(dtype=single, head_dim=61, q_len=16384, kv_len=20000, num_heads=2)
    yield base.but(dtype=bfloat, head_dim=93, layout="every second column", num_heads=2)
    yield base.but(q_len=1, diagonal=32767, num_heads=32, num_kv_heads=8, head_dim=128)
    # dS of one head is larger than the budget: keys are divided.
    divided = base.but(q_len=16384, kv_len=16384, num_heads=2, stores_ds=True)
    yield divided.but(num_kv_heads=2)
    yield divided.but(num_kv_heads=2, dtype=bfloat, head_dim=128, window_right=-1, kv_len=20001)
    yield divided.but(num_kv_heads=2, dtype=single, head_dim=77, window_left=5000, q_len=10007)
    yield divided.but(dtype=bfloat, dropout_p=0.1, scratch_bytes=1 << 30)
    yield divided.but(num_kv_heads=2, head_dim=240, q_len=9001, diagonal=7383)
    # dS of more than 2^31 elements
    yield base.but(q_len=49152, kv_len=49152, num_heads=1, num_kv_heads=1, scratch_bytes=10 << 30)


def small() -> Iterator[Case]:
    """A few cases of each kind for compute-sanitizer, in which every tensor is an allocation of its
    own."""
    for dtype, dim in itertools.product(DTYPES, (16, 64, 128, 256)):
        base = Case(70, 51, dim, dtype, layout="tight")
        yield base
        yield base.but(dropout_p=0.2, window_right=0)
        yield base.but(head_dim=dim - 3, dropout_p=0.2)
        yield base.but(head_dim=dim - 3, window_left=9, window_right=5)
        yield base.but(scratch_bytes=0, window_right=0)


def scores() -> Iterator[Case]:
    """Softcap, ALiBi, masks with their gradients, sinks and value widths, alone and together."""
    for dtype, dim in itertools.product(DTYPES, (40, 64, 128, 256)):
        base = Case(1029, 774, dim, dtype, batch=2, num_heads=4, num_kv_heads=2)
        for scratch_bytes in (_SCRATCH, 0) if dim >= 64 else (_SCRATCH,):
            case = base.but(scratch_bytes=scratch_bytes)
            yield case.but(softcap=2.0, window_right=0)
            yield case.but(alibi=True, diagonal=-300, window_right=0)
            yield case.but(sinks=True, window_left=100, window_right=0, has_dlse=True)
            yield case.but(value_dim=dim // 2, dropout_p=0.1)
            yield case.but(head_dim=dim - 16, value_dim=dim, layout="heads inside")
            for hides in ("scattered", "padding", "documents", "blocks"):
                yield case.but(mask="bool", hides=hides, mask_full=(True, False, True, True))
            yield case.but(mask="bool", hides="padding", mask_full=(True, False, False, True))
            yield case.but(mask="same", mask_grad=True, hides="documents")
            yield case.but(mask="float32", mask_grad=True, mask_full=(False, True, True, True))
            yield case.but(mask="same", mask_grad=True, mask_full=(True, True, False, True))
            yield case.but(
                mask="float32", mask_grad=True, softcap=2.0, alibi=True, sinks=True, dropout_p=0.2,
                value_dim=dim // 2 + 3, kv_len=773, window_right=200, has_dlse=True,
            )  # fmt: skip
    # CUDA's grid has at most 65535 blocks in y, which 8192 by 8192 elements of a mask would exceed.
    long = Case(8192, 8128, 64, torch.float16, num_heads=4, num_kv_heads=2)
    yield long.but(mask="bool", hides="documents", mask_full=(True, False, True, True))
    yield long.but(mask="same", mask_grad=True, mask_full=(False, True, True, True))
    yield long.but(head_dim=192, value_dim=128, dtype=torch.bfloat16, window_right=0)
    yield long.but(softcap=50.0, head_dim=256, dtype=torch.bfloat16, window_left=4095)
    yield long.but(alibi=True, sinks=True, window_right=0, dtype=torch.float32)


def ranges() -> Iterator[Case]:
    """Key ranges, alone and with every other feature; unseen queries and keys are NaN.

    "any" numbers are drawn for each row, the others are what padding, packing and prefixes give.
    """
    for dtype in DTYPES:
        base = Case(1029, 774, 64, dtype, batch=2, num_heads=4, num_kv_heads=2)
        narrow, wide = base.but(head_dim=40), base.but(head_dim=128)
        low = {"scratch_bytes": 0}
        yield base.but(ranges="documents")
        yield wide.but(ranges="documents", window_right=0, layout="heads inside")
        yield wide.but(ranges="documents", window_left=100, window_right=20, has_dlse=True, **low)
        yield narrow.but(ranges="short documents", window_right=0)
        yield base.but(ranges="padding", **low)
        yield base.but(ranges="prefix", layout="every second column")
        yield base.but(ranges="nothing in one batch entry", has_dlse=True, num_kv_heads=4)
        yield wide.but(ranges="any", head_dim=256)
        yield wide.but(ranges="any", head_dim=253, num_kv_heads=1, window_left=200, **low)
        yield base.but(ranges="any", ranges_full=(False, True), alibi=True, window_right=3)
        yield wide.but(ranges="any", ranges_full=(True, False), softcap=2.0, dropout_p=0.2)
        yield narrow.but(ranges="documents", softcap=2.0, dropout_p=0.1, head_dim=37)
        masked = base.but(mask="bool", hides="blocks", mask_full=(True, False, True, True))
        yield masked.but(ranges="padding", window_right=0)
        yield wide.but(
            ranges="any", mask="same", mask_grad=True, hides="documents", sinks=True, has_dlse=True
        )
        yield base.but(
            ranges="prefix", mask="float32", mask_grad=True, mask_full=(True, True, False, True)
        )
        yield wide.but(
            ranges="any", mask="float32", mask_grad=True, softcap=2.0, alibi=True, sinks=True,
            dropout_p=0.2, value_dim=67, kv_len=773, window_right=200, has_dlse=True, **low,
        )  # fmt: skip
    long = Case(8192, 8192, 64, torch.float16, num_heads=4, num_kv_heads=2, window_right=0)
    yield long.but(ranges="documents")
    yield long.but(ranges="short documents", head_dim=128, dtype=torch.bfloat16)
    # dS of one head is larger than the budget: seven products.
    yield long.but(ranges="documents", q_len=16384, kv_len=16384, num_heads=2)
    yield long.but(ranges="any", q_len=9001, kv_len=10007, dtype=torch.float32, window_right=-1)


def parts() -> Iterator[Case]:
    """Forwards of few threadgroups, which share the keys of their rows."""
    for dtype, dim in itertools.product(DTYPES, (40, 64, 128, 256)):
        base = Case(70, 3001, dim, dtype, num_heads=4, num_kv_heads=2)
        yield base
        yield base.but(q_len=3, dropout_p=0.2, head_dim=dim - 3, layout="heads inside")
        yield base.but(num_heads=1, num_kv_heads=1, q_len=560, kv_len=560, window_right=0,
                       diagonal=-20)  # fmt: skip
        yield base.but(sinks=True, value_dim=dim // 2 + 3, window_left=900, diagonal=2000)
        yield base.but(softcap=2.0, alibi=True, mask="same", hides="blocks", kv_len=40_000)
        yield base.but(mask="bool", hides="padding", mask_full=(True, False, False, True))
        yield base.but(ranges="documents", sinks=True, dropout_p=0.1)
        yield base.but(ranges="any", batch=2, num_heads=2)
    widths = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
    for dtype, dim, dropout_p in itertools.product(DTYPES, widths, (0.0, 0.2)):
        base = Case(9, 1001, dim, dtype, num_heads=4, num_kv_heads=2, dropout_p=dropout_p)
        yield base
        yield base.but(head_dim=dim - 3)  # rows that are not of whole chunks


GROUPS = {"options": options, "scores": scores, "ranges": ranges, "parts": parts}
"""The groups of problems with kernels that are not among `plans.every_variant`."""


def kernels_of(planner: Planner, problems: Iterable[Case]) -> dict[str, Kernel]:
    """What the problems run, by name."""
    found: dict[str, Kernel] = {}
    for case in problems:
        planned = _OnMeta(**vars(case))
        q, k, v, out = planned.shaped()
        scoring = planned.scoring
        kernels = planner.forward(q, k, v, out, scoring).kernels
        kernels += planner.backward(q, k, v, out, out, scoring).kernels
        found |= {kernel.name: kernel for kernel in kernels}
    return found


class _OnMeta(Case):
    """A case whose operands are never made."""

    device = "meta"

    def shaped(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and out."""
        width, margin = self.value_dim or self.head_dim, 0 if self.layout == "tight" else _MARGIN

        def empty(heads: int, length: int, width: int) -> Tensor:
            sizes = (self.batch, heads, length, width)
            if self.layout == "every second column":
                pairs = torch.empty(*sizes[:3], 2 * width, dtype=self.dtype, device="meta")
                return pairs[..., 1::2]
            inside = self.layout == "heads inside"
            if inside:
                sizes = (self.batch, length, heads, width)
            whole = torch.empty(self.batch * heads * length * width + margin, device="meta")
            x = whole.to(self.dtype)[margin:].view(sizes)
            return x.transpose(1, 2) if inside else x

        return (
            empty(self.num_heads, self.q_len, self.head_dim),
            empty(self.num_kv_heads, self.kv_len, self.head_dim),
            empty(self.num_kv_heads, self.kv_len, width),
            empty(self.num_heads, self.q_len, width),
        )
