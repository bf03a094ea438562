"""The seed of a call's dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from .schema import library

library.define("draw_dropout_seed() -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))


def _draw() -> Tensor:
    # The cpu generator: activation checkpointing restores its state, not that of mps.
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")


library.impl("draw_dropout_seed", _draw, "CompositeExplicitAutograd")


@torch.library.register_fake("orchard::draw_dropout_seed", lib=library)
def _seed_shape() -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


def draw() -> Tensor:
    """0-dim int64 on the cpu, from torch's generator there."""
    return _draw()
