"""Writes what Apple's Metal compiler should be shown: `metal_sources.py DIRECTORY`.

One file per kernel family, with every variant that the plan can ask for. Xcode's compiler needs no
GPU, so a Mac without one (a hosted CI machine) can still say whether the text compiles:
    xcrun metal -std=metal3.1 -c attention_forward.metal
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "native"))
import embed_shaders  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = range(8, 257, 8)


def kernels(dtype: torch.dtype, head_dim: int, offset: int, dropout_p: float) -> list[dict]:
    """What the plan runs for such a call: forward, then backward."""
    shape = (1, 1, 64, head_dim)
    # An offset of one element keeps rows off 16-byte boundaries.
    operand = torch.empty(64 * head_dim + offset, dtype=dtype)[offset:].view(shape)
    seed = torch.tensor(0)
    plan = json.loads(
        torch.ops.orchard.flash_attn_plan(
            operand, operand, operand, None, None, None, seed, dropout_p, head_dim**-0.5,
            -1, -1, 0, 0.0, "metal",
        )
    )  # fmt: skip
    return plan["kernels"]


def sources() -> dict[str, str]:
    """Kernel family -> its text with one instantiation per variant."""
    variants: dict[str, dict[str, str]] = {family: {} for family in embed_shaders.FAMILIES}
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            for offset in (0, 1):
                for dropout_p in (0.0, 0.1):
                    for kernel in kernels(dtype, head_dim, offset, dropout_p):
                        variants[kernel["family"]][kernel["name"]] = kernel["instantiation"]
    return {
        family: embed_shaders.flatten(header) + "\n" + "".join(variants[family].values())
        for family, header in embed_shaders.FAMILIES.items()
    }


if __name__ == "__main__":
    import orchard_ops  # noqa: F401  (loads the plan)

    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for family, text in sources().items():
        (directory / f"{family}.metal").write_text(text, encoding="ascii")
