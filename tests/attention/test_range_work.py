"""Keys outside of a query's ranges cost nothing: matrix products follow the blocks that are seen.

The unit is a block of as many queries as the kernel's tile has and 32 keys, of which some pair is
seen by ranges, windows and causality together. No kernel does more than these.
"""

from __future__ import annotations

import re
import sys

import pytest
import torch
from attention_cases import Case, run
from torch import Tensor

from benchmarks import planner
from orchard_ops import KeyRanges

if sys.platform != "linux":
    pytest.skip("products are counted on the simulated device", allow_module_level=True)

import simulator

BLOCK = 32
PRODUCTS = {  # of a pair of fragments, for every 8 of the head dim
    "attention_forward": 2,
    "attention_backward_dkv": 4,
    "attention_backward_dkv_pairs": 4,
    "attention_backward_dq": 3,
    "attention_backward_dq_from_ds": 1,
}


def documents(length: int, *shares: int) -> KeyRanges:
    """Packed, in lengths of these proportions."""
    ends = torch.tensor((0, *shares)).cumsum(0) * length // sum(shares)
    return KeyRanges.from_cu_seqlens(ends.int(), ends.int(), q_len=length)


RANGES = {  # the ranges, and the windows beside them
    "packed documents": (lambda n: documents(n, *[1] * 8), -1, -1),
    "ragged documents, causal": (lambda n: documents(n, 5, 1, 23, 8, 3, 13, 2, 9), -1, 0),
    "a window inside documents": (lambda n: documents(n, 5, 1, 23, 8, 3, 13, 2, 9), 100, 0),
    "left padding": (
        lambda n: KeyRanges.from_lengths(
            torch.tensor([n // 3]), n, starts=torch.tensor([n - n // 3])
        ),
        -1,
        0,
    ),
    "a prefix and a window": (lambda n: KeyRanges.sliding_window(128, 0, n, prefix=40), -1, 0),
    "nothing": (lambda n: KeyRanges.from_lengths(torch.tensor([0]), n), -1, -1),
}


def seen_share(seen: Tensor, rows: int) -> float:
    """Of all blocks of `rows` queries and 32 keys, those with a pair that is seen."""
    blocks = seen.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, rows))
    return blocks.any(3).any(1).double().mean().item()


def products(name: str, length: int, head_dim: int) -> dict[str, tuple[int, float]]:
    """Of each kernel: what it did, and what the seen blocks ask for."""
    make, left, right = RANGES[name]
    ranges = make(length)
    seen = ranges.dense(length, window_left=left, window_right=right)[0, 0]
    case = Case(
        length, length, head_dim, num_heads=1, dtype=torch.float16,
        window_left=left, window_right=right,
    )  # fmt: skip
    scoring = case.scoring()._replace(key_ranges=ranges.tensor.to("mps"))
    with simulator.recording() as launches:
        run(case, *(x.to("mps") for x in case.operands()), scoring=scoring)
    counted = {}
    for launch in launches:
        family = launch.kernel.partition("_float16")[0]
        if family in PRODUCTS:
            r = re.search(r"_r(\d)", launch.kernel)
            rows = BLOCK * int(r[1]) if r else BLOCK
            dense = PRODUCTS[family] * (length // 8) ** 2 * (head_dim // 8)
            counted[family] = launch.counters.mma, dense * seen_share(seen, rows)
    assert len(counted) == 3
    return counted


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("scratch", ("0", "64"))
def test_products_follow_the_blocks_that_are_seen(
    name: str, head_dim: int, scratch: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ORCHARD_BACKWARD_SCRATCH_MB", scratch)
    for family, (found, ideal) in products(name, 1024, head_dim).items():
        assert found <= ideal, (family, found / max(ideal, 1))


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("scratch", ("0", "128"))
def test_products_of_long_sequences(name: str, scratch: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ORCHARD_BACKWARD_SCRATCH_MB", scratch)
    for family, (found, ideal) in products(name, 4096, 64).items():
        assert found <= ideal, (family, found / max(ideal, 1))


# ---- memory, by the plan ------------------------------------------------------------------------


def backward(
    plans: planner.Planner, length: int, budget: int, heads: int = 8, span: int = 0
) -> planner.Plan:
    sizes = (1, heads, length, 128)
    place = (sizes, (heads * length * 128, length * 128, 128, 1), 0)
    layouts = dict.fromkeys(("q", "k", "v", "out", "dout"), place)
    return plans.plan(
        layouts, planner.DTYPES.index("float16"), True,
        has_key_ranges=True, window_right=0, scratch_bytes=budget, key_span=span,
    )  # fmt: skip


@pytest.mark.parametrize("length", (1 << 14, 1 << 15, 1 << 17))
def test_the_scratch_of_packed_sequences_is_not_quadratic(plans: planner.Planner, length: int):
    """32 documents of 1024 in a row of 32768, say: seven products, and no dS of all pairs."""
    budget = 256 << 20
    plan = backward(plans, length, budget)
    assert length * length * 4 > budget
    families = [kernel.family for kernel in plan.kernels]
    assert plan.ds_elements == 0
    assert "attention_backward_dq" in families and "attention_backward_dq_from_ds" not in families


def test_the_scratch_of_a_known_span(plans: planner.Planner):
    """32 documents of 1024 again, whose maximum is known: 136 MiB, as docs/packed-batches.md says,
    and twice the row takes twice as much."""
    plan = backward(plans, 1 << 15, 256 << 20, span=1024 + 7)
    families = [kernel.family for kernel in plan.kernels]
    assert "attention_backward_dq_from_ds" in families
    assert plan.ds_elements * 4 == 136 << 20
    assert backward(plans, 1 << 16, 272 << 20, span=1024 + 7).ds_elements * 4 == 272 << 20
    assert backward(plans, 1 << 16, (272 << 20) - 1, span=1024 + 7).ds_elements == 0


def test_scratch_of_short_rows_stays_within_the_budget(plans: planner.Planner):
    budget = 64 << 20
    plan = backward(plans, 2048, budget)
    assert "attention_backward_dq_from_ds" in [kernel.family for kernel in plan.kernels]
    assert 0 < plan.ds_elements * 4 <= budget
