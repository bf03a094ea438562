"""`flex_attention`: the public function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask

from . import arguments, graph, route
from .block_mask import Blocks
from .traces import of_function


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Any] | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: dict[str, Any] | None = None,
    *,
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, AuxOutput]:
    """Attention whose scores and mask are Python functions, forward and backward.

    It has the arguments and the meaning of `torch.nn.attention.flex_attention.flex_attention`, and
    takes its `BlockMask` objects. On mps the functions become part of the Metal kernels, in eager
    code and under torch.compile; docs/flex-attention.md says what runs where.

    Args:
        query: (B, Hq, L, E) float16, bfloat16 or float32 (float64 on the reference).
        key: (B, Hkv, S, E); a batch of 1 serves every sample where there is a block_mask.
        value: (B, Hkv, S, Ev).
        score_mod: (score, b, h, q_idx, kv_idx) -> score, of 0-dim tensors; it may read tensors from
            outside, by indexing them.
        block_mask: of `create_block_mask`. Its lists say which blocks are seen; its mask_mod is
            asked in partial blocks alone.
        scale: factor on query @ key^T before score_mod; 1 / sqrt(E) by default.
        enable_gqa: query heads share key and value heads, Hq a multiple of Hkv.
        return_lse: also return lse; PyTorch prefers return_aux.
        kernel_options: PyTorch's options for its Triton kernels, of any names. They are not used.
        return_aux: `AuxRequest(lse=True)` returns (out, AuxOutput(lse)). `max_scores=True` adds the
            largest score of each query, which the reference finds, by another pass over the keys.

    Returns:
        out (B, Hq, L, Ev) in the query's dtype. Rows without a key are 0. lse (B, Hq, L) float32,
        the natural logarithm of the softmax's denominator, -inf for rows without a key; max_scores
        likewise, without a gradient.

    Raises:
        ValueError, TypeError: a malformed call; the message says what was wrong and what came.
        RuntimeError: ORCHARD_STRICT=1 and Metal cannot run the call.

    Reference: J. Dong et al., "Flex Attention: A Programming Model for Generating Optimized
    Attention Kernels", https://arxiv.org/abs/2412.05496.
    """
    wants_lse, wants_max = arguments.check_results(return_lse, return_aux)
    arguments.check_options(kernel_options)
    call = arguments.check(query, key, value, score_mod, block_mask, scale, enable_gqa)
    if torch.compiler.is_dynamo_compiling():
        out, lse, largest = graph.attend(call, wants_lse, wants_max)
    else:
        out, lse, largest = _attend(call, wants_lse, wants_max)
    if return_aux is not None:
        return out, AuxOutput(lse=lse if wants_lse else None, max_scores=largest)
    if not wants_lse:
        return out
    assert lse is not None
    return out, lse


def _attend(
    call: arguments.FlexCall, wants_lse: bool, wants_max: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    query, key, value, score_mod, mask_mod, block_mask, scale = call
    score = None if score_mod is None else of_function(score_mod, "score", query)
    mask = None if mask_mod is None else of_function(mask_mod, "mask", query)
    blocks = None if block_mask is None else Blocks.of(block_mask)
    found = route.attend(query, key, value, score, mask, blocks, scale, wants_lse)
    if not wants_max:
        return *found, None
    return *found, route.max_scores(query, key, score, mask, blocks, scale)
