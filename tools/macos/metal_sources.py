"""Writes what Apple's Metal compiler should be shown: `metal_sources.py DIRECTORY [PER_FILE]`.

One file per kernel family, or several of PER_FILE variants each for a compiler that runs in
parallel, with every variant of plain scores that the plan can ask for, with dS stored and in
low-memory mode, the forward's other tiles that `bench --tiles` measures by default, values of a
width of their own, and divided groups and each kind of score, mask and key ranges at two head dims.
The mask's gradient has no call here. Xcode's compiler needs no GPU, so a Mac without one (a hosted
CI machine) can still say whether the text compiles:
    xcrun metal -std=metal3.1 -c attention_forward.metal
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from orchard_ops.commands.bench.cases import PRESETS
from orchard_ops.commands.environment import environment_variables
from orchard_ops.plan import Kernel, plan
from orchard_ops.scoring import Scoring

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "native"))
import embed_shaders  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = range(8, 257, 8)
MEASURED_HEAD_DIMS = {problem.head_dim for problem in PRESETS.values()}


FEATURES: tuple[dict[str, Any], ...] = (
    {"softcap": 30.0},
    {"alibi_slopes": torch.ones(1)},
    {"sinks": torch.ones(1)},
    {"attn_mask": torch.ones(1, 1, 64, 64, dtype=torch.bool)},
    {"attn_mask": torch.ones(1, 1, 64, 64)},
    {"key_ranges": torch.zeros(1, 1, 64, 4, dtype=torch.int32)},
    {
        "attn_mask": torch.ones(1, 1, 64, 64, dtype=torch.bool),
        "key_ranges": torch.zeros(1, 1, 64, 4, dtype=torch.int32),
    },
)
FEATURED_HEAD_DIMS = (64, 128)


def kernels(
    dtype: torch.dtype,
    head_dim: int,
    offset: int,
    dropout_p: float,
    value_dim: int = 0,
    heads: int = 1,
    kv_len: int = 64,
    **features: Any,
) -> tuple[Kernel, ...]:
    """The kernels that the plan runs for such a call: forward, then backward."""
    # An offset of one element keeps rows off 16-byte boundaries.
    query, key, value = (
        torch.empty(count * length * width + offset, dtype=dtype)[offset:].view(
            1, count, length, width
        )
        for count, length, width in (
            (heads, 64, head_dim),
            (1, kv_len, head_dim),
            (1, kv_len, value_dim or head_dim),
        )
    )
    scoring = Scoring(dropout_seed=torch.tensor(0), dropout_p=dropout_p, scale=head_dim**-0.5)
    scoring = scoring._replace(**features)
    return plan(query, key, value, *scoring, "metal").kernels


def every_kernel(*call: Any) -> Iterator[Kernel]:
    """The kernels that the plan may run for such a call, whatever the environment says."""
    for megabytes in ("0", "1"):
        with environment_variables(ORCHARD_BACKWARD_SCRATCH_MB=megabytes, ORCHARD_TILES=""):
            forward, *backward = kernels(*call)
        yield from (forward, *backward)
    _, head_dim, offset, dropout_p, *_ = call
    measured = head_dim in MEASURED_HEAD_DIMS and not offset and not dropout_p
    for tile in forward.alternatives if measured else ():
        with environment_variables(ORCHARD_TILES=f"{forward.family}={tile}"):
            yield kernels(*call)[0]


def sources(per_file: int | None = None) -> dict[str, str]:
    """Kernel family -> its text with one instantiation per variant.

    With `per_file`, a family is divided into files of so many variants, "family_0", "family_1", ...
    """
    variants: dict[str, dict[str, str]] = {family: {} for family in embed_shaders.FAMILIES}
    for call in itertools.product(DTYPES, HEAD_DIMS, (0, 1), (0.0, 0.1)):
        for kernel in every_kernel(*call):
            variants[kernel.family][kernel.name] = kernel.instantiation
    for call in itertools.product(DTYPES, (192,), (0, 1), (0.0, 0.1), (128,)):
        for kernel in every_kernel(*call):
            variants[kernel.family][kernel.name] = kernel.instantiation
    for dtype, head_dim in itertools.product(DTYPES, FEATURED_HEAD_DIMS):
        for kernel in kernels(dtype, head_dim, 0, 0.0, heads=8):  # a group that is divided
            variants[kernel.family][kernel.name] = kernel.instantiation
    for dtype, head_dim, features in itertools.product(DTYPES, FEATURED_HEAD_DIMS, FEATURES):
        for kernel in kernels(dtype, head_dim, 0, 0.0, **features):
            variants[kernel.family][kernel.name] = kernel.instantiation
    for call in itertools.product(DTYPES, FEATURED_HEAD_DIMS, (0, 1), (0.0, 0.1)):
        for kernel in kernels(*call, kv_len=512)[:2]:  # a part, and the merge
            variants[kernel.family][kernel.name] = kernel.instantiation
    texts = {}
    for family, header in embed_shaders.FAMILIES.items():
        text = embed_shaders.flatten(header) + "\n"
        instantiations = list(variants[family].values())
        size = per_file or max(len(instantiations), 1)
        for part, first in enumerate(range(0, len(instantiations), size)):
            name = f"{family}_{part}" if per_file else family
            texts[name] = text + "".join(instantiations[first : first + size])
    return texts


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in sources(int(sys.argv[2]) if sys.argv[2:] else None).items():
        (directory / f"{name}.metal").write_text(text, encoding="ascii")
