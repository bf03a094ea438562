"""Calls of flex_attention, drawn and judged: functions, block masks, captured tensors and their
gradients, against a dense evaluation in float64 that asks the functions by torch.vmap.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask

import orchard_ops
from orchard_ops.flex.trace import Indexing
from orchard_ops.testing import Memory, assert_attention_close, math_attention

from .caches import memories, placed
from .examples import DTYPES, MEMORY

Tables = dict[str, Tensor]
Function = Callable[..., Tensor]


def _documents(s, b, h, q, kv, t):
    return torch.where(t["documents"][q] == t["documents"][kv], s, -float("inf"))


def _dot(s, b, h, q, kv, t):
    return s + 0.25 * torch.dot(t["of_queries"][b, h, q], t["of_keys"][b, 0, kv])


def _gated(s, b, h, q, kv, t):
    return torch.where(q >= kv, torch.nn.functional.silu(s), 0.5 * s)


SCORES: dict[str, Callable[..., Tensor]] = {
    "same": lambda s, b, h, q, kv, t: s,
    "twice": lambda s, b, h, q, kv, t: 2.0 * s,
    "softcap": lambda s, b, h, q, kv, t: 5.0 * torch.tanh(s / 5.0),
    "causal": lambda s, b, h, q, kv, t: torch.where(q >= kv, s, -float("inf")),
    "documents": _documents,
    "alibi": lambda s, b, h, q, kv, t: s - t["slopes"][h] * (q - kv).abs(),
    "slopes": lambda s, b, h, q, kv, t: s + t["slopes"][h] * (kv - q) * 0.125,
    "table": lambda s, b, h, q, kv, t: s + t["table"][h, q, kv],
    "of batches": lambda s, b, h, q, kv, t: s + t["whole"][b][h, q][kv],
    "relative": lambda s, b, h, q, kv, t: s + t["relative"][h, q - kv],
    "gain": lambda s, b, h, q, kv, t: s * t["gain"][b] + t["of_places"][kv],
    "gated": _gated,
    "squared": lambda s, b, h, q, kv, t: 0.25 * s * s,
    "dot": _dot,
}
MASKS: dict[str, Callable[..., Tensor]] = {
    "causal": lambda b, h, q, kv, t: q >= kv,
    "window": lambda b, h, q, kv, t: (q >= kv) & (q - kv < 9),
    "ascending documents": lambda b, h, q, kv, t: t["ascending"][q] == t["ascending"][kv],
    "documents": lambda b, h, q, kv, t: (t["documents"][q] == t["documents"][kv]) & (q >= kv),
    "prefix": lambda b, h, q, kv, t: (kv < t["lengths"][b]) | (q >= kv),
    "lengths": lambda b, h, q, kv, t: kv < t["lengths"][b],
    "table": lambda b, h, q, kv, t: t["seen"][b, h, q, kv],
    "by heads": lambda b, h, q, kv, t: q - kv <= 4 * (h + 1),
    "every third": lambda b, h, q, kv, t: (q + kv) % 3 == 0,
    "nothing": lambda b, h, q, kv, t: q < 0,
    "everything": lambda b, h, q, kv, t: q >= 0,
}
TRAINED = ("slopes", "table", "whole", "relative", "gain", "of_places", "of_queries", "of_keys")


@dataclass(frozen=True)
class FlexExample:
    """One call. Serialisable, so that a failing one can be kept."""

    device: str
    dtype: str
    batch: int
    num_kv_heads: int
    group: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    score: str  # of SCORES, or ""
    mask: str  # of MASKS, or "": no block mask
    lists: str  # "made" of mask_mod, or "drawn" beside it
    block: tuple[int, int]
    mask_full: tuple[bool, bool]  # which of (B, H) the lists do not broadcast over
    one_cache: bool  # keys and values of one sample for all, where there is a block mask
    tables_float: str  # the dtype of captured floats
    strided: bool  # captured tensors are views with their dimensions in another order
    trained: bool  # captured floats require grad
    scale: float | None
    use_lse: bool
    memory: tuple[Memory, ...]  # of q, k, v, dout
    seed: int

    def to_json(self) -> str:
        return json.dumps({"problem": "flex", **asdict(self)})

    @staticmethod
    def from_fields(fields: dict[str, Any]) -> FlexExample:
        fields["memory"] = memories(fields["memory"])
        for name in ("block", "mask_full"):
            fields[name] = tuple(fields[name])
        return FlexExample(**fields)


_LENGTHS = st.one_of(st.integers(1, 70), st.sampled_from((1, 2, 31, 32, 33, 64, 65, 129)))
_BLOCKS = st.sampled_from(((16, 16), (32, 32), (64, 32), (128, 128), (8, 24), (7, 5), (1, 3)))


@st.composite
def flex_examples(draw: st.DrawFn) -> FlexExample:
    head_dim = draw(st.sampled_from((16, 40, 64)))
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    return FlexExample(
        device=draw(st.sampled_from(("mps", "mps", "mps", "mps", "cpu"))),
        dtype=dtype,
        batch=draw(st.integers(1, 3)),
        num_kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        q_len=draw(_LENGTHS),
        kv_len=draw(_LENGTHS),
        head_dim=head_dim,
        value_dim=draw(st.sampled_from((head_dim, head_dim, 16, 64))),
        score=draw(st.sampled_from(("", *SCORES))),
        mask=draw(st.sampled_from(("", *MASKS))),
        lists=draw(st.sampled_from(("made", "made", "drawn"))),
        block=draw(_BLOCKS),
        mask_full=(draw(st.booleans()), draw(st.booleans())),
        one_cache=draw(st.sampled_from((False, False, False, True))),
        tables_float=draw(st.sampled_from(("float32", dtype))),
        strided=draw(st.booleans()),
        trained=draw(st.booleans()),
        scale=draw(st.one_of(st.none(), st.sampled_from((0.0, -0.3, 0.05, 1.0)))),
        use_lse=draw(st.booleans()),
        memory=tuple(draw(MEMORY) for _ in range(4)),
        seed=draw(st.integers(0, 2**31)),
    )


class _Problem:
    """An example with its numbers, on the CPU."""

    def __init__(self, example: FlexExample) -> None:
        self.example = e = example
        self.heads = e.num_kv_heads * e.group
        generator = torch.Generator().manual_seed(e.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def integers(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator)

        dtype, kv_batch = DTYPES[e.dtype], 1 if self.has_one_cache else e.batch
        self.q = draw(e.batch, self.heads, e.q_len, e.head_dim).to(dtype)
        self.k = draw(kv_batch, e.num_kv_heads, e.kv_len, e.head_dim).to(dtype)
        self.v = draw(kv_batch, e.num_kv_heads, e.kv_len, e.value_dim).to(dtype)
        self.dout = draw(e.batch, self.heads, e.q_len, e.value_dim).to(dtype)
        self.dlse = draw(e.batch, self.heads, e.q_len) if e.use_lse else None
        longest = max(e.q_len, e.kv_len)
        full = (e.batch, self.heads, e.q_len, e.kv_len)
        floats = {
            "slopes": draw(self.heads).abs(),
            "table": draw(*full[1:]),
            "whole": draw(*full),
            "relative": draw(self.heads, 2 * longest),
            "gain": draw(e.batch).exp(),
            "of_places": draw(longest),
            "of_queries": draw(e.batch, self.heads, e.q_len, 5),
            "of_keys": draw(e.batch, 1, e.kv_len, 5),
        }
        of = DTYPES[e.tables_float]
        self.tables = {name: x.to(of) for name, x in floats.items()} | {
            "documents": integers(0, 3, longest),
            "ascending": integers(0, 2, longest).cumsum(0).to(torch.int32),
            "lengths": integers(0, e.kv_len + 1, e.batch),
            "seen": integers(0, 3, *full) > 0,
        }
        batches, heads = (n if keep else 1 for n, keep in zip(full[:2], e.mask_full))
        batches = e.batch if self.has_one_cache else batches
        self.mask_sizes = batches, heads
        rows, columns = (-(-n // b) for n, b in zip(full[2:], e.block))
        self.drawn = integers(0, 3, batches, heads, rows, columns)

    @property
    def has_one_cache(self) -> bool:
        return bool(self.example.one_cache and self.example.mask)

    def function(self, kind: str, tables: Tables) -> Function | None:
        if kind == "score":
            score = SCORES.get(self.example.score)
            return score and (lambda s, b, h, q, kv: score(s, b, h, q, kv, tables))
        mask = MASKS.get(self.example.mask)
        return mask and (lambda b, h, q, kv: mask(b, h, q, kv, tables))

    def block_mask(self, tables: Tables) -> BlockMask | None:
        e = self.example
        mask_mod = self.function("mask", tables)
        if mask_mod is None:
            return None
        batches, heads = self.mask_sizes
        if e.lists == "made":
            return create_block_mask(
                mask_mod, batches, heads, e.q_len, e.kv_len, device=e.device, BLOCK_SIZE=e.block
            )
        lists = []
        for state in (1, 2):
            of_state = (self.drawn == state).int()
            lists += [of_state.sum(-1).int(), of_state.argsort(dim=-1, descending=True).int()]
        return BlockMask.from_kv_blocks(
            *(x.to(e.device) for x in lists), BLOCK_SIZE=e.block, mask_mod=mask_mod,
            seq_lengths=(e.q_len, e.kv_len),
        )  # fmt: skip

    def places(self) -> list[Tensor]:
        e = self.example
        sizes = (e.batch, self.heads, e.q_len, e.kv_len)
        return [x.flatten() for x in torch.meshgrid(*map(torch.arange, sizes), indexing="ij")]

    def seen(self) -> Tensor | None:
        """(B, Hq, L, S): the lists decide, and mask_mod in partial blocks."""
        e = self.example
        mask_mod = self.function("mask", self.tables)
        if mask_mod is None:
            return None
        sizes = (e.batch, self.heads, e.q_len, e.kv_len)
        with Indexing("cpu"):
            asked = torch.vmap(mask_mod)(*self.places()).view(sizes)
        if e.lists == "made":
            batches, heads = self.mask_sizes
            # Where the lists broadcast, they are of the first batch or head, whose blocks count.
            of_lists = asked[:batches, :heads]
            rows, columns = self.drawn.shape[2:]
            padded = torch.zeros(batches, heads, rows * e.block[0], columns * e.block[1])
            padded[:, :, : e.q_len, : e.kv_len] = of_lists
            inside = torch.zeros_like(padded)
            inside[:, :, : e.q_len, : e.kv_len] = 1
            blocks = (batches, heads, rows, e.block[0], columns, e.block[1])
            count, most = (x.view(blocks).sum((3, 5)) for x in (padded, inside))
            # A block is full where all its pairs are seen, and none lies beyond the ends.
            whole = e.block[0] * e.block[1]
            states = torch.where(
                count == 0, 0, torch.where((count == most) & (most == whole), 2, 1)
            )
        else:
            states = self.drawn
        spread = states.repeat_interleave(e.block[0], 2)[:, :, : e.q_len]
        spread = spread.repeat_interleave(e.block[1], 3)[..., : e.kv_len].expand(sizes)
        return (spread == 2) | ((spread == 1) & asked)

    def dense_score(self, tables: Tables) -> Callable[[Tensor], Tensor] | None:
        score_mod = self.function("score", tables)
        if score_mod is None:
            return None

        def scores(x: Tensor) -> Tensor:
            with Indexing("cpu"):
                return torch.vmap(score_mod)(x.flatten(), *self.places()).view(x.shape).to(x.dtype)

        return scores

    def captured_gradients(self, seen: Tensor | None) -> Tables:
        """In float64, by autograd through all of it."""
        e = self.example
        tables = {
            name: x.double().requires_grad_(name in TRAINED) if x.is_floating_point() else x
            for name, x in self.tables.items()
        }
        q, k, v = (x.double() for x in (self.q, self.k, self.v))
        k, v = (x.expand(e.batch, -1, -1, -1).repeat_interleave(e.group, 1) for x in (k, v))
        scale = e.head_dim**-0.5 if e.scale is None else e.scale
        score = self.dense_score(tables)
        x = q @ k.transpose(-1, -2) * scale
        x = x if score is None else score(x)
        if seen is not None:
            x = torch.where(seen, x, -torch.inf)
        is_empty = (x == -torch.inf).all(-1, keepdim=True)
        x = torch.where(is_empty, 0.0, x)
        weights = torch.where(is_empty, 0.0, x.softmax(-1))
        loss = ((weights @ v) * self.dout.double()).sum()
        if self.dlse is not None:
            lse = torch.where(is_empty.squeeze(-1), 0.0, x.logsumexp(-1))
            loss = loss + (lse * self.dlse.double()).sum()
        names = [n for n in TRAINED if n in tables]
        if not loss.requires_grad:
            return {}
        found = torch.autograd.grad(loss, [tables[n] for n in names], allow_unused=True)
        return {n: x for n, x in zip(names, found) if x is not None}


_GRADIENT = {"float32": 3e-4, "float16": 2e-2, "bfloat16": 8e-2}
"""How far gradients of captured tensors may be off, of the largest one."""


def check_flex(example: FlexExample) -> str:
    """Runs the call and its gradients, and applies the rule; which path it took."""
    e, problem = example, _Problem(example)
    seen = problem.seen()
    group = e.batch if problem.has_one_cache else 1
    k, v = (x.expand(group * x.shape[0], -1, -1, -1) for x in (problem.k, problem.v))
    dlse = problem.dlse
    ref, eager = (
        math_attention(
            problem.q, k, v, problem.dout, dlse, dtype=compute, scale=e.scale, attn_mask=seen,
            score_mod=problem.dense_score(
                {n: x.double() if x.is_floating_point() else x for n, x in problem.tables.items()}
                if compute == torch.float64
                else problem.tables
            ),
        )
        for compute in (torch.float64, DTYPES[e.dtype])
    )  # fmt: skip
    tables = {name: _placed_table(x, e) for name, x in problem.tables.items()}
    leaves = [
        placed(m, x, e.device).requires_grad_()
        for m, x in zip(e.memory, (problem.q, problem.k, problem.v))
    ]
    dout = placed(e.memory[3], problem.dout, e.device)
    before = orchard_ops.stats()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", orchard_ops.OrchardFallbackWarning)
        out, aux = orchard_ops.flex_attention(
            *leaves, problem.function("score", tables), problem.block_mask(tables), scale=e.scale,
            enable_gqa=True, return_aux=AuxRequest(lse=True),
        )  # fmt: skip
    outputs, grads = [out], [dout]
    if problem.dlse is not None:
        outputs, grads = [out, aux.lse], [dout, problem.dlse.to(e.device)]
    trained = {n: x for n, x in tables.items() if x.requires_grad}
    found = torch.autograd.grad(outputs, [*leaves, *trained.values()], grads, allow_unused=True)
    dq, dk, dv = found[:3]
    dk_ref, dv_ref = ref.dk, ref.dv
    if problem.has_one_cache and e.batch > 1:
        # The rule is of each sample's own keys: sums over samples are held to the reference alone.
        _near("dk", dk, dk_ref.sum(0, keepdim=True), e)
        _near("dv", dv, dv_ref.sum(0, keepdim=True), e)
        dk = dv = None
    assert_attention_close((out, aux.lse, dq, dk, dv), ref, eager)
    right = problem.captured_gradients(seen) if trained else {}
    for (name, _), x in zip(trained.items(), found[3:]):
        if x is None or name not in right:
            assert x is None or not x.any() or name in right, f"d{name}: {x}"
            assert name not in right or not right[name].any(), f"d{name} is missing"
            continue
        _near(f"d{name}", x, right[name], e)
    ran = sum(orchard_ops.stats().metal.values()) - sum(before.metal.values())
    return "metal" if ran else "reference"


def _placed_table(x: Tensor, e: FlexExample) -> Tensor:
    x = x.clone()
    if e.strided and x.dim() > 1:
        x = x.movedim(0, -1).contiguous().to(e.device).movedim(-1, 0)
    else:
        x = x.to(e.device)
    return x.requires_grad_(e.trained and x.is_floating_point())


def _near(name: str, x: Tensor, right: Tensor, e: FlexExample) -> None:
    room = _GRADIENT[max(e.dtype, e.tables_float, key=lambda n: _GRADIENT[n])]
    error = (x.detach().cpu().double() - right).abs().max().item()
    most = right.abs().max().item()
    assert error <= room * max(most, 1.0), f"{name}: max error {error} of {most}"
