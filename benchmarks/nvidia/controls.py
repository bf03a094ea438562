"""Faults planted on purpose: a proof that lets one of them pass is worth nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import torch

from benchmarks.planner import DecodeParams

from .append_cases import AppendCase
from .cache_cases import CacheCase
from .cases import Case
from .flex_cases import FlexCase
from .flex_plans import FlexParams
from .plans import Params


def _scale(params: Params) -> None:
    params.scale *= 1.0001
    params.scale_log2 *= 1.0001


def _diagonal(params: Params) -> None:
    params.diagonal += 1


def _window(params: Params) -> None:
    params.window_left -= 1


def _seed(params: Params) -> None:
    params.dropout_seed[1] ^= 1


def too_many_keys(params: Params) -> None:
    params.kv_len += 8


def _first_key_head(params: Params) -> None:
    params.k[1] = 0


def disturbed_parameters() -> Iterator[tuple[str, Case, Callable[[Params], None]]]:
    base = Case(1029, 773, 64, torch.float32, num_heads=4, num_kv_heads=2)
    yield "the scale off by 0.01 %", base, _scale
    yield "the diagonal off by one", base.but(window_right=0), _diagonal
    yield "the window off by one", base.but(q_len=8192, kv_len=8192, window_left=4000), _window
    yield "another dropout seed", base.but(dropout_p=0.01), _seed
    yield "eight keys too many, which are NaN", base, too_many_keys
    yield "always the first key head", base, _first_key_head


def without_barriers(ptx: bytes) -> bytes:
    """A fault that racecheck must notice."""
    return re.sub(rb"bar\.sync[^;]*;", b"", ptx)


# ---- scores that are functions


def _flex_scale(params: FlexParams) -> None:
    _scale(params.attention)


def _other_table(params: FlexParams) -> None:
    params.captures[0].strides[0] = 0


def _table_without_its_last(params: FlexParams) -> None:
    params.captures[0].sizes[0] -= 1


def _narrower_blocks(params: FlexParams) -> None:
    params.states.block_kv -= 1


def _states_of_the_first_head(params: FlexParams) -> None:
    params.states.head = 0


def _no_states(params: FlexParams) -> None:
    params.states.given = 0


def far_too_many_rows(params: FlexParams) -> None:
    """Queries that nobody has: each kernel reads and writes beyond the ends."""
    params.attention.q_len += 4096


FlexFault = tuple[str, FlexCase, Callable[[FlexParams], None]]


def disturbed_parameters_of_flex() -> Iterator[FlexFault]:
    base = FlexCase(517, 741, 64, torch.float32)
    lists = base.but(blocks=(48, 80), mask="causal", dtype=torch.float16)
    yield "the scale of a score_mod off by 0.01 %", base.but(score="softcap"), _flex_scale
    yield "one number of a table for all heads", base.but(score="alibi"), _other_table
    yield "a table without its last head", base.but(score="alibi"), _table_without_its_last
    yield "blocks that are one key narrower", lists, _narrower_blocks
    yield "always the block states of the first head", lists, _states_of_the_first_head
    yield "lists of blocks that nobody reads", lists, _no_states


# ---- caches


def _scale_of_decode(params: DecodeParams) -> None:
    params.attention.scale *= 1.0001


def one_key_more(params: DecodeParams) -> None:
    params.cache.added += 1


def far_too_many_keys(params: DecodeParams) -> None:
    params.cache.capacity += 1 << 16
    params.cache.added += 1 << 16


def one_key_fewer(params: DecodeParams) -> None:
    params.cache.added -= 1


def _window_of_decode(params: DecodeParams) -> None:
    params.attention.window_left -= 1


def _first_head_of_keys(params: DecodeParams) -> None:
    params.attention.k[1] = 0


def _no_starts(params: DecodeParams) -> None:
    params.cache.has_starts = 0


def _no_entries(params: DecodeParams) -> None:
    params.cache.has_entries = 0


def _one_table(params: DecodeParams) -> None:
    params.cache.table_row = 0


def _no_sinks(params: DecodeParams) -> None:
    params.attention.has_sinks = 0


def _room_for_one_more(params: DecodeParams) -> None:
    params.cache.capacity += 1


CacheFault = tuple[str, CacheCase | AppendCase, Callable[[DecodeParams], None]]


def disturbed_parameters_of_caches() -> Iterator[CacheFault]:
    base = CacheCase(torch.float32, window_right=0, q_len=2)
    yield "the scale off by 0.01 %", base, _scale_of_decode
    yield "one key too many, which is NaN", base, one_key_more
    yield "one key too few", base.but(lengths=(0, 2049, 400)), one_key_fewer
    yield "the window off by one", base.but(window_left=1000), _window_of_decode
    yield "always the first key head", base, _first_head_of_keys
    yield "no left padding", base.but(starts=(0, 100, 999, 0, 2000)), _no_starts
    yield "no cache_batch_idx", base.but(picks=True), _no_entries
    yield "one block table for all", base.but(page_size=64), _one_table
    yield "no sinks", base.but(sinks=True), _no_sinks
    fill = AppendCase(torch.float16)
    yield "appended one slot too far", fill, one_key_more
    yield "room for one key more than there is", fill, _room_for_one_more
    yield "appended to other entries", fill.but(entries=(3, 0, 5, 2, 4)), _no_entries
