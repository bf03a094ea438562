"""The two attention functions that the demo compares: the op, and PyTorch's math path."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ... import dropout


def orchard_attention(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
    """Causal ``torch.ops.orchard.flash_attn``; see `demo.model.Attention` for the shapes."""
    return torch.ops.orchard.flash_attn(
        query, key, value, None, dropout_p, is_causal=True, enable_gqa=True
    )


def sdpa_math_attention(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
    """The same call as PyTorch's SDPA computes it on its math path, with the op's dropout mask.

    Draws the dropout seed from torch's cpu generator as the op does: from one generator state both
    functions get one seed, hence one mask.
    """
    keep = None
    if 0.0 < dropout_p < 1.0:
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")
        shape = (*query.shape[:3], key.shape[2])
        keep = dropout.dropout_mask(seed, dropout_p, shape, device=query.device)
        # SDPA multiplies what is kept by 1 / (1 - p): the p that the mask was really drawn with.
        dropout_p = dropout.threshold(dropout_p) / dropout.RESOLUTION
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Dropout mask should only be used for testing purposes")
        out, _ = torch._scaled_dot_product_attention_math(
            query, key, value, None, dropout_p, True, keep, enable_gqa=True
        )
    return out
