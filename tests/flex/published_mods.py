"""score_mods and mask_mods of the same meaning as the ones of papers, and of PyTorch's own
collections of FlexAttention mods, of an attention of `flex_mods.SHAPE`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from flex_mods import BATCH, DOCUMENTS, HEADS, KV_LEN, OFFSETS, Q_LEN
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, or_masks

_generator = torch.Generator().manual_seed(11)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator)


def _integers(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=_generator)


# ---- scores -------------------------------------------------------------------------------------

DISTANCES = _integers(0, 6, BATCH, Q_LEN, KV_LEN).to(torch.int32)
SPATIAL = _random(HEADS, 6)
EDGE_TYPES = _integers(0, 4, BATCH, Q_LEN, KV_LEN, 2).to(torch.int32)
EDGES = _random(HEADS, 2, 4)
SINUSOIDS = _random(Q_LEN + KV_LEN)
RATIOS = HEADS / (8.0 * torch.arange(1, HEADS + 1))
OF_TOKENS, OF_BATCHES, OF_HEADS = _random(Q_LEN), _random(BATCH), _random(HEADS)
TURNED_QUERIES, TURNED_KEYS = _random(BATCH, HEADS, Q_LEN, 6), _random(BATCH, 1, KV_LEN, 6)
STARTS = torch.tensor([0, 5, 13])
OF_PAGES = torch.tensor([[2, -1, 0, 3, 1], [0, 1, 4, -1, 2]])
SEQUENCE = torch.tensor([0] * 5 + [1] * 12)


def activation_in_place_of_softmax(score, b, h, q_idx, kv_idx):
    """exp() of it is an activation and a number, which is taken off the result."""
    return torch.log(F.gelu(score) + 1.0)


def rectified_in_place_of_softmax(score, b, h, q_idx, kv_idx):
    return torch.log(torch.relu(score) + 0.5)


def graph_distances(score, b, h, q_idx, kv_idx):
    return score + SPATIAL[h, DISTANCES[b, q_idx, kv_idx]]


_OF_STEPS = [EDGES[:, n] for n in range(2)]


def edges_of_paths(score, b, h, q_idx, kv_idx):
    """The mean over a path's edges, of which there are `DISTANCES`."""
    count = DISTANCES[b, q_idx, kv_idx]
    total = 0.0
    for step, table in enumerate(_OF_STEPS):
        of_edge = table[h, EDGE_TYPES[b, q_idx, kv_idx, step]]
        total = total + torch.where(step < count, of_edge, 0.0)
    return score + total / count.clamp(min=1)


def sandwich(score, b, h, q_idx, kv_idx):
    return score + SINUSOIDS[q_idx - kv_idx + KV_LEN - 1] * RATIOS[h]


def relative(score, b, h, q_idx, kv_idx):
    return score + (q_idx - kv_idx)


def relative_and_inverse_causal(score, b, h, q_idx, kv_idx):
    return torch.where(kv_idx >= q_idx, score + (q_idx - kv_idx), -float("inf"))


def checkerboard(score, b, h, q_idx, kv_idx):
    is_odd = torch.abs(kv_idx - q_idx) % 2 == 1
    halved = torch.where(is_odd, score * 0.5, score)
    return torch.where(~is_odd, halved * 2.0, halved)


def squared(score, b, h, q_idx, kv_idx):
    return score * score


def trigonometric(score, b, h, q_idx, kv_idx):
    return torch.sin(torch.cos(score)) + torch.log1p(score.abs())


def of_tokens_batches_and_heads(score, b, h, q_idx, kv_idx):
    return (score + OF_TOKENS[q_idx] + OF_BATCHES[b]) * OF_HEADS[h]


def within_sequences(score, b, h, q_idx, kv_idx):
    """A mod of nested tensors: places are those within a sequence."""
    q_place, kv_place = (x - STARTS[SEQUENCE[x]] for x in (q_idx, kv_idx))
    is_same = SEQUENCE[q_idx] == SEQUENCE[kv_idx]
    return torch.where(is_same, score * 2 + (q_place - kv_place), float("-inf"))


def fully_hidden_tokens(score, b, h, q_idx, kv_idx):
    return torch.where(q_idx < 3, torch.full_like(score, -math.inf), score)


class _CheaperTanh(torch.autograd.Function):
    """A tanh with rules of its own, as one that calls an instruction of the device has."""

    @staticmethod
    def forward(x):
        return torch.tanh(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, gradient):
        (result,) = ctx.saved_tensors
        return gradient * (1 - result * result)

    @staticmethod
    def vmap(info, in_dims, x):
        return torch.tanh(x), 0


def softcap_with_own_rules(score, b, h, q_idx, kv_idx):
    return 3 * _CheaperTanh.apply(score / 3)


torch.library.define("approx::tanh", "(Tensor inp) -> Tensor")
torch.library.impl("approx::tanh", "CompositeExplicitAutograd", torch.tanh)
torch.library.register_fake("approx::tanh", torch.empty_like)


class _ApproximateTanh(_CheaperTanh):
    """One that calls an operation of another library."""

    @staticmethod
    def forward(x):
        return torch.ops.approx.tanh(x)


def softcap_of_another_library(score, b, h, q_idx, kv_idx):
    return 3 * _ApproximateTanh.apply(score / 3)


def decoupled_positions(score, b, h, q_idx, kv_idx):
    """The product of the parts of queries and keys that are turned by their places."""
    return score + 0.5 * torch.dot(TURNED_QUERIES[b, h, q_idx], TURNED_KEYS[b, h // HEADS, kv_idx])


def boost_behind_window(score, b, h, q_idx, kv_idx):
    distance = torch.abs(q_idx - kv_idx)
    return torch.where(distance <= 4, score - 1.0, score + distance)


def of_heads(score, b, h, q_idx, kv_idx):
    return score + 2 * h


def paged_scores(score, b, h, q_idx, kv_idx):
    """A mod of logical places, of keys in pages: those of no page are hidden."""
    page, within = kv_idx // 4, kv_idx % 4
    logical = OF_PAGES[b, page]
    moved = relative(score, b, h, q_idx, logical * 4 + within)
    return torch.where(logical >= 0, moved, float("-inf"))


SCORES = {
    f.__name__: f
    for f in (
        *(activation_in_place_of_softmax, rectified_in_place_of_softmax, graph_distances),
        *(edges_of_paths, sandwich, relative, relative_and_inverse_causal, checkerboard, squared),
        *(trigonometric, of_tokens_batches_and_heads, within_sequences, fully_hidden_tokens),
        *(softcap_with_own_rules, softcap_of_another_library, decoupled_positions),
        *(boost_behind_window, of_heads, paged_scores),
    )
}


def _positions_by_terms(score, b, h, q_idx, kv_idx):
    terms = (TURNED_QUERIES[b, h, q_idx, n] * TURNED_KEYS[b, 0, kv_idx, n] for n in range(6))
    return score + 0.5 * sum(terms)


PURE = {
    "decoupled_positions": _positions_by_terms,
    "softcap_of_another_library": softcap_with_own_rules,
}
"""The same without vectors, for all places at once, and in float64."""


# ---- masks --------------------------------------------------------------------------------------

INTERVALS = torch.tensor([[0, 7], [1, 7], [7, 12]], dtype=torch.int32)
IMAGE = torch.arange(KV_LEN) // 6
IS_GLOBAL = torch.zeros(KV_LEN, dtype=torch.bool)
IS_GLOBAL[::8] = True
ANCESTORS = torch.eye(Q_LEN).bool() | _integers(0, 2, Q_LEN, Q_LEN).bool().tril()
TILES = _integers(0, 2, BATCH, HEADS, 4, 5).bool()
SIZES_OF_TILES = torch.tensor([4, 3, 2, 4, 1])
SHARED = torch.tensor([0, 0, 1])
CHOSEN = _integers(0, 5, BATCH, HEADS, 4, 2)
OFFSETS_OF_BATCHES = torch.tensor([0, 4], dtype=torch.int32)


def _causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def batches_in_a_row(b, h, q_idx, kv_idx):
    is_same = q_idx // 5 == kv_idx // 5
    return is_same & _causal(b, h, q_idx % 5, kv_idx % 5)


def block_diffusion(b, h, q_idx, kv_idx):
    """The first 8 tokens are noised, those behind them are the same ones clean."""
    q_is_noised, kv_is_noised = q_idx < 8, kv_idx < 8
    q_block, kv_block = q_idx % 8 // 3, kv_idx % 8 // 3
    own = (q_is_noised == kv_is_noised) & (kv_block == q_block)
    before = q_is_noised & ~kv_is_noised & (kv_block < q_block)
    return own | before | (~q_is_noised & ~kv_is_noised & (kv_block <= q_block))


def image_intervals(b, h, q_idx, kv_idx):
    first, end = INTERVALS[IMAGE[kv_idx]][0], INTERVALS[IMAGE[kv_idx]][1]
    return (first <= q_idx) & (q_idx < end)


global_and_near = or_masks(
    lambda b, h, q_idx, kv_idx: IS_GLOBAL[kv_idx] | IS_GLOBAL[q_idx],
    lambda b, h, q_idx, kv_idx: abs(kv_idx - q_idx) <= 2,
)
causal_global_and_near = and_masks(_causal, global_and_near)


def tree_behind_prefix(b, h, q_idx, kv_idx):
    node = (kv_idx - 3).clamp(min=0, max=Q_LEN - 1)
    is_node = (kv_idx >= 3) & (kv_idx < 3 + Q_LEN)
    return (kv_idx < 3) | (is_node & ANCESTORS[q_idx, node])


def drafts_behind_prefix(b, h, q_idx, kv_idx):
    place = kv_idx - 4
    is_own = (q_idx // 4 == place // 4) & (place % 4 <= q_idx % 4)
    return (kv_idx < 4) | ((kv_idx >= 4) & is_own)


def _tiled_place(x):
    tile, within = x // 4, x % 4
    return tile % 2 * 2 + within % 2, tile // 2 * 2 + within // 2


def tiled_neighbourhood(b, h, q_idx, kv_idx):
    (q_x, q_y), (kv_x, kv_y) = _tiled_place(q_idx), _tiled_place(kv_idx)
    x, y = q_x.clamp(1, 2), q_y.clamp(1, 3)
    return ((x - kv_x).abs() <= 1) & ((y - kv_y).abs() <= 1)


def _every_other_bit(x):
    x = x & 0x55555555
    for shift, kept in ((1, 0x33333333), (2, 0x0F0F0F0F), (4, 0x00FF00FF), (8, 0x0000FFFF)):
        x = (x | (x >> shift)) & kept
    return x


def neighbourhood_on_a_curve(b, h, q_idx, kv_idx):
    """Pictures in Morton's order: the bits of x and y in turn."""
    near = [
        abs(_every_other_bit(q_idx >> n).clamp(1, 2) - _every_other_bit(kv_idx >> n)) <= 1
        for n in (0, 1)
    ]
    return near[0] & near[1]


def shared_prefixes(b, h, q_idx, kv_idx):
    """Documents of which some go on from an earlier one, which they see too."""
    starts, of_query = OFFSETS, DOCUMENTS[q_idx]
    other = SHARED[of_query]
    own = (kv_idx >= starts[of_query]) & (kv_idx <= q_idx)
    earlier = (kv_idx >= starts[other]) & (kv_idx < starts[other + 1])
    return own | (earlier & (other != of_query))


def sliding_tiles(b, h, q_idx, kv_idx):
    """Windows of tiles of 2, with 3 tokens of text behind the picture."""
    q_tile, kv_tile = q_idx // 2, kv_idx // 2
    row, column = (q_tile // 3).clamp(1, 1), (q_tile % 3).clamp(1, 2)
    near = (kv_tile // 3 >= row - 1) & (kv_tile // 3 <= row)
    near = near & (kv_tile % 3 >= column - 1) & (kv_tile % 3 <= column)
    q_is_picture, kv_is_picture = q_idx < 12, kv_idx < 12
    is_text = ~kv_is_picture & (kv_idx < 15)
    return (q_is_picture & (is_text | (kv_is_picture & near))) | (~q_is_picture & (kv_idx < 15))


def within_frames(b, h, q_idx, kv_idx):
    width = math.floor(2 * 3 / 4) * 4
    return (q_idx < 2) | (kv_idx < 2 + 3) | (abs(q_idx - kv_idx) < width)


def across_frames(b, h, q_idx, kv_idx):
    q_token, kv_token = (q_idx - 2) % 5, (kv_idx - 2) % 5
    return (kv_idx < 2) | (q_idx < 2) | (abs(q_token - kv_token) < 2)


def chosen_tiles(b, h, q_idx, kv_idx):
    tile = kv_idx.clamp(max=16) // 4
    return TILES[b, h, q_idx // 4, tile] & (kv_idx % 4 < SIZES_OF_TILES[tile])


def listed_tiles(b, h, q_idx, kv_idx):
    chosen = CHOSEN[b, h, q_idx // 4]
    is_chosen = (chosen == (kv_idx // 4).unsqueeze(-1)).any(dim=-1)
    return is_chosen & (kv_idx % 4 < SIZES_OF_TILES[kv_idx // 4])


def _of_documents(mask_mod):
    def within(b, h, q_idx, kv_idx):
        is_same = DOCUMENTS[q_idx] == DOCUMENTS[kv_idx]
        q_place, kv_place = (x - OFFSETS[DOCUMENTS[x]] for x in (q_idx, kv_idx))
        return is_same & mask_mod(b, h, q_place, kv_place)

    return within


causal_within_documents = _of_documents(_causal)


def causal_from_the_documents_start(b, h, q_idx, kv_idx):
    return (kv_idx >= OFFSETS[DOCUMENTS[q_idx]]) & _causal(b, h, q_idx, kv_idx)


def paged_mask(b, h, q_idx, kv_idx):
    logical = OF_PAGES[b, kv_idx // 4]
    inner = _causal(b, h, q_idx, logical * 4 + kv_idx % 4)
    return torch.where(logical >= 0, inner, False)


def causal_of_shards(b, h, q_idx, kv_idx, _q_start=4, _kv_start=2):
    return q_idx + _q_start >= kv_idx + _kv_start


def causal_by_batches(b, h, q_idx, kv_idx):
    return q_idx + OFFSETS_OF_BATCHES[b] >= kv_idx


def sliding_tiles_of_films(b, h, q_idx, kv_idx):
    """3 frames of 2 x 2 tiles of 1 token: windows of 2 frames, 1 row and 2 columns."""
    (q_t, q_y, q_x), (kv_t, kv_y, kv_x) = ((x // 4, x % 4 // 2, x % 4 % 2) for x in (q_idx, kv_idx))
    t, y, x = q_t.clamp(1, 2), q_y.clamp(0, 1), q_x.clamp(1, 1)
    near = (kv_t >= t - 1) & (kv_t <= t) & (kv_y >= y) & (kv_y <= y)
    near = near & (kv_x >= x - 1) & (kv_x <= x)
    both = (q_idx < 12) & (kv_idx < 12)
    to_text = (q_idx < 12) & (kv_idx >= 12) & (kv_idx < 15)
    return (both & near) | to_text | ((q_idx >= 12) & (kv_idx < 15))


def padded_tiles(b, h, q_idx, kv_idx):
    return kv_idx % 4 < SIZES_OF_TILES[kv_idx // 4]


def late_start_of_the_first_row(b, h, q_idx, kv_idx):
    return (q_idx != 0) | (kv_idx >= 8)


MASKS = {
    "global_and_near": global_and_near,
    "causal_global_and_near": causal_global_and_near,
    "causal_within_documents": causal_within_documents,
    **{
        f.__name__: f
        for f in (
            *(batches_in_a_row, block_diffusion, image_intervals, tree_behind_prefix),
            *(drafts_behind_prefix, tiled_neighbourhood, neighbourhood_on_a_curve),
            *(shared_prefixes, sliding_tiles, within_frames, across_frames, chosen_tiles),
            *(padded_tiles, late_start_of_the_first_row, listed_tiles, paged_mask),
            *(causal_from_the_documents_start, causal_of_shards, causal_by_batches),
            sliding_tiles_of_films,
        )
    },
}
