"""Plans of the ops for caches are remembered: never mistaken, and the same for every token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cached_cases import Cached, decode, on
from counted import Counted

import orchard_ops
from orchard_ops.cache import AppendCall, CacheCall
from orchard_ops.explain import explain_cache

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
PLAIN = Cached((130, 77), starts=(3, 0), heads=(8, 2), capacity=208, added=2)
OTHERS = {
    "scale": {"options": {"scale": 0.4}},
    "window_left": {"options": {"window_left": 9}},
    "window_right": {"options": {"window_right": 0}},
    "softcap": {"options": {"softcap": 1.5}},
    "slopes": {"alibi": "head"},
    "slopes of sequences": {"alibi": "batch"},
    "sinks": {"sinks": True},
    "no left padding": {"starts": None},
    "entries": {"entries": (3, 1)},
    "pages": {"page_size": 16},
    "larger pages": {"page_size": 208},
    "heads": {"heads": (8, 4)},
    "queries": {"q_len": 2},
    "capacity": {"capacity": 224},
    "widths": {"widths": (64, 32)},
    "dtype": {"dtype": torch.float16},
}


def call_of(**changed: Any) -> CacheCall:
    return on("mps", Cached(**{**vars(PLAIN), **changed}).call(impl="metal"))


def check_not_mistaken(call: CacheCall, changed: CacheCall) -> None:
    """Though `call`'s plan is remembered, `changed` gets a plan of its own and runs by it."""
    decode(call)
    with Counted() as counted:
        decode(call)
    assert counted.num_plans == 0
    with Counted() as counted:
        results = decode(changed)
    assert counted.num_plans == 1
    expected = decode(changed._replace(impl="reference"))
    tolerance = TOLERANCE if changed.query.dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    for x, y in zip(results, expected, strict=True):
        torch.testing.assert_close(x, y, **tolerance)


@pytest.mark.parametrize("name", OTHERS)
def test_problems_have_plans_of_their_own(name: str):
    # No other test has this scale, so that what it changes is new to this one.
    scale = 0.2 + list(OTHERS).index(name) / 1024
    options = {"scale": scale, **OTHERS[name].get("options", {})}
    changed = call_of(**{**OTHERS[name], "options": options})
    check_not_mistaken(call_of(options={"scale": scale}), changed)


def test_a_call_without_lengths_has_a_plan_of_its_own():
    full = Cached((208, 208), heads=(8, 2), capacity=208)
    call = on("mps", full.call(impl="metal"))._replace(scale=0.31)
    check_not_mistaken(call, call._replace(cache_seqlens=None, added=208))


@pytest.mark.parametrize("name", ("query", "key", "value"))
@pytest.mark.parametrize("axis", range(4))
def test_layouts_have_plans_of_their_own(axis: int, name: str):
    call = call_of(options={"scale": 0.32 + axis / 64 + len(name) / 1024})
    x = getattr(call, name)
    twice = x.repeat_interleave(2, axis)
    apart = twice[(slice(None),) * axis + (slice(None, None, 2),)]
    assert apart.stride() != x.stride()
    check_not_mistaken(call, call._replace(**{name: apart}))


def test_forwards_of_few_queries_have_plans_of_their_own():
    q, k = torch.randn(1, 4, 1, 64, device="mps"), torch.randn(1, 4, 300, 64, device="mps")
    options: dict[str, Any] = {"scale": 0.37}
    with Counted() as counted:
        decoded = orchard_ops.flash_attn(q, k, k, **options)
    assert counted.num_plans == 1
    with Counted() as counted:
        by_the_forward = orchard_ops.flash_attn(q.requires_grad_(), k, k, **options)
    assert counted.num_plans == 1
    torch.testing.assert_close(decoded, by_the_forward.detach(), **TOLERANCE)
    with Counted() as counted, torch.no_grad():
        for _ in range(3):
            assert torch.equal(orchard_ops.flash_attn(q, k, k, **options), decoded)
    assert counted.num_plans == 0


@pytest.mark.parametrize(("cores", "of_keys"), ((1, 8), (64, 8), (76, 10), (132, 16)))
def test_each_core_has_a_threadgroup(cores: int, of_keys: int, monkeypatch: pytest.MonkeyPatch):
    """Of one sequence and its 8 key/value heads, and no core of a small GPU has just one."""
    monkeypatch.setenv("ORCHARD_GPU_CORES", str(cores))
    call = Cached((4096,), heads=(64, 8), capacity=4096, widths=(128, 128), dtype=torch.float16)
    tiles = explain_cache(on("mps", call.call(impl="metal"))).tiles
    assert f"8 x {of_keys} threadgroups" in next(iter(tiles.values()))


@pytest.mark.parametrize("paged", (False, True))
def test_every_token_has_the_same_plans(paged: bool):
    """A loop that counts its keys on the host: what is counted is no part of a plan."""
    steps, first = 6, 29
    cache = torch.full((2, 48, 2, 64), float("nan"), device="mps")
    table = None
    if paged:
        cache = cache.view(6, 16, 2, 64)
        table = torch.tensor([[4, 0, 2], [1, 5, 3]], device="mps", dtype=torch.int32)
    caches = cache, cache.clone()
    k, v = torch.randn(2, 2, first + steps, 2, 64, device="mps")
    q = torch.randn(2, 1, 4, 64, device="mps")

    def step(length: int, new: int) -> torch.Tensor:
        added = (x[:, length : length + new].contiguous() for x in (k, v))
        return orchard_ops.flash_attn_with_kvcache(
            q, *caches, *added, cache_seqlens=length, block_table=table, softmax_scale=0.38,
            causal=True,
        )  # fmt: skip

    step(0, first)
    for i in range(steps):
        with Counted() as counted:
            found = step(first + i, 1)
        assert counted.num_plans == (0 if i else 1)  # of one new key, both caches alike
        keys = (x[:, : first + i + 1].transpose(1, 2) for x in (k, v))
        right = orchard_ops.flash_attn(
            q.transpose(1, 2), *keys, scale=0.38, enable_gqa=True, impl="reference"
        )
        torch.testing.assert_close(found, right.transpose(1, 2), **TOLERANCE)


def test_appends_have_plans_of_their_own():
    def fill(width: int, slots: int, **places: Any) -> None:
        new = [torch.randn(2, 2, 2, width, device="mps") for _ in range(2)]
        caches = [torch.zeros(2, 2, slots, width, device="mps") for _ in range(2)]
        call = AppendCall(*caches, *new, offset=1, impl="metal")._replace(**places)
        torch.ops.orchard.flash_attn_append(*call)
        for cache, added in zip(caches, new):
            expected = torch.zeros_like(cache)
            for b in range(2):
                begin = 1 if call.cache_seqlens is None else 1 + int(call.cache_seqlens[b])
                entry = b if call.cache_batch_idx is None else int(call.cache_batch_idx[b])
                expected[entry, :, begin : begin + 2] = added[b]
            assert torch.equal(cache, expected)

    numbers = torch.tensor([1, 0], device="mps", dtype=torch.int32)
    for plans, width, slots, places in (
        (1, 24, 11, {}),
        (0, 24, 11, {}),
        (1, 20, 11, {}),
        (1, 24, 13, {}),
        (1, 24, 11, {"cache_seqlens": numbers}),
        (1, 24, 11, {"cache_batch_idx": numbers}),
        (0, 24, 11, {"cache_batch_idx": numbers.flip(0)}),
    ):
        with Counted() as counted:
            fill(width, slots, **places)
        assert counted.num_plans == plans, (width, slots, places)


def test_a_plan_that_counts_too_far_is_refused_by_its_own_number():
    call = call_of(options={"scale": 0.39})
    decode(call)
    for added in (2**28 + 1, 2**28 + 2):
        with pytest.raises(RuntimeError, match=f"too many keys.*{added}"):
            decode(call._replace(added=added))
    decode(call)
