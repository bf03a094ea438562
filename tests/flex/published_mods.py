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
STARTS = torch.tensor([0, 5, 13])
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


SCORES = {
    f.__name__: f
    for f in (
        *(activation_in_place_of_softmax, rectified_in_place_of_softmax, graph_distances),
        *(edges_of_paths, sandwich, relative, relative_and_inverse_causal, checkerboard, squared),
        *(trigonometric, of_tokens_batches_and_heads, within_sequences, fully_hidden_tokens),
        softcap_with_own_rules,
    )
}


# ---- masks --------------------------------------------------------------------------------------

INTERVALS = torch.tensor([[0, 7], [1, 7], [7, 12]], dtype=torch.int32)
IMAGE = torch.arange(KV_LEN) // 6
IS_GLOBAL = torch.zeros(KV_LEN, dtype=torch.bool)
IS_GLOBAL[::8] = True
ANCESTORS = torch.eye(Q_LEN).bool() | _integers(0, 2, Q_LEN, Q_LEN).bool().tril()
TILES = _integers(0, 2, BATCH, HEADS, 4, 5).bool()
SIZES_OF_TILES = torch.tensor([4, 3, 2, 4, 1])
SHARED = torch.tensor([0, 0, 1])


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


def padded_tiles(b, h, q_idx, kv_idx):
    return kv_idx % 4 < SIZES_OF_TILES[kv_idx // 4]


def late_start_of_the_first_row(b, h, q_idx, kv_idx):
    return (q_idx != 0) | (kv_idx >= 8)


MASKS = {
    "global_and_near": global_and_near,
    "causal_global_and_near": causal_global_and_near,
    **{
        f.__name__: f
        for f in (
            *(batches_in_a_row, block_diffusion, image_intervals, tree_behind_prefix),
            *(drafts_behind_prefix, tiled_neighbourhood, neighbourhood_on_a_curve),
            *(shared_prefixes, sliding_tiles, within_frames, across_frames, chosen_tiles),
            *(padded_tiles, late_start_of_the_first_row),
        )
    },
}
