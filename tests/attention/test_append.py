"""flash_attn_append, which fills caches in place: what it takes, and that autograd hears of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import orchard_ops
from orchard_ops.cache import AppendCall

CACHE, NEW = torch.zeros(2, 2, 8, 4), torch.zeros(2, 2, 1, 4)
DEVICES = pytest.mark.parametrize("device", ("cpu", "mps"))


def append(device: str, **changed: Any) -> AppendCall:
    call = AppendCall(CACHE.clone(), CACHE.clone(), NEW + 1, NEW + 1)._replace(**changed)
    return AppendCall._make(x.to(device) if isinstance(x, Tensor) else x for x in call)


@DEVICES
@pytest.mark.parametrize("inference", (False, True))
def test_is_a_change_in_place(inference: bool, device: str):
    """In inference mode, too: a backward that saved the cache notices."""
    call = append(device)
    x = torch.ones_like(call.key_cache).requires_grad_()
    y = (call.key_cache * x).sum()
    caches = call.key_cache, call.value_cache
    before = [cache._version for cache in caches]
    with torch.inference_mode(inference):
        torch.ops.orchard.flash_attn_append(*call)
    assert all(cache._version > version for cache, version in zip(caches, before))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@DEVICES
def test_inference_tensors_are_filled_in_inference_mode_alone(device: str):
    with torch.inference_mode():
        call = append(device)
        torch.ops.orchard.flash_attn_append(*call)
    assert call.key_cache.sum() == call.key.numel()
    message = "flash_attn_append: key_cache must not be an inference tensor outside of inference"
    for added in (call, append(device)):
        mixed = call._replace(key=added.key + 1, value=added.value + 1)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.orchard.flash_attn_append(*mixed)
    assert call.key_cache.sum() == call.key.numel()


@DEVICES
@pytest.mark.parametrize("name", ("key_cache", "value_cache"))
@pytest.mark.parametrize("axis", range(4))
def test_expanded_caches_are_refused(axis: int, name: str, device: str):
    """They have several numbers in one place; the other cache keeps its numbers."""
    one = torch.zeros(2, 2, 8, 4).narrow(axis, 0, 1).to(device)
    call = append(device, **{name: one.expand(2, 2, 8, 4)})
    with pytest.raises(ValueError, match=f"flash_attn_append: {name} must have a place of its own"):
        torch.ops.orchard.flash_attn_append(*call)
    assert not call.key_cache.any() and not call.value_cache.any()


@DEVICES
def test_a_stride_of_zero_along_one_number_is_none(device: str):
    caches = [CACHE[:, :, :1].as_strided((2, 2, 1, 4), (8, 4, 0, 1)).to(device) for _ in range(2)]
    torch.ops.orchard.flash_attn_append(*append(device, key_cache=caches[0], value_cache=caches[1]))
    assert caches[0].sum() == caches[0].numel()


@DEVICES
@pytest.mark.parametrize("slots, pages", ((0, None), (8, 0), (0, 3)))
def test_no_room_is_left_as_it_is(slots: int, pages: int | None, device: str):
    """Keys without a slot are left out, where there is none at all, too."""
    table = None if pages is None else torch.zeros(2, pages, dtype=torch.int32)
    caches = [torch.zeros(2, 2, slots, 4, device=device) for _ in range(2)]
    call = append(device, block_table=table, cache_seqlens=torch.zeros(2, dtype=torch.int32))
    call = call._replace(key_cache=caches[0], value_cache=caches[1])
    torch.ops.orchard.flash_attn_append(*call)
    assert not any(cache.any() for cache in caches)


def test_opcheck():
    cache, new = torch.zeros(4, 16, 2, 8).transpose(1, 2), torch.ones(2, 1, 2, 8).transpose(1, 2)
    lengths, table = torch.tensor([3, 18]).int(), torch.tensor([[3, 0], [1, 2]]).int()
    torch.library.opcheck(
        torch.ops.orchard.flash_attn_append,
        (cache, cache.clone(), new, new.clone(), lengths, None, table, 0, "auto"),
    )


APPENDS: dict[str, dict[str, Any]] = {
    "offset must be at least 0; got -1": {"offset": -1},
    r"key must have shape \(any, 2, any, 4\); got \(2, 1, 1, 4\)": {"key": NEW[:, :1]},
    r"key must have shape \(any, 2, any, 4\); got \(2, 2, 1, 2\)": {"key": NEW[..., :2]},
    r"value must have shape \(2, 2, 1, 4\); got \(1, 2, 1, 4\)": {"value": NEW[:1]},
    r"value_cache must have shape \(2, 2, 8, any\)": {"value_cache": CACHE[:, :, :3]},
    "key_cache must have key's batch size 2": {"key_cache": CACHE[:1]},
    r"value_cache must be \(entries, .* and value": {"value_cache": CACHE[0]},
    "value_cache and value must be of one dtype": {"value": NEW.half()},
    "key_cache and key must be of one dtype": {"key_cache": CACHE.int(), "key": NEW.int()},
    "cache_seqlens must be int32": {"cache_seqlens": torch.ones(2)},
    r"cache_seqlens must have shape \(2,\)": {"cache_seqlens": torch.ones(3).int()},
    "cache_batch_idx and block_table both": {
        "cache_batch_idx": torch.zeros(2).int(),
        "block_table": torch.zeros(2, 1).int(),
    },
    "impl must be one of": {"impl": "wrong"},
}


@pytest.mark.parametrize("device", ("cpu", "mps"))
@pytest.mark.parametrize("message", APPENDS)
def test_malformed_appends(message: str, device: str):
    call = AppendCall(CACHE, CACHE, NEW, NEW)._replace(**APPENDS[message])
    arguments = [x.to(device) if isinstance(x, Tensor) else x for x in call]
    with pytest.raises((ValueError, TypeError), match=f"orchard::flash_attn_append: .*{message}"):
        torch.ops.orchard.flash_attn_append(*arguments)


def test_appends_fall_back_and_say_so(fresh_stats: None, quiet_fallback: None):
    cache, new = torch.zeros(2, 2, 8, 4, device="mps"), torch.ones(2, 2, 1, 4, device="mps")
    torch.ops.orchard.flash_attn_append(
        cache, cache.clone(), new, new, None, None, None, 3, "reference"
    )
    assert orchard_ops.stats().reference == {
        'impl="reference" was asked for': {"flash_attn_append": 1}
    }
    assert cache.cpu().nonzero()[:, 2].eq(3).all() and cache.sum() == 2 * 2 * 4
