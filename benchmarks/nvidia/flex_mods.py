"""The score_mods and mask_mods of prove_flex.py, for attention of any size.

Each is a function that makes the mod and the tables that it captures. The mods work on 0-dim
tensors, as users write them, and on whole blocks of scores and places alike, so that the reference
asks the very function that is lowered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import flex_trees

Function = Callable[..., Tensor]


@dataclass
class Tables:
    """What the mods of one call capture, by name; drawn on the CPU, so that all machines agree."""

    batch: int
    heads: int
    q_len: int
    kv_len: int
    device: str = "cpu"
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(5)

    def keep(self, name: str, x: Tensor) -> Tensor:
        """x on the device, with its strides, under a name that nothing else has."""
        if name in self.tensors:
            raise ValueError(f"two tables are named {name}")
        if x.is_contiguous():
            x = x.to(self.device)
        else:
            count = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride()))
            whole = x.as_strided((count,), (1,)).to(self.device)
            x = whole.as_strided(x.shape, x.stride())
        self.tensors[name] = x
        return x

    def normal(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.keep(name, torch.randn(shape, generator=self._generator).to(dtype))

    def below(self, name: str, end: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return self.keep(name, torch.randint(end, shape, generator=self._generator).to(dtype))


# ---- scores -------------------------------------------------------------------------------------


def noop(t: Tables) -> Function:
    return lambda score, b, h, q, kv: score


def causal_scores(t: Tables) -> Function:
    return lambda score, b, h, q, kv: torch.where(q >= kv, score, -float("inf"))


def windowed_scores(t: Tables) -> Function:
    def mod(score, b, h, q, kv):
        near = torch.where((q - kv).abs() <= 200, score, float("-inf"))
        return near.masked_fill(kv > q + 50, -torch.inf)

    return mod


def _slopes(t: Tables) -> Tensor:
    return t.keep("slopes", 2.0 ** -torch.arange(3.0, 3.0 + t.heads))


def alibi(t: Tables) -> Function:
    slopes = _slopes(t)
    return lambda score, b, h, q, kv: score - slopes[h] * (q - kv).abs()


def alibi_computed(t: Tables) -> Function:
    heads = t.heads
    return lambda score, b, h, q, kv: (
        score + torch.exp2(-((h + 1) * 8.0 / heads)) * (kv - q) * 0.125
    )


def softcap(t: Tables) -> Function:
    return lambda score, b, h, q, kv: 5.0 * torch.tanh(score / 5.0)


def softcap_rational(t: Tables) -> Function:
    def mod(score, b, h, q, kv):
        x = score / 9
        return 9 * x * (27 + x * x) / (27 + 9 * x * x)

    return mod


def squared(t: Tables) -> Function:
    return lambda score, b, h, q, kv: 0.25 * score * score


def sigmoids(t: Tables) -> Function:
    return lambda score, b, h, q, kv: score * torch.sigmoid(score) + torch.log1p(score * score)


def full_bias(t: Tables) -> Function:
    bias = t.normal("bias", t.batch, t.heads, t.q_len, t.kv_len, dtype=torch.float16)
    return lambda score, b, h, q, kv: score + bias[b, h, q, kv]


def bias_of_keys_and_queries(t: Tables) -> Function:
    of_keys = t.normal("of_keys", t.kv_len, dtype=torch.float16)
    of_queries = t.normal("of_queries", 2 * t.q_len, dtype=torch.bfloat16)
    every_second = t.keep("every_second", of_queries.cpu()[::2])
    return lambda score, b, h, q, kv: score + of_keys[kv] * 0.5 + every_second[q]


def relative_bias(t: Tables) -> Function:
    relative = t.normal("relative", t.heads, 257)
    return lambda score, b, h, q, kv: score + relative[h, (q - kv).clamp(-128, 128) + 128]


def relative_from_the_end(t: Tables) -> Function:
    relative = t.normal("relative", t.heads, 257)
    return lambda score, b, h, q, kv: score + relative[h, (q - kv).clamp(-128, 128)]


def bucketed_bias(t: Tables) -> Function:
    buckets = t.below("buckets", 8, 401, dtype=torch.int32)
    of_bucket = t.keep("of_bucket", torch.randn(t.heads, 8, generator=t._generator).t())
    return lambda score, b, h, q, kv: score + of_bucket[buckets[(q - kv).clamp(-200, 200) + 200], h]


def temperature(t: Tables) -> Function:
    of_batch = t.keep("of_batch", torch.linspace(0.5, 1.5, t.batch))
    return lambda score, b, h, q, kv: score / of_batch[b]


def distances(t: Tables) -> Function:
    """Of a graph, for each pair, and a number for each distance and head."""
    steps = t.below("steps", 6, t.batch, t.q_len, t.kv_len, dtype=torch.int16)
    spatial = t.normal("spatial", t.heads, 6)
    return lambda score, b, h, q, kv: score + spatial[h, steps[b, q, kv].int()]


def gated(t: Tables) -> Function:
    of_queries = t.normal("of_queries", t.q_len, dtype=torch.bfloat16)
    return lambda score, b, h, q, kv: torch.where(
        q >= kv, score * torch.sigmoid(score) + of_queries[q], 0.5 * score
    )


def hashed_noise(t: Tables) -> Function:
    def mod(score, b, h, q, kv):
        x = (q * 1000003 + kv) * 1000003 ^ (h << 7) + b
        x = (x ^ (x >> 13)) * 1274126177
        return score + (x & 1023) / 1024

    return mod


def checkerboard(t: Tables) -> Function:
    def mod(score, b, h, q, kv):
        is_odd = torch.abs(kv - q) % 2 == 1
        return torch.where(is_odd, score * 0.5, score * 2.0)

    return mod


def eight_tables(t: Tables) -> Function:
    """Of no, one, two, three and four dimensions, and of all dtypes."""
    offset = t.keep("offset", torch.tensor(0.5))
    of_heads = t.normal("of_heads", t.heads)
    of_both = t.normal("of_both", t.batch, t.heads, dtype=torch.float16)
    cube = t.normal("cube", t.batch, t.heads, 5, dtype=torch.bfloat16)
    permuted = t.keep(
        "permuted",
        torch.randn(3, 5, t.heads, t.batch, generator=t._generator).permute(3, 2, 1, 0),
    )
    small = t.below("small", 100, 7, dtype=torch.int8)
    bytes_ = t.below("bytes", 200, t.kv_len, dtype=torch.uint8)
    flags = t.below("flags", 2, 2, 3, dtype=torch.bool)

    def mod(score, b, h, q, kv):
        floats = (
            of_heads[h] + of_both[b, -1 - h] + cube[b, h, q % 5] + permuted[b, h, q % 5, kv % 3]
        )
        integers = small[kv % 7] / 64 + bytes_[kv] / 256
        return (
            score + offset + floats * 0.25 + integers + torch.where(flags[kv % 2, q % 3], 0.5, 0.0)
        )

    return mod


def distances_of_points(t: Tables) -> Function:
    """A sum over a vector of each pair."""
    points = t.normal("points", max(t.q_len, t.kv_len), 3)
    return lambda score, b, h, q, kv: score - 0.125 * ((points[q] - points[kv]) ** 2).sum(-1)


def without_derivative(t: Tables) -> Function:
    return lambda score, b, h, q, kv: score.detach() * 2 + 1


def tree(number: int) -> Callable[[Tables], Function]:
    def make(t: Tables) -> Function:
        return flex_trees.score(number, t)

    make.__name__ = f"tree_{number}"
    return make


TREES = 6
SCORES: dict[str, Callable[[Tables], Function]] = {
    f.__name__: f
    for f in (
        *(noop, causal_scores, windowed_scores, alibi, alibi_computed, softcap, softcap_rational),
        *(squared, sigmoids, full_bias, bias_of_keys_and_queries, relative_bias),
        *(relative_from_the_end, bucketed_bias, temperature, distances, gated, hashed_noise),
        *(
            checkerboard,
            eight_tables,
            distances_of_points,
            without_derivative,
            *map(tree, range(TREES)),
        ),
    )
}


# ---- masks --------------------------------------------------------------------------------------


def causal(t: Tables) -> Function:
    return lambda b, h, q, kv: q >= kv


def window(t: Tables) -> Function:
    return lambda b, h, q, kv: (q >= kv) & (q - kv <= 300)


def dilated(t: Tables) -> Function:
    def mod(b, h, q, kv):
        distance = torch.abs(q - kv)
        return (distance <= 400) & (distance % 3 == 0) & ((q - kv) % 2 == 0)

    return mod


def prefix_lm(t: Tables) -> Function:
    prefix = t.keep("prefix", (torch.arange(t.batch) * 101 + 67).to(torch.int16))
    return lambda b, h, q, kv: (kv < prefix[b]) | (q >= kv)


def _document_numbers(t: Tables) -> Tensor:
    """Documents of lengths that are no multiples of a block."""
    length = max(t.q_len, t.kv_len)
    ends = torch.tensor([n * length // 1000 for n in (37, 41, 200, 333, 610, 777, 1000)])
    return torch.searchsorted(ends, torch.arange(length), right=True).clamp(max=6)


def documents(t: Tables) -> Function:
    document = t.keep("document", _document_numbers(t))
    return lambda b, h, q, kv: document[q] == document[kv]


def causal_documents(t: Tables) -> Function:
    """Places count from a document's begin, by a table of begins."""
    numbers = _document_numbers(t)
    begins = t.keep("begins", torch.searchsorted(numbers, torch.arange(7)))
    document = t.keep("document", numbers.to(torch.int32))

    def mod(b, h, q, kv):
        places = [x - begins[document[x]] for x in (q, kv)]
        return (document[q] == document[kv]) & (places[0] >= places[1])

    return mod


def neighbourhood(t: Tables) -> Function:
    """Of a picture of rows of 32: windows of 7 x 7 that stay within it."""
    last = max(t.q_len, t.kv_len) // 32

    def mod(b, h, q, kv):
        y, x = (q // 32).clamp(3, last - 3), (q % 32).clamp(3, 28)
        return ((y - kv // 32).abs() <= 3) & ((x - kv % 32).abs() <= 3)

    return mod


def _every_other_bit(x: Tensor) -> Tensor:
    x = x & 0x55555555
    for shift, kept in ((1, 0x33333333), (2, 0x0F0F0F0F), (4, 0x00FF00FF), (8, 0x0000FFFF)):
        x = (x | (x >> shift)) & kept
    return x


def neighbourhood_on_a_curve(t: Tables) -> Function:
    """Pictures in Morton's order: the bits of x and y in turn."""

    def mod(b, h, q, kv):
        near = [(_every_other_bit(q >> n) - _every_other_bit(kv >> n)).abs() <= 5 for n in (0, 1)]
        return near[0] & near[1]

    return mod


def global_tokens(t: Tables) -> Function:
    return lambda b, h, q, kv: (kv < 5) | (q < 3) | ((q - kv).abs() < 60)


def jagged(t: Tables) -> Function:
    ends = torch.linspace(0.3, 0.9, t.batch) * min(t.q_len, t.kv_len)
    lengths = t.keep("lengths", ends.to(torch.int32))
    return lambda b, h, q, kv: (q < lengths[b]) & (kv < lengths[b])


def hidden_keys(t: Tables) -> Function:
    hidden = t.below("hidden", 2, t.batch, t.kv_len, dtype=torch.bool)
    flags = t.below("key_flags", 3, t.kv_len, dtype=torch.uint8)
    return lambda b, h, q, kv: ~hidden[b, kv] & (flags[kv] != 0)


def pairs(t: Tables) -> Function:
    table = t.below("pairs", 2, t.q_len, t.kv_len, dtype=torch.bool)
    return lambda b, h, q, kv: table[q, kv]


def by_heads(t: Tables) -> Function:
    return lambda b, h, q, kv: (
        torch.logical_or(h == 0, (q >> (h + 5)) == (kv >> (h + 5))) ^ (b == 1)
    )


def block_diffusion(t: Tables) -> Function:
    """The first half of the tokens is noised, the other half the same ones clean."""
    half = t.q_len // 2

    def mod(b, h, q, kv):
        q_noised, kv_noised = q < half, kv < half
        q_block, kv_block = q % half // 48, kv % half // 48
        own = (q_noised == kv_noised) & (kv_block == q_block)
        before = q_noised & ~kv_noised & (kv_block < q_block)
        return own | before | (~q_noised & ~kv_noised & (kv_block <= q_block))

    return mod


def shared_tags(t: Tables) -> Function:
    """Whether any of some tags is a query's and a key's."""
    tags = t.below("tags", 2, max(t.q_len, t.kv_len), 3, dtype=torch.bool)
    return lambda b, h, q, kv: (tags[q] & tags[kv]).any(-1)


def condition(number: int) -> Callable[[Tables], Function]:
    def make(t: Tables) -> Function:
        return flex_trees.mask(number, t)

    make.__name__ = f"condition_{number}"
    return make


CONDITIONS = 4
MASKS: dict[str, Callable[[Tables], Function]] = {
    f.__name__: f
    for f in (
        *(causal, window, dilated, prefix_lm, documents, causal_documents, neighbourhood),
        *(neighbourhood_on_a_curve, global_tokens, jagged, hidden_keys, pairs, by_heads),
        *(block_diffusion, shared_tags, *map(condition, range(CONDITIONS))),
    )
}
