"""The forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import empty_in_order_of
from ..scoring import Scoring
from .products import product
from .scores import Problem


def forward(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """out (B, Hq, L, Dv) in the query's dtype and stride order, row_stats (B, Hq, L, 2).

    row_stats holds, in the unit of the exponent (`Scoring.unit`), the origin that a row's
    exponentials count from and the logarithm of their sum, sinks included. A row without a key has
    the lowest finite number and -inf; its output is 0. It is float64 for float64 operands, else
    float32.
    """
    p = Problem(query, key, value, scoring)
    out = empty_in_order_of(query, value.shape[-1])
    query = p.seeing(query)
    stats: list[Tensor] = []
    logarithm = torch.log2 if scoring.plain else torch.log
    for block in p.blocks():
        x, _, top = p.scores(p.rows_by_kv_head(query, block), block)
        origin, total, _ = p.exponentials(x, top)
        stats.append(torch.cat((p.in_unit(origin, total), logarithm(total)), dim=-1))
        keep = p.keep(block)
        if keep is not None:
            x.mul_(keep)
        rows = p.rows_by_head(product(p.by_kv_head(x), block.cols(p.v)), block)
        total.clamp_(min=1.0)  # 0 without a key
        if p.device.type == "cpu":
            torch.div(rows, total, out=block.rows(out))
        else:  # mps loses what is written into a part of a tensor in some releases
            block.rows(out).copy_(rows.div_(total))
    if not stats:  # nothing to compute
        return out, torch.empty((*query.shape[:3], 2), dtype=p.dtype, device=p.device)
    return out, stats[0] if len(stats) == 1 else torch.cat(stats, dim=2)
