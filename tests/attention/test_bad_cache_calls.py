"""Malformed calls of flash_attn_with_kvcache: the words of each error, and what debugging names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_kv_cache import Problem

import orchard_ops
from orchard_ops import flash_attn_with_kvcache

WRONG: dict[str, dict[str, Any]] = {
    "k and v must be given together; got k": {"v": None},
    "k and v need cache_seqlens": {"cache_seqlens": None},
    "cache_seqlens must be int32 or int64; got torch.float32": {"cache_seqlens": torch.ones(2)},
    r"cache_seqlens must have shape \(2,\); got \(3,\)": {"cache_seqlens": torch.ones(3).int()},
    "cache_seqlens must be an integer; got 1.5": {"cache_seqlens": 1.5},
    r"cache_seqlens must be an int for all .* got \[3, 4\]: pass torch.tensor": {
        "cache_seqlens": [3, 4]
    },
    r"cache_leftpad must be a tensor; got the list \[0, 1\]: pass": {"cache_leftpad": [0, 1]},
    r"k_cache must be plain memory, .* pass k_cache\.resolve_neg\(\)": {
        "k_cache": torch._neg_view(torch.ones(2, 64, 2, 16))
    },
    "cache_seqlens must be at least 0; got -1": {"cache_seqlens": -1},
    "must fit into the 64 slots of a sequence; got 64 and 1": {"cache_seqlens": 64},
    r"block_table must have shape \(2, pages\)": {"block_table": torch.ones(2).int()},
    "cache_batch_idx and block_table both": {
        "cache_batch_idx": torch.zeros(2).int(),
        "block_table": torch.zeros(2, 1).int(),
    },
    "k_cache must have q's batch size 3": {"q": torch.ones(3, 1, 4, 16), "k": None, "v": None,
                                           "cache_seqlens": 1},
    r"k must be .* the cache's \(2, 16\); got \(2, 1, 4, 16\)": {"k": torch.ones(2, 1, 4, 16)},
    "k and v must have the same length": {"v": torch.ones(2, 2, 2, 16)},
    "k must be torch.float32 on cpu": {"k": torch.ones(2, 1, 2, 16).half()},
    "rotary_cos and rotary_sin must be given together; rotary_sin": {
        "rotary_cos": torch.ones(64, 2)
    },
    "rotary_cos must be .* with at most 8 columns": {
        "rotary_cos": torch.ones(64, 9), "rotary_sin": torch.ones(64, 9)
    },
    "rotary_cos must have a row for each of the 64 slots": {
        "rotary_cos": torch.ones(63, 2), "rotary_sin": torch.ones(63, 2)
    },
    "rotate q and the new k; got no k": {
        "rotary_cos": torch.ones(64, 2), "rotary_sin": torch.ones(64, 2), "k": None, "v": None
    },
    "must have a row for each position of the queries, which are 66 .* got 64": {
        "rotary_cos": torch.ones(64, 2), "rotary_sin": torch.ones(64, 2), "cache_seqlens": 63,
        "q": torch.ones(2, 3, 4, 16)
    },
    "must have a row for each position of the queries, which are 65 .* got 64": {
        "rotary_cos": torch.ones(64, 2), "rotary_sin": torch.ones(64, 2),
        "q": torch.ones(2, 65, 4, 16)
    },
    "rotary_interleaved must be True or False": {"rotary_interleaved": 1},
    "num_splits must be an integer": {"num_splits": None},
    "return_softmax_lse must be True or False": {"return_softmax_lse": 1},
    "softcap must be a number": {"softcap": "x"},
    "the heads of q must be a multiple of those of k_cache": {"q": torch.ones(2, 1, 3, 16)},
    "q must be a tensor": {"q": None},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_malformed_calls(message: str):
    arguments = Problem(dtype=torch.float32).arguments() | WRONG[message]
    kept = arguments["k_cache"].clone()
    with pytest.raises(
        (ValueError, TypeError), match=rf"^orchard_ops\.flash_attn_with_kvcache: .*{message}"
    ):
        flash_attn_with_kvcache(**arguments)
    torch.testing.assert_close(arguments["k_cache"], kept, equal_nan=True, rtol=0, atol=0)


DEBUGGED = {
    "cache_seqlens must be from 0 to 63; got 64": {"cache_seqlens": torch.tensor([3, 64])},
    "cache_seqlens must be from 0 to 63; got -1": {"cache_seqlens": torch.tensor([-1, 3])},
    "cache_leftpad must be from 0 to 64; got 65": {"cache_leftpad": torch.tensor([0, 65])},
    "cache_leftpad must be at most the keys .* got 42 beside 41": {
        "cache_leftpad": torch.tensor([42, 8])
    },
    "cache_leftpad must be at most the keys .* got 9 beside 8": {
        "cache_leftpad": torch.tensor([41, 9])
    },
    "cache_leftpad must be at most the keys .* got 2 beside 1": {
        "cache_leftpad": torch.tensor([1, 2]), "cache_seqlens": 0
    },
    "a row for each position of the queries, which are 66 .* got 64": {
        "rotary_cos": torch.ones(64, 2), "rotary_sin": torch.ones(64, 2),
        "q": torch.ones(2, 3, 4, 16), "cache_seqlens": torch.tensor([63, 0])
    },
    "cache_batch_idx must be from 0 to 1; got 2": {"cache_batch_idx": torch.tensor([0, 2])},
    "block_table must be from 0 to 1 .* got 7": {"block_table": torch.tensor([[0], [7]])},
}  # fmt: skip


@pytest.mark.parametrize("message", DEBUGGED)
def test_debug_names_the_argument(message: str, monkeypatch: pytest.MonkeyPatch):
    arguments = Problem(dtype=torch.float32).arguments() | DEBUGGED[message]
    flash_attn_with_kvcache(**arguments)
    monkeypatch.setenv("ORCHARD_DEBUG", "1")
    with pytest.raises(ValueError, match=message):
        flash_attn_with_kvcache(**arguments)


def test_a_prompt_may_be_padding_up_to_its_end(monkeypatch: pytest.MonkeyPatch):
    """Padding that joins the cache with the prompt is no mistake."""
    monkeypatch.setenv("ORCHARD_DEBUG", "1")
    arguments = Problem(lengths=(0, 0), new=6, q_len=6, starts=(4, 6)).arguments()
    out = flash_attn_with_kvcache(**arguments)
    q, k, v = (arguments[name][:1, 4:] for name in ("q", "k", "v"))
    torch.testing.assert_close(out[:1, 4:], orchard_ops.flash_attn_func(q, k, v, causal=True))
    assert not out[0, :4].any() and not out[1].any()


def test_queries_that_share_a_place_need_no_rows_of_their_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ORCHARD_DEBUG", "1")
    problem = Problem(lengths=(63, 7), rotated=16, q_len=5, causal=False)
    problem.cos, problem.sin = problem.cos[:64], problem.sin[:64]
    problem.check()


def test_pages_that_hold_no_key_may_be_any_number(monkeypatch: pytest.MonkeyPatch):
    problem = Problem(page_size=16, dtype=torch.float32)
    expected = flash_attn_with_kvcache(**problem.arguments())
    arguments = problem.arguments()
    arguments["block_table"][1, 1:] = -1
    monkeypatch.setenv("ORCHARD_DEBUG", "1")
    assert torch.equal(flash_attn_with_kvcache(**arguments), expected)


def test_gradients_are_refused():
    arguments = Problem(dtype=torch.float32).arguments()
    arguments["q"].requires_grad_()
    with pytest.raises(NotImplementedError, match="no gradient; got a q that requires grad"):
        flash_attn_with_kvcache(**arguments)
    with torch.no_grad():
        assert not flash_attn_with_kvcache(**arguments).requires_grad
