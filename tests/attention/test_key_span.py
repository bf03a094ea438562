"""dS of packed sequences in memory for a span of keys: five products in place of seven.

The span is the caller's word (max_seqlen, chunk sizes, windows). The kernels look at each block of
queries, so that a number that does not hold costs time and never the result.
"""

from __future__ import annotations

import sys

import pytest
import torch
from attention_cases import DTYPES, Case, run
from torch import Tensor

import orchard_ops
from orchard_ops import KeyRanges, flash_attn_varlen, flash_attn_varlen_func
from orchard_ops.scoring import Scoring
from orchard_ops.testing import assert_attention_close

if sys.platform != "linux":
    pytest.skip("launches are recorded on the simulated device", allow_module_level=True)

import simulator

PARTS = {  # of a backward that stores dS for a span of keys, in order
    "attention_backward_dkv": "stores",
    "attention_backward_dq_from_ds": "reads",
    "attention_backward_dq": "computes again",
}


def cumulative(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def packed(*lengths: int, max_length: int | None = None) -> KeyRanges:
    ends = cumulative(*lengths)
    return KeyRanges.from_cu_seqlens(ends, q_len=int(ends[-1]), max_length=max_length)


def products(launches: list) -> dict[str, int]:
    """Of the kernels that form dq, by family."""
    found = {}
    for launch in launches:
        family = launch.kernel.partition("_float")[0].partition("_bfloat")[0]
        if "backward_dq" in family:
            found[family] = found.get(family, 0) + launch.counters.mma
    return found


# Lengths, the longest that is stated, and the window. Blocks of queries end within sequences.
CASES = {
    "causal": ((150, 7, 0, 99, 64, 1, 130), 150, -1, 0),
    "both sides": ((70, 60, 0, 1, 66, 70, 70), 70, -1, -1),
    "a window": ((200, 31, 150), 200, 40, 3),
    "one is longer than stated": ((64, 230, 64, 50), 64, -1, 0),
    "all are longer than stated": ((230, 220), 8, -1, -1),
    "a rest": ((100, 90, 80), 100, -1, 0),
}


def results(
    name: str, dtype: torch.dtype, head_dim: int, **changes: object
) -> tuple[Case, Scoring, tuple[Tensor, ...]]:
    lengths, longest, left, right = CASES[name]
    rest = 33 if name == "a rest" else 0
    total = sum(lengths) + rest
    case = Case(
        total, total, head_dim, num_heads=4, num_kv_heads=2, dtype=dtype,
        window_left=left, window_right=right,
    ).but(**changes)  # fmt: skip
    ends = cumulative(*lengths)
    ranges = KeyRanges.from_cu_seqlens(ends, q_len=total, max_length=longest)
    span = ranges.key_span(left, right)
    assert 0 < span < total
    scoring = case.scoring()._replace(key_ranges=ranges.tensor, key_span=span)
    on_device = case.scoring("mps")._replace(key_ranges=ranges.tensor.to("mps"), key_span=span)
    return case, scoring, run(case, *(x.to("mps") for x in case.operands()), scoring=on_device)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("head_dim", (64, 128, 256))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("checked")
def test_obeys_the_tolerance_rule(dtype: torch.dtype, head_dim: int, name: str):
    from orchard_ops.testing.mathematics import math_attention

    with simulator.recording() as launches:
        case, scoring, found = results(name, dtype, head_dim)
    assert set(products(launches)) == {*PARTS} - {"attention_backward_dkv"}
    arguments = scoring._asdict() | {"dropout_seed": 0}
    ref, eager = (
        math_attention(*case.operands(), dtype=d, **arguments) for d in (torch.float64, dtype)
    )
    assert_attention_close(found, ref, eager)
