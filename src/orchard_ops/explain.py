"""`explain`: which path a call would take, with which kernels, and what would change that."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import _calls, _native
from .attention import prepare
from .plan import plan


@dataclass(frozen=True)
class Explanation:
    """The path of one call."""

    path: str
    """"metal" or "reference"."""
    reason: str
    """Why that path."""
    advice: str
    """What would make the call run on Metal, or run faster there; may be empty."""
    kernels: tuple[str, ...]
    """Names of the Metal kernels: forward, then backward. Empty on the reference."""
    tiles: dict[str, str]
    """Kernel -> its tile and grid, in words."""
    scratch_bytes: int = 0
    """What a backward takes for the gradient of the scores while it runs, if there is memory."""

    def __str__(self) -> str:
        lines = [f"path: {self.path}", f"reason: {self.reason}"]
        lines += [f"kernel: {name} ({self.tiles[name]})" for name in self.kernels]
        if self.scratch_bytes:
            kib = self.scratch_bytes / 1024
            size = f"{kib:.1f} KiB" if kib < 1024 else f"{kib / 1024:.1f} MiB"
            lines.append(f"scratch: {size} for a backward")
        if self.advice:
            lines.append(f"advice: {self.advice}")
        return "\n".join(lines)


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    impl: str | None = None,
) -> Explanation:
    """Says what `flash_attn` would do with the same arguments. Runs nothing.

    The backward is explained for a gradient laid out like the output.

    Raises:
        ValueError, TypeError: as `flash_attn`, for a malformed call.
    """
    with torch.random.fork_rng(devices=[]):  # prepare draws a dropout seed
        call = prepare(
            query, key, value, attn_mask, dropout_p, is_causal, scale,
            window_left, window_right, softcap, alibi_slopes, sinks, impl or "auto",
        )  # fmt: skip
    device = query.device.type
    if device != "mps":
        return Explanation(
            "reference", f"{_calls.NOT_MPS}{device}, not on mps", 'move them to "mps"', (), {}
        )
    missing = _native.why_not()
    if missing:
        return Explanation("reference", missing, "see docs/install.md", (), {})
    native = plan(*call.operands, *call.scoring)
    if native.refusal:
        return Explanation("reference", native.why_not, native.advice, (), {})
    tiles = {kernel.name: kernel.tile for kernel in native.kernels}
    return Explanation("metal", "the Metal kernels cover every argument of this call",
                       native.advice, tuple(tiles), tiles, native.scratch_bytes)  # fmt: skip
