"""One attention problem: its sizes and features, its operands, its mathematics."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..key_ranges import KeyRanges
from ..scoring import Scoring
from .mathematics import MathResult, math_attention

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SEED = 0x0123_4567_89AB_CDEF
"""Of dropout."""


@dataclass(frozen=True)
class Case:
    """One attention problem. Windows and diagonal as in ``orchard::flash_attn_fwd``."""

    q_len: int
    kv_len: int
    head_dim: int = 64
    batch: int = 1
    num_heads: int = 2
    num_kv_heads: int = 1
    dtype: torch.dtype = torch.float32
    dropout_p: float = 0.0
    window_left: int = -1
    window_right: int = -1
    diagonal: int = 0
    scale: float | None = None
    value_dim: int | None = None
    """head_dim unless given."""
    softcap: float = 0.0
    mask: str = ""
    """Its kind: "bool" (some keys take part), "same" (the operands' dtype), "float32"; "" is none.
    """
    mask_full: tuple[bool, bool, bool, bool] = (True, True, True, True)
    """Which of (B, H, L, S) the mask does not broadcast over."""
    alibi: str = ""
    """Slopes by "head" or by "batch" and head; "" is none."""
    sinks: bool = False
    ranges: str = ""
    """Key ranges: "any" numbers in each row, some beyond the keys; packed "documents" of any
    lengths; "padding" on both sides, by batch; "prefix" keys besides a window; "" is none."""
    ranges_full: tuple[bool, bool] = (True, True)
    """Which of (B, H) the key ranges of "any" do not broadcast over."""
    seed: int = 1
    """Of the numbers that are drawn."""

    def __str__(self) -> str:
        width = f"D{self.head_dim}" + (f"/{self.value_dim}" if self.value_dim else "")
        parts = [
            str(self.dtype).removeprefix("torch."),
            f"B{self.batch}H{self.num_heads}/{self.num_kv_heads}",
            f"L{self.q_len}S{self.kv_len}{width}",
        ]
        if (self.window_left, self.window_right, self.diagonal) != (-1, -1, 0):
            parts.append(f"window{self.window_left},{self.window_right}at{self.diagonal}")
        if self.dropout_p:
            parts.append(f"drop{self.dropout_p}")
        if self.scale is not None:
            parts.append(f"scale{self.scale}")
        if self.softcap:
            parts.append(f"softcap{self.softcap}")
        if self.mask:
            full = "".join(name for name, keep in zip("BHLS", self.mask_full) if keep)
            parts.append(f"{self.mask}mask{full}")
        if self.alibi:
            parts.append(f"alibi_{self.alibi}")
        if self.sinks:
            parts.append("sinks")
        if self.ranges:
            full = "".join(name for name, keep in zip("BH", self.ranges_full) if keep)
            parts.append(f"{self.ranges}ranges{full if self.ranges == 'any' else ''}")
        return "-".join(parts)

    def but(self, **changes: object) -> Case:
        return replace(self, **changes)  # type: ignore[arg-type]

    def _numbers(self) -> Scoring:
        """The scoring arguments that are not drawn."""
        return Scoring(
            dropout_seed=torch.tensor(SEED),
            dropout_p=self.dropout_p,
            scale=self.head_dim**-0.5 if self.scale is None else self.scale,
            window_left=self.window_left,
            window_right=self.window_right,
            diagonal=self.diagonal,
            softcap=self.softcap,
        )

    def _draw(self) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Scoring]:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        b, heads, width = self.batch, self.num_heads, self.value_dim or self.head_dim
        q = draw(b, heads, self.q_len, self.head_dim).to(self.dtype)
        do = draw(b, heads, self.q_len, width).to(self.dtype)
        k = draw(b, self.num_kv_heads, self.kv_len, self.head_dim).to(self.dtype)
        v = draw(b, self.num_kv_heads, self.kv_len, width).to(self.dtype)
        mask = None
        if self.mask:
            full = (b, heads, self.q_len, self.kv_len)
            mask = draw(*(n if keep else 1 for n, keep in zip(full, self.mask_full)))
            if self.mask == "bool":
                mask = mask > -0.5
            elif self.mask == "same":
                mask = mask.to(self.dtype)
        slopes = None
        if self.alibi:
            slopes = draw(*((b, heads) if self.alibi == "batch" else (heads,))).abs()
        scoring = self._numbers()._replace(
            attn_mask=mask,
            alibi_slopes=slopes,
            sinks=draw(heads) if self.sinks else None,
            key_ranges=self._draw_ranges(generator) if self.ranges else None,
        )
        return (q, k, v, do), scoring

    def _draw_ranges(self, generator: torch.Generator) -> Tensor:
        q_len, kv_len = self.q_len, self.kv_len

        def whole(low: int, high: int, *shape: int) -> Tensor:
            """low ... high - 1"""
            return torch.randint(low, max(high, low + 1), shape, generator=generator)

        if self.ranges == "documents":
            count = max(1, min(q_len, kv_len) // 12)
            cuts = [whole(0, n + 1, count - 1).sort().values for n in (q_len, kv_len)]
            of_query, of_key = (
                torch.cat((torch.zeros(1), x, torch.full((1,), n)))
                for x, n in zip(cuts, (q_len, kv_len))
            )
            return KeyRanges.from_cu_seqlens(of_query.int(), of_key.int(), q_len=q_len).tensor
        if self.ranges == "padding":
            starts = whole(0, kv_len // 2 + 1, self.batch)
            lengths = whole(0, kv_len // 2 + 1, self.batch)
            return KeyRanges.from_lengths(lengths, q_len, starts=starts).tensor
        if self.ranges == "prefix":
            return KeyRanges.sliding_window(
                kv_len // 8, 2, q_len, prefix=kv_len // 6, diagonal=kv_len - q_len
            ).tensor
        keeps = zip((self.batch, self.num_heads), self.ranges_full)
        shape = (*(n if keep else 1 for n, keep in keeps), q_len)
        begin = whole(-5, kv_len, *shape)
        return torch.stack(
            (
                begin,
                begin + whole(-3, kv_len, *shape),
                whole(-5, kv_len + 5, *shape),
                (whole(0, 2, *shape) * whole(-5, kv_len, *shape)).clamp(max=kv_len // 4),
            ),
            dim=-1,
        ).int()

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, dout on the CPU."""
        return self._draw()[0]

    def scoring(self, device: torch.device | str = "cpu") -> Scoring:
        """The arguments of flash_attn_fwd behind q, k and v, but for impl."""
        drawn = self.mask or self.alibi or self.sinks or self.ranges
        scoring = self._draw()[1] if drawn else self._numbers()
        return scoring._replace(
            **{
                name: x.to(device)
                for name in ("attn_mask", "alibi_slopes", "sinks", "key_ranges")
                if (x := getattr(scoring, name)) is not None
            }
        )

    def math(self, dtype: torch.dtype, *operands: Tensor, dlse: Tensor | None = None) -> MathResult:
        """`math_attention` of q, k, v and dout in `dtype`."""
        query, key, value, dout = operands
        arguments = self.scoring()._asdict() | {"dropout_seed": SEED}
        return math_attention(query, key, value, dout, dlse, dtype=dtype, **arguments)
