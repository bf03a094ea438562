"""torch.vmap over attention to caches: each sample is what it is alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import orchard_ops
from orchard_ops import flash_attn_with_kvcache
from orchard_ops.cache import AppendCall, CacheCall

SAMPLES, BATCH, HEADS, KV_HEADS, SLOTS = 3, 2, 4, 2, 48
DEVICES = pytest.mark.parametrize("device", ("cpu", "mps"))


def whole_call(places: str, device: str) -> dict[str, Tensor]:
    """Tensors with the samples in front: an entry for each sequence, others, or pages."""
    generator = torch.Generator().manual_seed(4)
    entries, keys = {"own": (BATCH, SLOTS), "entries": (4, SLOTS), "pages": (7, 16)}[places]

    def draw(*shape: int) -> Tensor:
        return torch.randn(SAMPLES, *shape, generator=generator)

    def integers(end: int, *shape: int) -> Tensor:
        return torch.randint(end, (SAMPLES, *shape), generator=generator, dtype=torch.int32)

    tensors = {
        "query": draw(BATCH, HEADS, 3, 16),
        "key": draw(entries, KV_HEADS, keys, 16),
        "value": draw(entries, KV_HEADS, keys, 8),
        "cache_seqlens": integers(SLOTS, BATCH),
        "cache_leftpad": integers(4, BATCH),
        "alibi_slopes": torch.rand(SAMPLES, BATCH, HEADS, generator=generator),
    }
    if places == "entries":  # one of them is not there
        tensors["cache_batch_idx"] = integers(5, BATCH)
    if places == "pages":
        tensors["block_table"] = integers(8, BATCH, SLOTS // 16)
    return {name: x.to(device) for name, x in tensors.items()}


MAPPED = {
    "all": None,
    "queries": ("query",),
    "keys": ("key",),
    "queries and lengths": ("query", "cache_seqlens"),
    "where the keys are": ("cache_batch_idx", "block_table", "cache_leftpad"),
    "caches": ("key", "value"),
    "slopes": ("alibi_slopes",),
}


def decode(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return torch.ops.orchard.flash_attn_decode(*CacheCall(**arguments, window_left=30))


@DEVICES
@pytest.mark.parametrize("axis", (0, 1, -1))
@pytest.mark.parametrize("places", ("own", "entries", "pages"))
@pytest.mark.parametrize("mapped", MAPPED)
def test_each_sample_is_what_it_is_alone(mapped: str, places: str, axis: int, device: str):
    tensors, names = whole_call(places, device), MAPPED[mapped]
    if names is not None and not tensors.keys() & set(names):
        names = ("query",)
    dims = {name: axis if names is None or name in names else None for name in tensors}
    given = {
        name: x[0] if dims[name] is None else x.movedim(0, dims[name])
        for name, x in tensors.items()
    }
    found = torch.vmap(decode, in_dims=(dims,))(given)
    samples = [
        decode({name: x[0 if dims[name] is None else n] for name, x in tensors.items()})
        for n in range(SAMPLES)
    ]
    for x, alone in zip(found, zip(*samples)):
        tolerance = 0.0 if device == "mps" else 1e-5
        torch.testing.assert_close(x, torch.stack(alone), rtol=tolerance, atol=tolerance)


@DEVICES
@pytest.mark.parametrize("q_len", (2, 20))
def test_flash_attention_names(q_len: int, device: str, fresh_stats: None):
    """Without new keys; one call for all samples, and a shared cache is not copied."""
    q = torch.randn(SAMPLES, BATCH, q_len, HEADS, 16, device=device)
    cache = torch.randn(BATCH, SLOTS, KV_HEADS, 16, device=device)

    def attend(q: Tensor) -> Tensor:
        return flash_attn_with_kvcache(q, cache, cache, cache_seqlens=30, causal=True)

    found = torch.vmap(attend)(q)
    if device == "mps":
        assert sum(orchard_ops.stats().metal.values()) == 1
        assert orchard_ops.stats().fallbacks == 0
    torch.testing.assert_close(found, torch.stack([attend(x) for x in q]), rtol=1e-5, atol=1e-5)


def test_debug_looks_at_no_number_that_is_mapped(monkeypatch: pytest.MonkeyPatch):
    """There are several of each, so that a debugged program runs on. Others are looked at."""
    monkeypatch.setenv("ORCHARD_DEBUG", "1")
    q, cache = torch.randn(SAMPLES, BATCH, 1, 2, 16), torch.randn(BATCH, 16, 2, 16)
    lengths = torch.tensor([[3, 99]] * SAMPLES).int()

    def attend(q: Tensor, lengths: Tensor) -> Tensor:
        return flash_attn_with_kvcache(q, cache, cache, cache_seqlens=lengths)

    assert torch.vmap(attend)(q, lengths).shape == q.shape
    with pytest.raises(ValueError, match="cache_seqlens must be from 0 to 16; got 99"):
        torch.vmap(attend, in_dims=(0, None))(q, lengths[0])
    of_query, packed = torch.tensor([[0, 1, 2]] * SAMPLES), q[:, :, 0]
    out = torch.vmap(lambda x, n: orchard_ops.flash_attn_varlen(x, x, x, n))(packed, of_query)
    assert out.shape == packed.shape


@DEVICES
def test_sinks_of_samples_are_refused(device: str):
    tensors = whole_call("own", device) | {"sinks": torch.randn(SAMPLES, HEADS, device=device)}
    with pytest.raises(NotImplementedError, match="vmap over sinks is not implemented"):
        torch.vmap(decode)(tensors)
    shared = tensors | {"sinks": tensors["sinks"][0]}
    dims = {name: None if name == "sinks" else 0 for name in shared}
    assert torch.vmap(decode, in_dims=(dims,))(shared)[0].shape[0] == SAMPLES


@DEVICES
def test_a_change_in_place_is_refused(device: str):
    """By its name, and nothing is written."""
    caches = torch.zeros(SAMPLES, BATCH, SLOTS, KV_HEADS, 16, device=device)
    q = torch.ones(SAMPLES, BATCH, 1, HEADS, 16, device=device)
    new = q[:, :, :, :KV_HEADS]

    def generate(q: Tensor, cache: Tensor, new: Tensor) -> Tensor:
        return flash_attn_with_kvcache(q, cache, cache, new, new, cache_seqlens=3)

    def append(cache: Tensor, new: Tensor) -> None:
        x, y = cache.transpose(1, 2), new.transpose(1, 2)
        torch.ops.orchard.flash_attn_append(*AppendCall(x, x, y, y))

    for function, arguments in ((generate, (q, caches, new)), (append, (caches, new))):
        with pytest.raises(NotImplementedError, match=r"flash_attn_append: vmap .* got 3 samples"):
            torch.vmap(function)(*arguments)
    assert not caches.any()
