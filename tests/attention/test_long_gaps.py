"""Masks that hide more blocks in a row than a loop looks at in one turn (shaders/hidden_blocks.h),
along keys and along queries, whose ends are no whole blocks."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case, run

from orchard_ops.testing import assert_attention_close, math_attention

SHORT, LONG = 40, 32 * 291 + 5
SEEN = {  # blocks of 32 queries and 32 keys, by the sum of their numbers
    "one turn": (1, 129, 258),
    "a block less and a block more": (0, 128, 258, 259),
    "the last": (291,),
    "an end that is hidden": (3, 134),
}
BACKWARDS = {
    "dq anew": (16, torch.float32),
    "dS": (64, torch.float16),
    "pairs": (96, torch.float16),
}


@pytest.mark.parametrize("head_dim, dtype", BACKWARDS.values(), ids=BACKWARDS)
@pytest.mark.parametrize("blocks", SEEN.values(), ids=SEEN)
@pytest.mark.parametrize("lengths", ((SHORT, LONG), (LONG, SHORT)), ids=("keys", "queries"))
def test_runs_of_hidden_blocks(
    lengths: tuple[int, int], blocks: tuple[int, ...], head_dim: int, dtype: torch.dtype
):
    case = Case(*lengths, head_dim, num_heads=1, num_kv_heads=1, dtype=dtype)
    rows, keys = (torch.arange(n) // 32 for n in lengths)
    mask = torch.isin(rows[:, None] + keys, torch.tensor(blocks))[None, None]
    scoring = case.scoring()._replace(attn_mask=mask)
    q, k, v, do = case.operands()
    arguments = scoring._asdict() | {"dropout_seed": 0}
    ref, eager = (
        math_attention(q, k, v, do, dtype=of, **arguments) for of in (torch.float64, dtype)
    )
    unseen = ~mask[0, 0].any(0)
    k, v = (x.masked_fill(unseen[:, None], torch.nan) for x in (k, v))
    moved = scoring._replace(attn_mask=mask.to("mps"))
    found = run(case, *(x.to("mps") for x in (q, k, v, do)), scoring=moved)
    assert_attention_close(found, ref, eager)
