"""Faults planted on purpose: a proof that lets one of them pass is worth nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import torch

from .cases import Case
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
