"""Whatever a caller left in keys that no row sees, NaN and inf too, reaches no result."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import DTYPES
from torch import Tensor

from orchard_ops.scoring import Scoring
from orchard_ops.testing import Case

DEVICES = ("cpu", "mps")
WINDOWS = {  # the case, and which of its keys no row sees
    "causal": (Case(40, 101, 32, window_right=0), slice(40, None)),
    "causal_within_a_tile": (Case(5, 7, 16, window_right=0), slice(5, None)),
    "lookahead": (Case(40, 101, 64, window_right=3, dropout_p=0.2), slice(43, None)),
    "left": (Case(40, 101, 80, window_left=4, diagonal=37), slice(0, 33)),
    "both": (Case(33, 140, 32, window_left=2, window_right=1, diagonal=50), slice(84, None)),
    "before_all": (Case(20, 30, 32, window_right=0, diagonal=-25), slice(0, None)),
}


def results(
    case: Case, operands: tuple[Tensor, ...], scoring: Scoring, device: str, impl: str
) -> tuple[Tensor, ...]:
    q, k, v, do = (x.to(device) for x in operands)
    ops = torch.ops.orchard
    out, row_stats = ops.flash_attn_fwd(q, k, v, *scoring, impl)
    grads = ops.flash_attn_bwd(do, None, q, k, v, out, row_stats, *scoring, False, impl)
    return tuple(x.cpu() for x in (out, row_stats, *grads[:3]))


def check(case: Case, unseen: Tensor, scoring: Scoring, device: str, impl: str) -> None:
    """`unseen` is (B, Hkv, S), True for the keys whose numbers must not matter."""
    q, k, v, do = case.operands()
    expected = results(case, (q, k, v, do), scoring, device, impl)
    assert all(x.isfinite().all() for x in expected[0:1] + expected[2:])
    for garbage in (math.nan, math.inf, -math.inf):
        dirty = (x.masked_fill(unseen.unsqueeze(-1), garbage) for x in (k, v))
        found = results(case, (q, *dirty, do), scoring, device, impl)
        for name, x, y in zip(("out", "row_stats", "dq", "dk", "dv"), found, expected):
            assert torch.equal(x, y), f"{name} depends on {garbage} in a key that no row sees"
        for x in found[3:]:
            assert not x[unseen].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("device", DEVICES)
def test_hidden_by_the_windows(device: str, name: str, dtype: torch.dtype):
    case, keys = WINDOWS[name]
    case = case.but(dtype=dtype)
    unseen = torch.zeros(case.batch, case.num_kv_heads, case.kv_len, dtype=torch.bool)
    unseen[..., keys] = True
    impl = "metal" if device == "mps" else "auto"
    check(case, unseen, case.scoring(device), device, impl)


MASKS = {  # the dimensions of (B, Hq, L, S) that it does not broadcast over
    "padding": (True, False, False, True),
    "all_samples": (False, False, False, True),
    "by_head": (True, True, False, True),
    "by_row": (True, False, True, True),
    "full": (True, True, True, True),
}


@pytest.mark.parametrize("kind", ("bool", "float32"))
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("quiet_fallback")
def test_hidden_by_a_mask(device: str, name: str, kind: str):
    """A key is unseen if the mask hides it from every row of every head that shares it."""
    case = Case(33, 50, 16, batch=2, num_heads=4, num_kv_heads=2)
    full = (case.batch, case.num_heads, case.q_len, case.kv_len)
    shape = [n if keep else 1 for n, keep in zip(full, MASKS[name])]
    visible = torch.rand(shape) > 0.3
    visible[..., 40:] = False  # padding
    visible[..., :1] = True  # no row is empty
    of_kv_head = visible.expand(full).any(2).unflatten(1, (2, 2)).any(2)
    mask = visible if kind == "bool" else torch.zeros(shape).masked_fill(~visible, -math.inf)
    scoring = case.scoring()._replace(attn_mask=mask.to(device))
    check(case, ~of_kv_head, scoring, device, "auto")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ("left", "before_all"))
@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_see_no_key_reach_nothing(device: str, name: str, dtype: torch.dtype):
    case, _ = WINDOWS[name]
    case = case.but(dtype=dtype, q_len=case.q_len + 50)
    operands = q, _, _, do = case.operands()
    i = torch.arange(case.q_len) + case.diagonal
    right = case.window_right if case.window_right >= 0 else 1 << 20
    left = case.window_left if case.window_left >= 0 else 1 << 20
    blind = (i + right < 0) | (i - left >= case.kv_len)
    assert blind.any()
    impl, scoring = "metal" if device == "mps" else "auto", case.scoring(device)
    expected = results(case, operands, scoring, device, impl)
    dirty = [x.masked_fill(blind[:, None], math.nan) for x in (q, do)]
    found = results(case, (dirty[0], *operands[1:3], dirty[1]), scoring, device, impl)
    for label, x, y in zip(("out", "row_stats", "dq", "dk", "dv"), found, expected):
        assert torch.equal(x, y), f"{label} depends on a row that sees no key"
    assert not found[0][:, :, blind].any()
    assert not found[2][:, :, blind].any()
