"""Random weights for tiny models."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def stir(model: nn.Module, scale: float = 0.05) -> nn.Module:
    """Adds noise to all weights: gates and biases that begin at 0 would hide what they act on."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * scale)
    return model
