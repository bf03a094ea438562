"""`explain`: which path a call would take, with which kernels, and what would change that."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import calls, native
from .arguments import prepare
from .plan import plan


@dataclass(frozen=True)
class Explanation:
    """The path of one call."""

    path: str
    """"metal", "reference", or "raises": ORCHARD_STRICT or impl="metal" forbids the reference."""
    reason: str
    """Why that path."""
    advice: str
    """What would make the call run on Metal, or run faster there; may be empty."""
    kernels: tuple[str, ...]
    """Names of the Metal kernels: forward, then backward. Empty where none would run."""
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
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            window_left=window_left,
            window_right=window_right,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            impl=impl,
        )
    device = query.device.type
    other_path = "raises" if calls.insists_on_metal(device, call.impl) else "reference"

    def without_metal(reason: str, advice: str) -> Explanation:
        return Explanation(other_path, reason, advice, (), {})

    if device != "mps":
        return without_metal(f"{calls.NOT_MPS}{device}, not on mps", 'move them to "mps"')
    missing = native.why_not()
    if missing:
        return without_metal(missing, "see docs/install.md")
    chosen = plan(*call.flat())
    if chosen.refusal:
        return without_metal(chosen.why_not, chosen.advice)
    tiles = {kernel.name: kernel.tile for kernel in chosen.kernels}
    reason = "the Metal kernels cover every argument of this call"
    return Explanation("metal", reason, chosen.advice, tuple(tiles), tiles, chosen.scratch_bytes)
