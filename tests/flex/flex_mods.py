"""score_mods and mask_mods of the kinds that people write, of an attention of SHAPE."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BATCH, HEADS, Q_LEN, KV_LEN = 2, 3, 13, 17
SHAPE = (BATCH, HEADS, Q_LEN, KV_LEN)
_generator = torch.Generator().manual_seed(7)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator)


def _integers(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=_generator)


SLOPES = torch.tensor([0.5, 0.25, 0.125])
BIAS = _random(BATCH, HEADS, Q_LEN, KV_LEN)
OF_KEYS = _random(KV_LEN).half()
OF_QUERIES = _random(Q_LEN).bfloat16()
RELATIVE = _random(HEADS, 33)
BUCKETS = _integers(0, 8, 40).to(torch.int32)
BUCKET_BIAS = _random(HEADS, 8).t()  # not contiguous
DOCUMENTS = torch.tensor([0] * 4 + [1] * 5 + [2] * 8)
OFFSETS = torch.tensor([0, 4, 9, 17])
LENGTHS = torch.tensor([11, 17], dtype=torch.int32)
PREFIX = torch.tensor([3, 6], dtype=torch.int16)
HIDDEN_KEYS = _integers(0, 2, BATCH, KV_LEN).bool()
FLAGS = _integers(0, 2, KV_LEN).to(torch.uint8)
PAGES = torch.tensor([[3, 0, 4, 1, 2, -1], [1, 2, 0, 5, 3, 4]], dtype=torch.int32)
LOGICAL = _random(6 * 4)
OFFSET = torch.tensor(4)
TEMPERATURE = torch.tensor([1.5, 0.5])
IMAGE_OF_KEY = torch.tensor([-1, 0, 0, 0, -1, 1, 1, -1, 2, 2, 2, -1, -1, 3, 3, 3, -1])
LAST_IMAGE = torch.tensor([-1, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3])


# ---- scores -------------------------------------------------------------------------------------


def nothing(score, b, h, q_idx, kv_idx):
    return score


def causal_scores(score, b, h, q_idx, kv_idx):
    return torch.where(q_idx >= kv_idx, score, -float("inf"))


def windowed_scores(score, b, h, q_idx, kv_idx):
    near = torch.where((q_idx - kv_idx).abs() <= 4, score, float("-inf"))
    return near.masked_fill(kv_idx > q_idx, -torch.inf)


def alibi(score, b, h, q_idx, kv_idx):
    return score - SLOPES[h] * (q_idx - kv_idx).abs()


def alibi_computed(score, b, h, q_idx, kv_idx):
    slope = torch.exp2(-((h + 1) * 8.0 / HEADS))
    return score + slope * (kv_idx - q_idx)


def softcap(score, b, h, q_idx, kv_idx):
    return 5.0 * torch.tanh(score / 5.0)


def softcap_by_exponentials(score, b, h, q_idx, kv_idx):
    x = torch.exp(2 * score / 5.0)
    return 5.0 * (x - 1) / (x + 1)


def softcap_rational(score, b, h, q_idx, kv_idx):
    x = score / 5
    return 5 * (x * (27 + x * x) / (27 + 9 * x * x)).clamp(-1, 1)


def softcap_in_place(score, b, h, q_idx, kv_idx):
    score /= 5
    score += 0.125
    return score.tanh_().mul_(5)


def full_bias(score, b, h, q_idx, kv_idx):
    return score + BIAS[b, h, q_idx, kv_idx]


def bias_by_steps(score, b, h, q_idx, kv_idx):
    return score + BIAS[b][h, q_idx][kv_idx] - BIAS[-1, :, 2][h][kv_idx] + BIAS[0, 1, ..., 3][q_idx]


def bias_of_keys(score, b, h, q_idx, kv_idx):
    return score + OF_KEYS[kv_idx] * 0.5 + OF_QUERIES[q_idx]


def relative_bias(score, b, h, q_idx, kv_idx):
    return score + RELATIVE[h, q_idx - kv_idx + 16]


def relative_bias_from_the_end(score, b, h, q_idx, kv_idx):
    return score + RELATIVE[h, q_idx - kv_idx]


def bucketed_bias(score, b, h, q_idx, kv_idx):
    return score + BUCKET_BIAS[BUCKETS[(q_idx - kv_idx).clamp(-20, 19) + 20], h]


def per_batch_temperature(score, b, h, q_idx, kv_idx):
    return score / TEMPERATURE[b]


def doubled_table(score, b, h, q_idx, kv_idx):
    return score + (RELATIVE * 2).exp()[h, kv_idx - 3] + RELATIVE[:, 1:].transpose(0, 1)[q_idx, h]


def reshaped_table(score, b, h, q_idx, kv_idx):
    return score + BIAS.view(BATCH, HEADS, -1)[b, h, q_idx * KV_LEN + kv_idx] + SLOPES[None, h][0]


def counted(score, b, h, q_idx, kv_idx):
    steps = torch.arange(2, 40, 2)
    return score + steps[kv_idx] * 0.25 + torch.tensor([1.0, -2.0, 4.0])[h]


def gated(score, b, h, q_idx, kv_idx):
    return torch.where(
        q_idx >= kv_idx, score * torch.sigmoid(score) + OF_QUERIES[q_idx], 0.5 * score
    )


def hashed_noise(score, b, h, q_idx, kv_idx):
    x = (q_idx * 1000003 + kv_idx) * 1000003 ^ (h << 7) + b
    x = (x ^ (x >> 13)) * 1274126177
    return score + (x & 1023) / 1024


def in_half(score, b, h, q_idx, kv_idx):
    return score + (OF_KEYS[kv_idx] * OF_KEYS[kv_idx] + OF_KEYS[kv_idx] / 3) * 2


def without_derivative(score, b, h, q_idx, kv_idx):
    return score.detach() * 2 + 1


def straight_through(score, b, h, q_idx, kv_idx):
    return _Rounded.apply(score)


class _Rounded(torch.autograd.Function):
    """A backward of its own: that of no rounding."""

    generate_vmap_rule = True

    @staticmethod
    def forward(score):
        return torch.round(score)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient


SCORES = {
    f.__name__: f
    for f in (
        *(nothing, causal_scores, windowed_scores, alibi, alibi_computed, softcap),
        *(softcap_by_exponentials, softcap_rational, softcap_in_place, full_bias, bias_by_steps),
        *(bias_of_keys, relative_bias, relative_bias_from_the_end, bucketed_bias),
        *(per_batch_temperature, doubled_table, reshaped_table, counted),
        *(gated, hashed_noise, in_half, without_derivative, straight_through),
    )
}


def _logarithmic_bucket(q_idx, kv_idx):
    distance = (q_idx - kv_idx).abs()
    far = 2 + (torch.log(distance.clamp(min=1).float() / 2) / 3.0 * 6).to(torch.int64)
    return torch.where(distance < 2, distance, torch.minimum(far, torch.full_like(far, 7)))


def logarithmic_buckets(score, b, h, q_idx, kv_idx):
    return score + F.embedding(_logarithmic_bucket(q_idx, kv_idx), BUCKET_BIAS)[h]


SCORES["logarithmic_buckets"] = logarithmic_buckets
PURE = {
    # The same with whole indices, and without changes in place: as a graph of all places at once.
    "softcap_in_place": lambda score, *_: torch.tanh(score / 5 + 0.125) * 5,
    "bias_by_steps": lambda score, b, h, q, kv: (
        score + BIAS[b, h, q, kv] - BIAS[-1, h, 2, kv] + BIAS[0, 1, q, 3]
    ),
    "logarithmic_buckets": lambda score, b, h, q, kv: (
        score + BUCKET_BIAS[_logarithmic_bucket(q, kv), h]
    ),
}

# ---- masks --------------------------------------------------------------------------------------


def everything(b, h, q_idx, kv_idx):
    return q_idx.new_ones((), dtype=torch.bool)


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def sliding_window(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & (q_idx - kv_idx <= 4)


def dilated_window(b, h, q_idx, kv_idx):
    distance = torch.abs(q_idx - kv_idx)
    return (distance <= 6) & ((distance % 3) == 0) & ((q_idx - kv_idx) % 2 == 0)


def prefix_lm(b, h, q_idx, kv_idx):
    return (kv_idx < PREFIX[b]) | (q_idx >= kv_idx)


def documents(b, h, q_idx, kv_idx):
    return DOCUMENTS[q_idx] == DOCUMENTS[kv_idx]


def causal_documents_by_offsets(b, h, q_idx, kv_idx):
    document = DOCUMENTS[q_idx]
    place_of_q = q_idx - OFFSETS[document]
    place_of_kv = kv_idx - OFFSETS[DOCUMENTS[kv_idx]]
    return (document == DOCUMENTS[kv_idx]) & (place_of_q >= place_of_kv)


def neighbourhood(b, h, q_idx, kv_idx):
    """Of a picture of rows of 4: windows that stay within it."""
    q_y, q_x = q_idx // 4, q_idx % 4
    kv_y, kv_x = kv_idx // 4, kv_idx % 4
    y, x = q_y.clamp(1, 2), q_x.clamp(1, 2)
    return ((y - kv_y).abs() <= 1) & ((x - kv_x).abs() <= 1)


def global_tokens(b, h, q_idx, kv_idx):
    return (kv_idx < 2) | (q_idx < 1) | ((q_idx - kv_idx).abs() < 3)


def jagged(b, h, q_idx, kv_idx):
    return (q_idx < LENGTHS[b]) & (kv_idx < LENGTHS[b])


def hidden_keys(b, h, q_idx, kv_idx):
    return ~HIDDEN_KEYS[b, kv_idx] & (FLAGS[kv_idx] != 0)


def paged(b, h, q_idx, kv_idx):
    page = PAGES[b, kv_idx // 4]
    logical = page * 4 + kv_idx % 4
    return torch.where(page >= 0, q_idx + 4 >= logical, False)


def shifted_causal(b, h, q_idx, kv_idx):
    return q_idx + OFFSET >= kv_idx


def cross_modal(b, h, q_idx, kv_idx):
    image = IMAGE_OF_KEY[kv_idx]
    return (image >= 0) & (image == LAST_IMAGE[q_idx])


def blocks_of_heads(b, h, q_idx, kv_idx):
    return torch.logical_or(h == 0, (q_idx >> h) == (kv_idx >> h)) ^ (b == 1)


MASKS = {
    f.__name__: f
    for f in (
        *(everything, causal, sliding_window, dilated_window, prefix_lm, documents),
        *(causal_documents_by_offsets, neighbourhood, global_tokens, jagged, hidden_keys, paged),
        *(shifted_causal, cross_modal, blocks_of_heads),
    )
}
