"""What a mask hides costs nothing: the kernels' matrix products follow the blocks that are seen.

The unit is a block of 32 queries and 32 keys of which some pair is seen, as the map of the mask has
them (shaders/mask_map.h). A kernel that takes 64 queries at a time runs both halves where one is
seen, so its unit is 64 x 32.
"""

from __future__ import annotations

import re
import sys

import pytest
import torch
from attention_cases import Case, run
from representative import product
from torch import Tensor

if sys.platform != "linux":
    pytest.skip("products are counted on the simulated device", allow_module_level=True)

import simulator

LENGTH, BLOCK = 512, 32
PRODUCTS = {  # of a pair of fragments, for every 8 of the head dim
    "attention_forward": 2,
    "attention_backward_dkv": 4,
    "attention_backward_dkv_pairs": 4,
    "attention_backward_dq": 3,
    "attention_backward_dq_from_ds": 1,
}
_places = torch.arange(LENGTH)
_random = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(4)) < 0.25
MASKS = {
    "padding": (_places < 300).view(1, 1, 1, -1),
    "left padding": (_places >= 333).view(1, 1, 1, -1),
    "documents": (_places[:, None] // 64 == _places // 64)[None, None],
    "ragged documents": (_places[:, None] // 75 == _places // 75)[None, None],
    "random blocks": _random.repeat_interleave(32, 1).repeat_interleave(32, 2)[None],
    "single pairs": (_places[:, None] % 96 + _places % 160 == 50)[None, None],
    "nothing": torch.zeros(1, 1, 1, LENGTH, dtype=torch.bool),
    "everything": torch.ones(1, 1, LENGTH, 1, dtype=torch.bool),
}


def seen_share(mask: Tensor, heads: int, rows: int) -> float:
    """Of all blocks of `rows` queries and 32 keys, those with a pair that is seen."""
    full = mask.expand(1, heads, LENGTH, LENGTH)
    blocks = full.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, rows))
    return blocks.any(5).any(3).double().mean().item()


OF_KINDS = (
    *((name, "bool") for name in MASKS),
    ("padding", "float32"),
    ("random blocks", "float32"),
)


@pytest.mark.parametrize(
    "mask_of_kind, head_dim, scratch", product(OF_KINDS, (32, 64, 128), ("0", "64")), ids=str
)
def test_products_follow_the_blocks_that_are_seen(
    mask_of_kind: tuple[str, str], head_dim: int, scratch: str, monkeypatch: pytest.MonkeyPatch
):
    name, kind = mask_of_kind
    monkeypatch.setenv("ORCHARD_BACKWARD_SCRATCH_MB", scratch)
    mask, heads = MASKS[name], 2
    case = Case(LENGTH, LENGTH, head_dim, num_kv_heads=2, dtype=torch.float16)
    given = mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    scoring = case.scoring()._replace(attn_mask=given.to("mps"))
    with simulator.recording() as launches:
        run(case, *(x.to("mps") for x in case.operands()), scoring=scoring)
    counted = {}
    for launch in launches:
        family = launch.kernel.partition("_float16")[0]
        if family not in PRODUCTS:
            continue
        r = re.search(r"_r(\d)", launch.kernel)
        rows = BLOCK * int(r[1]) if r else BLOCK
        dense = PRODUCTS[family] * heads * (LENGTH // 8) ** 2 * (head_dim // 8)
        counted[family] = launch.counters.mma
        assert launch.counters.mma <= dense * seen_share(mask, heads, rows), launch.kernel
    assert len(counted) == 3
    # The forward does not do less than the pairs that are seen ask for.
    assert counted["attention_forward"] >= 2 * heads * mask.expand(1, heads, LENGTH, LENGTH).double(
    ).mean() * (LENGTH // 8) ** 2 * (head_dim // 8)  # fmt: skip
