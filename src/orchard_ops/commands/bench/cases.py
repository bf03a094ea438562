"""What is measured: attention problems over a range of lengths, forward and training."""

from __future__ import annotations

import argparse
import functools
import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .models import MODELS
from .problem import Problem

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MODES = ("forward", "training")
MASKS = ("causal", "full")

PRESETS = {
    problem.name: problem
    for problem in (
        Problem("gpt", num_heads=12, num_kv_heads=12, head_dim=64, mask="causal"),
        Problem("llama", num_heads=32, num_kv_heads=8, head_dim=128, mask="causal"),
        Problem("vit", num_heads=12, num_kv_heads=12, head_dim=64, mask="full"),
        Problem("short", num_heads=12, num_kv_heads=12, head_dim=64, mask="causal"),
    )
}

LENGTHS_OF = {"short": (64, 128, 256)} | {name: (m.length,) for name, m in MODELS.items()}
"""The lengths of the presets that do not take the device's. A sequence is "short" where a call is
rather launches than products: what does not help there belongs beside what does."""
PRESETS |= MODELS


@dataclass(frozen=True)
class Case:
    """One problem in one mode. "training" is forward and backward to dq, dk and dv."""

    problem: Problem
    mode: str

    @property
    def training(self) -> bool:
        return self.mode == "training"

    def __str__(self) -> str:
        return f"{self.problem.series} L{self.problem.length} {self.mode}"


@dataclass(frozen=True)
class Defaults:
    """The cases that a device can measure in a few minutes."""

    presets: tuple[str, ...]
    lengths: tuple[int, ...]
    dtypes: tuple[str, ...]


DEFAULTS = {  # Place.kind -> what is measured unless asked otherwise
    "apple_gpu": Defaults(
        ("gpt", "llama", "vit", "short"), (512, 1024, 2048, 4096, 8192), ("float16",)
    ),
    "cpu": Defaults(("gpt", "llama"), (256, 512, 1024, 2048), ("float32",)),
    "simulated": Defaults(("gpt",), (32, 64), ("float16",)),
}


def chosen(args: argparse.Namespace, kind: str) -> list[Case]:
    """The cases of a command line, by series, then length; forward before training.

    Args:
        args: cases, lengths, dtypes, heads, head_dims, masks, modes, batch, quick, tiles, scratch.
        kind: of the place, see `DEFAULTS`.
    """
    asked = {"forward": args.tiles is not None, "training": args.scratch is not None}
    modes = args.modes or tuple(mode for mode in MODES if asked[mode]) or MODES
    defaults = DEFAULTS[kind]
    presets, lengths = defaults.presets, defaults.lengths
    if args.quick:
        presets, lengths = presets[:1], lengths[:2]
    problems = []
    for name in args.cases or presets:
        preset = PRESETS[name]
        grid = itertools.product(
            args.heads or [(preset.num_heads, preset.num_kv_heads)],
            args.head_dims or [preset.head_dim],
            args.masks or [preset.mask],
            args.dtypes or defaults.dtypes,
            sorted(args.lengths or LENGTHS_OF.get(name, lengths)),
        )
        for (num_heads, num_kv_heads), head_dim, mask, dtype, length in grid:
            problems.append(
                replace(
                    preset,
                    num_heads=num_heads,
                    num_kv_heads=num_kv_heads,
                    head_dim=head_dim,
                    mask=mask,
                    dtype=dtype,
                    length=length,
                    batch=args.batch,
                )
            )
    return [Case(p, mode) for p in dict.fromkeys(problems) for mode in modes]


@functools.lru_cache(maxsize=1)
def operands(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, dout on the CPU, the same on every machine."""
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> Tensor:
        shape = (problem.batch, heads, problem.length, problem.head_dim)
        return torch.randn(shape, generator=generator).to(DTYPES[problem.dtype])

    q, k, v = draw(problem.num_heads), draw(problem.num_kv_heads), draw(problem.num_kv_heads)
    return q, k, v, draw(problem.num_heads)
