"""Attention by any score_mod and mask_mod, in PyTorch's own operations, by blocks of queries.

It runs what Metal kernels do not, on every device. Autograd differentiates it, by query, key,
value and whatever the functions read; a block is computed anew for that, so that memory is that of
one block of queries times all keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .block_mask import HIDDEN, SEEN
from .mod import Function
from .trace import Indexing

_ROWS = 128
"""Queries of a block, where no BlockMask says how many belong together."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Function | None,
    mask_mod: Function | None,
    block_states: Tensor | None,
    block_q: int,
    block_kv: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out (B, Hq, L, Dv) in the query's dtype, lse (B, Hq, L) in float32, or float64 for float64).

    Args:
        query: (B, Hq, L, D).
        key, value: (B or 1, Hkv, S, D or Dv), where Hkv divides Hq.
        score_mod: (score, b, h, q_idx, kv_idx) -> score, of 0-dim tensors; scores are `scale` times
            the product.
        mask_mod: (b, h, q_idx, kv_idx) -> bool. It is asked in blocks whose state is ASK.
        block_states: uint8 (1 or B, 1 or Hq, blocks of block_q queries, blocks of block_kv keys);
            None: ASK everywhere. What lies in a block of state HIDDEN has no part in anything.

    A query that sees no key has 0 and an lse of -inf.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    k, v = (x.to(dtype).expand(query.shape[0], -1, -1, -1) for x in (key, value))
    call = _Call(score_mod, mask_mod, block_states, block_q, block_kv, scale)
    outs, sums = [], []
    for first, end in _blocks(query.shape[2], None if block_states is None else block_q):
        arguments = (query[:, :, first:end].to(dtype), k, v, first)
        # torch.func's transforms know no hooks of saved tensors.
        if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            out, lse = checkpoint(
                call.block, *arguments, use_reentrant=False, preserve_rng_state=False
            )
        else:
            out, lse = call.block(*arguments)
        outs.append(out.to(query.dtype))
        sums.append(lse)
    return torch.cat(outs, 2), torch.cat(sums, 2)


def max_scores(
    query: Tensor,
    key: Tensor,
    score_mod: Function | None,
    mask_mod: Function | None,
    block_states: Tensor | None,
    block_q: int,
    block_kv: int,
    scale: float,
) -> Tensor:
    """(B, Hq, L) of lse's dtype: the largest score that a query sees, -inf where it sees none."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    k = key.to(dtype).expand(query.shape[0], -1, -1, -1)
    call = _Call(score_mod, mask_mod, block_states, block_q, block_kv, scale)
    found = []
    with torch.no_grad():
        for first, end in _blocks(query.shape[2], None if block_states is None else block_q):
            states = call.states_of(first, k.shape[2])
            x = call.scores(query[:, :, first:end].to(dtype), k, first, states)
            empty = x.new_full((*x.shape[:3], 1), -torch.inf)
            found.append(torch.cat([empty, x], -1).amax(-1))
    return torch.cat(found, 2)


def _blocks(q_len: int, block_q: int | None) -> Iterator[tuple[int, int]]:
    """Rows of one block lie in one block of a BlockMask."""
    first = 0
    if q_len == 0:
        yield 0, 0  # for its derivatives
    while first < q_len:
        end = min(first + _ROWS, q_len)
        if block_q is not None:
            end = min(end, (first // block_q + 1) * block_q)
        yield first, end
        first = end


class _Call:
    def __init__(
        self,
        score_mod: Function | None,
        mask_mod: Function | None,
        block_states: Tensor | None,
        block_q: int,
        block_kv: int,
        scale: float,
    ) -> None:
        self.score_mod, self.mask_mod = score_mod, mask_mod
        self.states, self.block_q, self.block_kv = block_states, block_q, block_kv
        self.scale = scale

    def block(self, q: Tensor, k: Tensor, v: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """out and lse of the queries from `first` on."""
        states = self.states_of(first, k.shape[2])
        if states is not None:
            v = self._listed(v, states)
        x = self.scores(q, k, first, states)
        kv_len = k.shape[2]
        largest = x.detach().amax(-1, keepdim=True) if kv_len else x.new_zeros((*q.shape[:3], 1))
        origin = torch.where(largest == -torch.inf, 0.0, largest)
        e = torch.exp(x - origin)
        total = e.sum(-1, keepdim=True)
        is_empty = total == 0
        total = torch.where(is_empty, 1.0, total)
        out = _grouped_product(e, v) / total
        lse = torch.where(is_empty, -torch.inf, total.log() + origin)
        return out, lse.squeeze(-1)

    def scores(self, q: Tensor, k: Tensor, first: int, states: Tensor | None) -> Tensor:
        """Those of the queries from `first` on, -inf where a key is not seen."""
        batch, num_heads, rows, _ = q.shape
        kv_len = k.shape[2]
        if states is not None:
            k = self._listed(k, states)
        places = [
            torch.arange(n, dtype=torch.int32, device=q.device)
            for n in (batch, num_heads, rows, kv_len)
        ]
        places[2] = places[2] + first
        x = _grouped_product(q, k.transpose(2, 3)) * self.scale
        seen = None
        if self.mask_mod is not None and x.numel():
            with Indexing(q.device):
                seen = over_places(self.mask_mod, 0)(*places)
        if states is not None:
            listed = states if seen is None else (states == SEEN) | seen
            seen = (states != HIDDEN) & listed.to(torch.bool)
        if self.score_mod is not None and x.numel():
            if seen is not None:  # where score_mod has no derivative, what is hidden needs none
                x = torch.where(seen, x, x.detach())
            with Indexing(q.device):
                x = over_places(self.score_mod, 1)(x, *places).to(x.dtype)
        return x if seen is None else torch.where(seen, x, -torch.inf)

    def states_of(self, first: int, kv_len: int) -> Tensor | None:
        """(1 or B, 1 or Hq, 1, S) of the block that query `first` is in."""
        if self.states is None or 0 in self.states.shape:
            return None
        row = self.states[:, :, min(first // self.block_q, self.states.shape[2] - 1)]
        keys = torch.arange(kv_len, device=row.device) // self.block_kv
        return row[..., keys.clamp_(max=max(row.shape[-1] - 1, 0))].unsqueeze(2)

    def _listed(self, x: Tensor, states: Tensor) -> Tensor:
        """Keys or values with 0 in the place of those that no query of the block may see.

        A NaN there would be one in every row: 0 times NaN.
        """
        is_listed = (states != HIDDEN).transpose(2, 3)
        heads, num_kv_heads = is_listed.shape[1], x.shape[1]
        if heads > num_kv_heads:
            x = x.repeat_interleave(heads // num_kv_heads, 1)
        return torch.where(is_listed, x, 0.0)


def _grouped_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of (B, Hq, m, n) and (B, Hkv, n, p), without copies of b for the heads of a group."""
    batch, num_heads, m, n = a.shape
    groups = b.shape[1]
    return (a.reshape(batch, groups, num_heads // groups * m, n) @ b).view(
        batch, num_heads, m, b.shape[3]
    )


def over_places(mod: Function, scores: int) -> Callable[..., Any]:
    """A function of 0-dim tensors, of all places of a block, and before them `scores` tensors."""
    for at in (3, 2, 1, 0):
        dims = [0] * scores + [0 if n == at else None for n in range(4)]
        mod = torch.vmap(mod, in_dims=tuple(dims), out_dims=0)
    return mod
