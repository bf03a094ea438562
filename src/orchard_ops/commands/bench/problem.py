"""An attention problem, of which a case of the bench is made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """Self-attention of one size: q is (B, H, L, D), k and v are (B, Hkv, L, D)."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mask: str
    """"causal" or "full"."""
    batch: int = 1
    dtype: str = "float16"
    length: int = 1024

    @property
    def is_causal(self) -> bool:
        return self.mask == "causal"

    @property
    def series(self) -> str:
        """The name of the series, which is the problem without its length."""
        heads = f"H{self.num_heads}"
        if self.num_kv_heads != self.num_heads:
            heads += f"/{self.num_kv_heads}"
        return f"{self.name}: B{self.batch} {heads} D{self.head_dim} {self.mask} {self.dtype}"
