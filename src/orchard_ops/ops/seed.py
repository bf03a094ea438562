"""The seed of a call's dropout, and an op that draws it: a compiler must not draw it twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import traceback
from torch.utils.checkpoint import CheckpointPolicy

from .schema import library

# The argument gives the op a device and thereby an autograd kernel.
library.define(
    "draw_dropout_seed(Tensor query) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,)
)
DRAW = torch.ops.orchard.draw_dropout_seed.default


def _randint() -> Tensor:
    # The cpu generator: activation checkpointing restores its state, not that of mps.
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")


def _kernel(query: Tensor) -> Tensor:
    return _randint()


@torch.library.register_fake("orchard::draw_dropout_seed", lib=library)
def _shape(query: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


@contextmanager
def _saved_for_the_backward() -> Iterator[None]:
    """Nodes that torch.compile makes in the block are never computed again in the backward.

    By itself it would, under torch._functorch.config.activation_memory_budget < 1, and the backward
    would see another dropout mask than the forward.
    """
    before = traceback.current_meta
    traceback.current_meta = {**before, "recompute": CheckpointPolicy.MUST_SAVE}
    try:
        yield
    finally:
        traceback.current_meta = before


def _autograd_kernel(query: Tensor) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd(), _saved_for_the_backward():
        return DRAW(query)


@torch.library.register_vmap("orchard::draw_dropout_seed", lib=library)
def _vmap_rule(info: Any, in_dims: tuple[Any, ...], query: Tensor) -> tuple[Tensor, None]:
    """One seed serves all samples, whose masks differ by the batch index."""
    return _randint(), None


library.impl("draw_dropout_seed", _kernel, "CompositeExplicitAutograd")
library.impl("draw_dropout_seed", _autograd_kernel, "Autograd")


def draw(query: Tensor) -> Tensor:
    """0-dim int64 on the cpu, from torch's generator there."""
    if torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack():
        return DRAW(query)
    return _randint()
