"""Score mods that add to the score what does not depend on it, where what is added is trained.

Such a mod is an additive mask, whose gradient the kernels of `flash_attn` have. The mask is
computed here by PyTorch's own operations, over the batches and heads alone that it depends on, so
that autograd takes the gradient on from the mask to what the mod captured. It takes L x S elements,
as a learned table of positions does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..arguments import prepare
from ..attention import run_with_lse
from .block_mask import ASK, HIDDEN
from .conditions import is_read
from .mod import NotLowered
from .reference import over_places
from .trace import Indexing
from .traces import Use

_aten = torch.ops.aten
_SAME = (_aten.clone.default, _aten.detach.default, _aten.alias.default)


def takes(score: Use) -> bool:
    """Whether the mod is the score plus something that does not depend on it, with that derivative:
    code may detach the score."""
    try:
        if not score.mod(0).is_unit_slope:
            return False
    except NotLowered:
        return False
    graph = score.traced.graph.graph
    first = next(n for n in graph.nodes if n.op == "placeholder")
    dependent = {first}
    for node in graph.nodes:
        if any(x in dependent for x in node.all_input_nodes):
            dependent.add(node)
    (result,) = graph.output_node().args[:1]
    return _is_sum(result, first, dependent)


def _is_sum(node: Any, score: Node, dependent: set[Node]) -> bool:
    while node is not score:
        if not isinstance(node, Node) or node.op != "call_function":
            return False
        terms = [x in dependent for x in node.args[:2] if isinstance(x, Node)]
        if node.target in _SAME:
            node = node.args[0]
        elif node.target == _aten._to_copy.default:
            if node.meta["val"].dtype not in (torch.float32, torch.float64):
                return False
            node = node.args[0]
        elif node.target in (_aten.add.Tensor, _aten.sub.Tensor) and sum(terms) == 1:
            minuend, other = node.args[:2]
            if minuend in dependent:
                node = minuend
            elif node.target == _aten.add.Tensor and node.kwargs.get("alpha", 1) == 1:
                node = other
            else:
                return False
        else:
            return False
    return True


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score: Use,
    mask: Use | None,
    states: Tensor | None,
    q_block: int,
    kv_block: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out and lse, with gradients of what `score` captured."""
    sizes = (*query.shape[:3], key.shape[2])
    used = _places(score, sizes, query)
    shape = tuple(x.shape[0] for x in used)
    with Indexing(query.device):
        bias = over_places(score.function, 1)(query.new_zeros(shape, dtype=torch.float32), *used)
        seen = None
        if mask is not None:
            seen = over_places(mask.function, 0)(*_places(mask, sizes, query))
    if states is not None:
        rows, columns = (
            torch.arange(n, device=query.device) // block
            for n, block in zip(sizes[2:], (q_block, kv_block))
        )
        state = states[:, :, rows][..., columns]
        listed = state != HIDDEN
        seen = listed if seen is None else listed & ((state != ASK) | seen)
    if seen is not None:
        bias = torch.where(seen, bias, -torch.inf)
    return run_with_lse(
        prepare(query, key, value, bias, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    )


def _places(use: Use, sizes: tuple[int, ...], query: Tensor) -> list[Tensor]:
    """The numbers of batches, heads, queries and keys; of the first two only one, where the mod
    does not look at them."""
    placeholders = [n for n in use.traced.graph.graph.nodes if n.op == "placeholder"]
    indices = placeholders[use.traced.inputs - 4 :][:4]
    wanted = [n if is_read(x) or at > 1 else 1 for at, (n, x) in enumerate(zip(sizes, indices))]
    return [torch.arange(n, dtype=torch.int32, device=query.device) for n in wanted]
