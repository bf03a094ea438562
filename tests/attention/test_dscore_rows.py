"""Where the backward stores dS: all tiles that a window lets through, none of them twice, and under
a causal mask in half of the memory (shaders/dscore.h)."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case, check_case

from benchmarks import planner

D = 64


def planned(plans: planner.Planner, q_len: int, kv_len: int, **window: int) -> planner.Plan:
    """A backward of one head, with memory for all that it wants to store."""
    places = {
        name: ((1, 1, length, D), (length * D, length * D, D, 1), 0)
        for name, length in (
            ("q", q_len), ("k", kv_len), ("v", kv_len), ("out", q_len), ("dout", q_len),
        )
    }  # fmt: skip
    return plans.plan(
        places, planner.DTYPES.index("float16"), True, scratch_bytes=1 << 40, stores_ds=True,
        **window,
    )  # fmt: skip


def seen_tiles(q_len: int, kv_len: int, **window: int) -> torch.Tensor:
    """(key blocks, query blocks), whether any query of a tile sees any of its keys."""
    ahead = torch.arange(kv_len) - torch.arange(q_len)[:, None] - window.get("diagonal", 0)
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if (left := window.get("window_left", -1)) >= 0:
        seen &= ahead >= -left
    if (right := window.get("window_right", -1)) >= 0:
        seen &= ahead <= right
    padded = torch.nn.functional.pad(seen, (0, -kv_len % 8, 0, -q_len % 8))
    return padded.unflatten(1, (-1, 8)).unflatten(0, (-1, 8)).any(3).any(1).T


WINDOWS = (
    {},
    {"window_right": 0},
    {"window_right": 13},
    {"window_right": 0, "diagonal": 70},
    {"window_right": 0, "diagonal": -45},
    {"window_right": 0, "diagonal": 500},
    {"window_left": 100, "window_right": 0},
    {"window_left": 250, "window_right": 30},
    {"window_left": 3, "diagonal": 100},
)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(
    "lengths", ((300, 300), (512, 512), (200, 330), (330, 200), (64, 1000), (1000, 64), (129, 127)),
    ids=str,
)  # fmt: skip
def test_every_tile_has_a_place_of_its_own(
    plans: planner.Planner, lengths: tuple[int, int], window: dict[str, int]
):
    plan = planned(plans, *lengths, **window)
    seen = seen_tiles(*lengths, **window)
    rows, width = plan.params.ds_keys // 8, plan.params.ds_row
    assert plan.ds_elements == rows * width * 64
    assert rows * width <= seen.numel()
    folded = plan.params.ds_folded > 0
    taken: dict[int, tuple[int, int]] = {}
    for key, query in seen.nonzero().tolist():
        if folded and key >= rows:
            place = plan.params.ds_folded - key * (width + 1) + query
        else:
            place = key % rows * width + width - seen.shape[1] + query
        assert 0 <= place < rows * width
        assert place not in taken, (place, taken[place], key, query)
        taken[place] = key, query


@pytest.mark.parametrize("length", (128, 1000, 4096, 65536))
def test_half_of_the_memory_under_a_causal_mask(plans: planner.Planner, length: int):
    """But for a tile in each row, and rows of whole chunks of 64 keys."""
    whole = planned(plans, length, length).ds_elements
    causal = planned(plans, length, length, window_right=0).ds_elements
    tiles = -(-length // 8)
    assert whole == 64 * tiles * tiles
    assert causal == 64 * (8 * -(-tiles // 16)) * (tiles + 1)


CASES = {
    "causal": Case(300, 300, 64, window_right=0, dtype=torch.float16),
    "causal, pairs": Case(260, 260, 128, window_right=0, dtype=torch.bfloat16),
    "causal from the end": Case(200, 330, 64, window_right=0, diagonal=130, dtype=torch.float32),
    "few keys": Case(330, 200, 64, window_right=0, dtype=torch.float16),
    "queries without a key": Case(200, 330, 64, window_right=9, diagonal=-40, dtype=torch.float16),
    "keys that nobody sees": Case(130, 400, 64, window_right=0, dtype=torch.float16),
    "mask, its gradient": Case(
        256, 256, 64, window_right=0, mask="same", dtype=torch.float16, num_heads=2,
    ),
}  # fmt: skip


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("name", CASES)
def test_folded_rows_obey_the_rule(name: str, recording):
    with recording() as launches:
        check_case(CASES[name])
    if launches is not None:
        assert any("dq_from_ds" in launch.kernel for launch in launches)


@pytest.mark.parametrize("name", CASES)
def test_these_rows_are_folded(name: str, plans: planner.Planner):
    case = CASES[name]
    window = {"window_right": case.window_right, "diagonal": case.diagonal}
    assert planned(plans, case.q_len, case.kv_len, **window).params.ds_folded > 0
