"""score_mods of the kinds that PyTorch's own tests of FlexAttention have, and sums of vectors, of
an attention of `flex_mods.SHAPE`. (The masks of those tests are among the others.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from flex_mods import BATCH, HEADS, KV_LEN, Q_LEN
from torch import Tensor

_generator = torch.Generator().manual_seed(13)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator)


SCALE = torch.full((), 3, dtype=torch.int32)
CHOICE = torch.tensor(1)
OF_BATCH, OF_BATCHES = _random(BATCH, Q_LEN), _random(BATCH, 8)
WITH_FIRST, WITH_THIRD = _random(4, BATCH, HEADS, Q_LEN), _random(BATCH, HEADS, 4, Q_LEN)
BIDIRECTIONAL = torch.tensor([5, 9], dtype=torch.int32)
OF_ROWS = _random(BATCH, HEADS, Q_LEN, 5).half()
PADDED = torch.tensor([1, 2], dtype=torch.int32)
DENSE = torch.ones(BATCH, 1, Q_LEN, KV_LEN).bool().tril()
POINTS = _random(KV_LEN, 3)
MANY_POINTS = _random(KV_LEN, 40)
LENGTHS_OF_HEADS = torch.logspace(0.001, 0.1, HEADS)
CAPS = torch.tensor([[0.5, 2.0, 1.0], [0.25, 1.5, 0.75], [1.0, -1.0, 3.0]])
RELATIVE, OFFSET = _random(2 * KV_LEN), torch.randint(0, Q_LEN, (Q_LEN,), generator=_generator)
SQUARE, GATES = _random(KV_LEN, KV_LEN), _random(HEADS).bfloat16()
WINDOW = _random(9)


def bias_by_two_steps(score, b, h, q_idx, kv_idx):
    return score + OF_BATCH[b][q_idx] + WITH_FIRST[0][b, h][q_idx]


def bias_by_a_tensor(score, b, h, q_idx, kv_idx):
    return score + WITH_THIRD[b][h][CHOICE, q_idx] - WITH_THIRD[b, h, CHOICE, q_idx] / 2


def bias_of_a_view(score, b, h, q_idx, kv_idx):
    return score + OF_ROWS[b, h, q_idx, kv_idx // 4]


def captured_scale(score, b, h, q_idx, kv_idx):
    return score + SCALE if h is not None else score * SCALE


def without_odd_keys(score, b, h, q_idx, kv_idx):
    return torch.where(kv_idx % 2 == 0, score, float("-inf"))


def composed(score, b, h, q_idx, kv_idx):
    moved = score + (q_idx - kv_idx)
    return torch.where(q_idx <= kv_idx, moved, float("-inf"))


def dependent_bidirectional(score, b, h, q_idx, kv_idx):
    last = BIDIRECTIONAL[b]
    both = (q_idx <= last) & (kv_idx <= last)
    return torch.where(both | (q_idx >= kv_idx), score, -float("inf"))


def neighbourhood_of_quotients(score, b, h, q_idx, kv_idx):
    """Rows are quotients of floats here, as `/` gives them."""
    y, x = (q_idx / 4 - kv_idx / 4).abs(), (q_idx % 4 - kv_idx % 4).abs()
    return torch.where((y <= 1) | (x <= 1), score, float("-inf"))


def floor_of_keys(score, b, h, q_idx, kv_idx):
    return score - q_idx // (1 + kv_idx)


def of_scores(score, b, h, q_idx, kv_idx):
    """What is hidden depends on the score."""
    causal = torch.where(q_idx >= kv_idx, score, float("-inf"))
    return torch.where(score <= PADDED[b], causal, -float("inf"))


def silu(score, b, h, q_idx, kv_idx):
    return F.silu(score)


def tangents(score, b, h, q_idx, kv_idx):
    return torch.cos(score) * torch.sin(score) + torch.tan(b)


def of_new_zeros(score, b, h, q_idx, kv_idx):
    return score + DENSE[b, h.new_zeros(h.shape), q_idx, kv_idx]


class _Hide(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(score, seen):
        return torch.where(seen, score, -float("inf"))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(inputs[1])

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def hidden_by_a_function(score, b, h, q_idx, kv_idx):
    return _Hide.apply(score, q_idx <= kv_idx)


def learned_kinds(score, b, h, q_idx, kv_idx):
    near = WINDOW[torch.clamp(q_idx - kv_idx + 4, 0, 8)]
    biases = SQUARE[kv_idx, q_idx] + RELATIVE[torch.abs(q_idx - kv_idx)] + RELATIVE[OFFSET[q_idx]]
    return (score + near + biases) * torch.sigmoid(GATES[h].to(torch.float32))


# ---- sums ---------------------------------------------------------------------------------------


def sum_of_a_row(score, b, h, q_idx, kv_idx):
    return score + OF_BATCHES[b].sum(dim=-1)


def distances_of_points(score, b, h, q_idx, kv_idx):
    distance = (POINTS[q_idx] - POINTS[kv_idx]).pow(2).sum(-1).sqrt()
    return torch.exp(-distance / LENGTHS_OF_HEADS[h]) * score


def distances_of_many_numbers(score, b, h, q_idx, kv_idx):
    distance = torch.linalg.vector_norm(MANY_POINTS[q_idx] - MANY_POINTS[kv_idx])
    return torch.exp(-distance / LENGTHS_OF_HEADS[h]) * score


def products_of_rows(score, b, h, q_idx, kv_idx):
    x, y = POINTS[q_idx], POINTS[kv_idx]
    found = torch.einsum("d,d->", x, y) - x @ y / 2 + torch.inner(x, y) * h
    return score + found + (POINTS @ x)[kv_idx] + torch.outer(x, y).sum()


def mixture(score, b, h, q_idx, kv_idx):
    """Sums over terms that have the score in them."""
    terms = torch.tanh(score * CAPS[h]) / CAPS[h]
    return terms.sum() + terms.mean(-1) + (CAPS[h, :2] > 0).all() + (CAPS[h] > 2).any()


def logsumexp_of_terms(score, b, h, q_idx, kv_idx):
    return torch.logsumexp(score * CAPS[h], 0) + torch.softmax(POINTS[kv_idx], -1)[1]


def product_of_terms(score, b, h, q_idx, kv_idx):
    return (score * CAPS[h] + POINTS[kv_idx]).prod() / 8


def extrema(score, b, h, q_idx, kv_idx):
    terms = score * CAPS[h] + POINTS[kv_idx]
    return terms.amax(-1) - terms.amin() / 2 + POINTS[q_idx].max() + OFFSET[:4].min()


def stacked(score, b, h, q_idx, kv_idx):
    terms = torch.stack([score, score * 2 + POINTS[kv_idx, 0], CAPS[h, 1]])
    return (terms * terms).sum() + torch.cat([POINTS[q_idx], CAPS[h]]).mean()


def counted_matches(score, b, h, q_idx, kv_idx):
    return score + (OFFSET[:6] == kv_idx).sum() + (OFFSET[:6] > q_idx).count_nonzero() / 2


SCORES = {
    f.__name__: f
    for f in (
        *(bias_by_two_steps, bias_by_a_tensor, bias_of_a_view, captured_scale, without_odd_keys),
        *(composed, dependent_bidirectional, neighbourhood_of_quotients, floor_of_keys, of_scores),
        *(silu, tangents, of_new_zeros, hidden_by_a_function, learned_kinds, sum_of_a_row),
        *(distances_of_points, distances_of_many_numbers, products_of_rows, mixture),
        *(logsumexp_of_terms, product_of_terms, extrema, stacked, counted_matches),
    )
}

# ---- the same without vectors, for all places at once -------------------------------------------


_OFFSETS = OFFSET[:6].tolist()


def _distance(table: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    terms = ((table[q_idx, n] - table[kv_idx, n]) ** 2 for n in range(table.shape[1]))
    return torch.sqrt(sum(terms))


def _scaled(table):
    return lambda score, b, h, q, kv: (
        torch.exp(-_distance(table, q, kv) / LENGTHS_OF_HEADS[h]) * score
    )


def _products(score, b, h, q, kv):
    x, y = ([POINTS[i, n] for n in range(3)] for i in (q, kv))
    found = sum(i * j for i, j in zip(x, y))
    outer = sum(i * j for i in x for j in y)
    return score + found - found / 2 + found * h + found + outer


def _mixture(score, b, h, q, kv):
    terms = sum(torch.tanh(score * CAPS[h, n]) / CAPS[h, n] for n in range(3))
    positive = (CAPS[h, 0] > 0) & (CAPS[h, 1] > 0)
    large = (CAPS[h, 0] > 2) | (CAPS[h, 1] > 2) | (CAPS[h, 2] > 2)
    return terms + terms / 3 + positive + large


def _logsumexp(score, b, h, q, kv):
    x = [torch.exp(POINTS[kv, n]) for n in range(3)]
    return torch.log(sum(torch.exp(score * CAPS[h, n]) for n in range(3))) + x[1] / sum(x)


def _terms(score, h, kv):
    return [score * CAPS[h, n] + POINTS[kv, n] for n in range(3)]


def _product(score, b, h, q, kv):
    x, y, z = _terms(score, h, kv)
    return x * y * z / 8


def _extrema(score, b, h, q, kv):
    x, y, z = _terms(score, h, kv)
    points = [POINTS[q, n] for n in range(3)]
    largest = torch.maximum(torch.maximum(points[0], points[1]), points[2])
    least = torch.minimum(torch.minimum(x, y), z)
    return torch.maximum(torch.maximum(x, y), z) - least / 2 + largest + min(_OFFSETS[:4])


def _stacked(score, b, h, q, kv):
    second = score * 2 + POINTS[kv, 0]
    means = sum(POINTS[q, n] + CAPS[h, n] for n in range(3)) / 6
    return score * score + second * second + CAPS[h, 1] * CAPS[h, 1] + means


def _matches(score, b, h, q, kv):
    equal, larger = ([compared(x) for x in _OFFSETS] for compared in (kv.eq, q.lt))
    return score + sum(x.int() for x in equal) + sum(x.int() for x in larger) / 2


PURE = {
    "sum_of_a_row": lambda score, b, h, q, kv: score + sum(OF_BATCHES[b, n] for n in range(8)),
    "bias_by_two_steps": lambda score, b, h, q, kv: score + OF_BATCH[b, q] + WITH_FIRST[0, b, h, q],
    "bias_by_a_tensor": lambda score, b, h, q, kv: score + WITH_THIRD[b, h, 1, q] / 2,
    "distances_of_points": _scaled(POINTS),
    "distances_of_many_numbers": _scaled(MANY_POINTS),
    "products_of_rows": _products,
    "mixture": _mixture,
    "logsumexp_of_terms": _logsumexp,
    "product_of_terms": _product,
    "extrema": _extrema,
    "stacked": _stacked,
    "counted_matches": _matches,
}
