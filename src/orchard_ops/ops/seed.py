"""The seed of a call's dropout, and an op that draws it: a compiler must not draw it twice."""

from __future__ import annotations

from typing import Any

import torch
import torch._functorch.config
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import CheckpointPolicy

from ..namespace import NAME, OPS
from .schema import library

# The argument gives the op a device, and so an autograd kernel.
library.define(
    "draw_dropout_seed(Tensor query) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,)
)
DRAW = OPS.draw_dropout_seed.default
_ALMOST_NOTHING = 1e-6
"""A memory budget, as a share of the activations that are saved without one."""


def _randint() -> Tensor:
    # The cpu generator: activation checkpointing restores its state, not that of mps.
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")


def _kernel(query: Tensor) -> Tensor:
    return _randint()


@torch.library.register_fake(f"{NAME}::draw_dropout_seed", lib=library)
def _shape(query: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


def _have_the_draw_saved() -> None:
    """Marks the draw that torch.compile has just traced, so that the backward does not repeat it.

    The partitioner would repeat it under torch._functorch.config.activation_memory_budget < 1, and
    the backward would see another dropout mask than the forward.
    """
    tracing = get_proxy_mode()
    if tracing is None:
        return
    node = next((n for n in reversed(tracing.tracer.graph.nodes) if n.target is DRAW), None)
    if node is None:  # something else is being traced
        return
    node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    custom = node.meta.get("custom") or {}
    if custom.get("_region_activation_memory_budget") == 0.0:
        raise RuntimeError(
            "orchard::flash_attn: dropout needs its seed in the backward, and "
            "region_activation_memory_budget(0.0) lets torch.compile save nothing: pass a budget "
            f"above 0, such as {_ALMOST_NOTHING}, which saves hardly more"
        )
    if torch._functorch.config.activation_memory_budget == 0.0:
        # At 0 the partitioner saves nothing, whatever the marks. A node's own budget goes first.
        node.meta["memory_budget"] = _ALMOST_NOTHING


def _autograd_kernel(query: Tensor) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        dropout_seed = DRAW(query)
    _have_the_draw_saved()
    return dropout_seed


@torch.library.register_vmap(f"{NAME}::draw_dropout_seed", lib=library)
def _vmap_rule(info: Any, in_dims: tuple[Any, ...], query: Tensor) -> tuple[Tensor, None]:
    """One seed serves all samples, whose masks differ by the batch index."""
    return _randint(), None


library.impl("draw_dropout_seed", _kernel, "CompositeExplicitAutograd")
library.impl("draw_dropout_seed", _autograd_kernel, "Autograd")


def draw(query: Tensor) -> Tensor:
    """Draws a seed, 0-dim int64 on the cpu, from torch's generator of that device."""
    if torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack():
        return DRAW(query)
    return _randint()
