"""`flex_attention` under torch.compile: a higher-order operator whose mods are graphs.

Dynamo traces the mods of PyTorch's own FlexAttention operator into subgraphs and makes arguments of
what they capture, tensors and sizes that it has not fixed alike. It knows that operator by its
`__name__`, so that this one has the same. What comes after Dynamo calls it, and gets ordinary ops
of it: AOTAutograd and inductor never see this operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.nn.attention import flex_attention as pytorch

from ..namespace import NAME
from . import route
from .arguments import FlexCall
from .block_mask import Blocks
from .traces import of_graph


class _FlexAttention(HigherOrderOperator):
    def __init__(self) -> None:
        super().__init__(f"{NAME}_flex_attention")
        self.__name__ = "flex_attention"
        # As one of PyTorch's modules, the code of a graph would name PyTorch's own operator.
        self.__module__ = __name__

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_mod: Callable[..., Any],
        block_mask: tuple[Any, ...],
        scale: float,
        given: dict[str, bool],
        score_captures: tuple[Any, ...] = (),
        mask_captures: tuple[Any, ...] = (),
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        *blocks, mask_mod = block_mask
        score = of_graph(score_mod, "score", query, score_captures) if given["score"] else None  # type: ignore[arg-type]
        mask = of_graph(mask_mod, "mask", query, mask_captures) if given["mask"] else None
        found = Blocks(*blocks) if blocks else None
        rest = (score, mask, found, scale)
        out, lse = route.attend(query, key, value, *rest, wants_lse=given["lse"], in_graph=True)
        if not given["max_scores"]:
            return out, lse, None
        return out, lse, route.max_scores(query, key, *rest)


_operator = _FlexAttention()


def attend(
    call: FlexCall, wants_lse: bool, wants_max: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """out, lse and, if they are wanted, max_scores of a call that Dynamo is tracing. An lse that is
    not wanted may be anything."""
    for x in (call.query, call.key, call.value):
        torch._dynamo.mark_static(x, 1)
        torch._dynamo.mark_static(x, 3)
    given = {
        "score": call.score_mod is not None,
        "mask": call.mask_mod is not None,
        "lse": wants_lse,
        "max_scores": wants_max,
    }
    score_mod = pytorch._identity if call.score_mod is None else call.score_mod
    mask_mod = pytorch.noop_mask if call.mask_mod is None else call.mask_mod
    blocks = () if call.block_mask is None else Blocks.of(call.block_mask)
    return _operator(
        call.query, call.key, call.value, score_mod, (*blocks, mask_mod), call.scale, given
    )
