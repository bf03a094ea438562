"""The decode kernel is bound by memory: model A's rate at full issue, beside that of every Mac."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("simulator", reason="products are counted by the simulator's engine")

from benchmarks.apple_model import decode
from benchmarks.apple_model.core_model import SCHEDULERS
from benchmarks.apple_model.issue_model import issue


@pytest.fixture(scope="module")
def planner() -> decode.Planner:
    return decode.new_planner()


@pytest.mark.parametrize("width", (64, 80, 96, 128))
@pytest.mark.parametrize("dtype", decode.DTYPES)
def test_eight_rows_ask_for_twice_what_memory_gives(
    planner: decode.Planner, dtype: str, width: int
):
    counts = decode.count(planner, dtype, width, 8)
    size = 2 * decode.BLOCK * width * decode.DTYPES[dtype].itemsize
    assert counts.steady["device_bytes_read"] == size  # keys and values, nothing else
    rate = SCHEDULERS * size / issue("attention_decode", counts).cycles
    assert rate >= 2 * max(mac.rate for mac in decode.MACS)


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_sixteen_rows_are_bound_by_their_products(planner: decode.Planner, dtype: str):
    """docs/decoding.md: nothing can ask for twice what the fastest memory for a core gives, since
    the products alone take too long; what is asked for is more than any memory gives."""
    counts = decode.count(planner, dtype, 128, 16)
    cycles = issue("attention_decode", counts)
    size = counts.steady["device_bytes_read"]
    fastest = max(mac.rate for mac in decode.MACS)
    by_products = SCHEDULERS * size / cycles.parts["mma"] / fastest
    rate = SCHEDULERS * size / cycles.cycles / fastest
    assert by_products < 1.5
    assert rate >= 0.84 * by_products and rate > 1.2


def test_pages_cost_their_numbers(planner: decode.Planner):
    plain, paged = (decode.count(planner, "float16", 128, 8, paged=x) for x in (False, True))
    more = paged.steady["device_bytes_read"] - plain.steady["device_bytes_read"]
    assert more == 4 * 32  # the page of a block, asked for by each lane
    assert paged.steady["mma_half"] == plain.steady["mma_half"]


def test_the_committed_record_is_of_the_present_kernel(planner: decode.Planner):
    """docs/features.md shows it; `benchmarks.apple_model.decode --write` makes it anew."""
    rows = json.loads(decode.RECORD.read_text())["cases"]
    assert len(rows) == len(decode.CASES)
    for number in (1, 9, 12, 14):  # 8 rows, 16 rows, pages, a width between
        now = decode.row_of(planner, *decode.CASES[number])
        assert now.pop("parts") == pytest.approx(rows[number].pop("parts"))
        assert now == pytest.approx(rows[number])
