"""Keys that no row sees, rows that see no key: what a caller left there reaches no result."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import DTYPES
from representative import pairs
from torch import Tensor

from orchard_ops import KeyRanges
from orchard_ops.reference import scores
from orchard_ops.scoring import Scoring
from orchard_ops.testing import Case

DEVICES = ("cpu", "mps")
IMPL = {"cpu": "auto", "mps": "metal"}
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


@pytest.mark.parametrize("device, name, dtype", pairs(DEVICES, WINDOWS, DTYPES), ids=str)
def test_hidden_by_the_windows(device: str, name: str, dtype: torch.dtype):
    case, keys = WINDOWS[name]
    case = case.but(dtype=dtype)
    unseen = torch.zeros(case.batch, case.num_kv_heads, case.kv_len, dtype=torch.bool)
    unseen[..., keys] = True
    check(case, unseen, case.scoring(device), device, IMPL[device])


MASKS = {  # the dimensions of (B, Hq, L, S) that it does not broadcast over
    "padding": (True, False, False, True),
    "all_samples": (False, False, False, True),
    "by_head": (True, True, False, True),
    "by_row": (True, False, True, True),
    "full": (True, True, True, True),
}


MASKED = {  # on Metal one for each kernel: dq anew, dS stored, pairs; dtypes and loads differ
    "narrow": Case(33, 50, 16, batch=2, num_heads=4, num_kv_heads=2),
    "storing": Case(70, 90, 64, num_heads=2, num_kv_heads=1, dtype=torch.float16, dropout_p=0.2),
    "pairs": Case(40, 70, 128, num_heads=2, num_kv_heads=1, dtype=torch.bfloat16, value_dim=72),
    "elements": Case(40, 67, 47, num_heads=2, num_kv_heads=2, window_left=30, window_right=50),
}


@pytest.mark.parametrize(
    "device, problem, name, kind", pairs(DEVICES, MASKED, MASKS, ("bool", "float32")), ids=str
)
def test_hidden_by_a_mask(device: str, problem: str, name: str, kind: str):
    """A key is unseen if the mask hides it from every row of every head that shares it."""
    case = MASKED[problem]
    full = (case.batch, case.num_heads, case.q_len, case.kv_len)
    shape = [n if keep else 1 for n, keep in zip(full, MASKS[name])]
    visible = torch.rand(shape) > 0.3
    visible[..., case.kv_len - 10 :] = False  # padding
    visible[..., 20:30] = False  # inside of a block
    visible[..., :1] = True  # no row is empty
    of_kv_head = visible.expand(full).any(2).unflatten(1, (case.num_kv_heads, -1)).any(2)
    mask = visible if kind == "bool" else torch.zeros(shape).masked_fill(~visible, -math.inf)
    scoring = case.scoring()._replace(attn_mask=mask.to(device))
    check(case, ~of_kv_head, scoring, device, IMPL[device])


def visible(case: Case, mask: Tensor | None) -> Tensor:
    """(B, Hq, L, S): True where neither windows nor mask hide a key from a row."""
    i = torch.arange(case.q_len).unsqueeze(1) + case.diagonal
    j = torch.arange(case.kv_len)
    shown = torch.ones(case.batch, case.num_heads, case.q_len, case.kv_len, dtype=torch.bool)
    if case.window_left >= 0:
        shown &= j >= i - case.window_left
    if case.window_right >= 0:
        shown &= j <= i + case.window_right
    if mask is not None:
        shown &= mask if mask.dtype == torch.bool else mask != -math.inf
    return shown


def masked(case: Case, shown: Tensor, kind: str) -> Scoring:
    mask = shown if kind == "bool" else torch.zeros(shown.shape).masked_fill(~shown, -math.inf)
    return case.scoring()._replace(attn_mask=mask)


TOGETHER = {
    "causal": Case(40, 40, 16, window_right=0),
    "more_keys": Case(33, 50, 16, window_right=4, batch=2, num_heads=4, num_kv_heads=2),
    "both": Case(60, 64, 16, window_left=6, window_right=2, dropout_p=0.2),
    "several_blocks": Case(300, 300, 16, window_left=80, window_right=0, num_heads=1),
}


@pytest.mark.parametrize("kind", ("bool", "float32"))
@pytest.mark.parametrize("columns", (True, False), ids=("by_key", "by_row"))
@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("device", DEVICES)
def test_hidden_by_window_and_mask_together(
    device: str, name: str, columns: bool, kind: str, monkeypatch: pytest.MonkeyPatch
):
    """By neither alone: the mask leaves key 10 only to rows that the windows hide it from."""
    small = scores.Limits(1, 32, 1)  # blocks of 16 rows
    monkeypatch.setattr(scores, "CPU_LIMITS", small)
    monkeypatch.setattr(scores, "GPU_LIMITS", small)
    case = TOGETHER[name]
    window = visible(case, None)
    shown = torch.ones(1, 1, case.q_len, case.kv_len if columns else 1, dtype=torch.bool)
    if columns:
        shown[..., 10] = ~window[:1, :1, :, 10]
    else:  # the rows that see key 10 see nothing
        shown[..., 0] = ~window[:1, :1, :, 10]
    scoring = masked(case, shown, kind)
    unseen = ~visible(case, scoring.attn_mask).any(2).unflatten(1, (case.num_kv_heads, -1)).any(2)
    assert unseen[..., 10].all() and window.any(2)[..., 10].all() and shown.any(2).all()
    moved = scoring._replace(attn_mask=scoring.attn_mask.to(device))
    check(case, unseen, moved, device, IMPL[device])


@pytest.mark.parametrize("kind", ("bool", "float32"))
@pytest.mark.parametrize("sinks", (False, True))
@pytest.mark.parametrize("window_right", (-1, 0))
@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_a_mask_leaves_without_a_key(
    device: str, window_right: int, sinks: bool, kind: str
):
    """Left padding, by the mask alone or by causal and a mask of keys: NaN in q, dout and dlse."""
    case = Case(
        24, 24, 16, batch=2, num_heads=4, num_kv_heads=2, window_right=window_right, sinks=sinks
    )
    shown = torch.ones(2, 1, 1 if window_right == 0 else 24, 24, dtype=torch.bool)
    shown[1, ..., :7] = False
    if window_right < 0:
        shown[1, :, :7] = False
    scoring = masked(case, shown, kind)
    blind = ~visible(case, scoring.attn_mask).any(-1)
    assert blind.any() and not blind.all()
    q, k, v, do = case.operands()
    dlse = torch.randn(blind.shape).masked_fill(blind, 0.0)
    moved = {
        name: None if (x := getattr(scoring, name)) is None else x.to(device)
        for name in ("attn_mask", "sinks")
    }
    scoring, impl = scoring._replace(**moved), IMPL[device]
    found = []
    for garbage in (0.0, math.nan, math.inf):
        dirty = [x.masked_fill(blind.unsqueeze(-1), garbage).to(device) for x in (q, do)]
        # The logarithm of a row that sees its sink alone is that sink: its gradient is real.
        dirty_dlse = dlse if sinks else dlse.masked_fill(blind, garbage)
        k, v = k.to(device), v.to(device)
        out, row_stats = torch.ops.orchard.flash_attn_fwd(dirty[0], k, v, *scoring, impl)
        grads = torch.ops.orchard.flash_attn_bwd(
            dirty[1], dirty_dlse.to(device), dirty[0], k, v, out, row_stats, *scoring, False, impl
        )
        found.append([x.cpu() for x in (out, row_stats, *grads)])
    names = ("out", "row_stats", "dq", "dk", "dv", "dmask", "dsinks")
    for results_of_garbage in found[1:]:
        for label, x, y in zip(names, results_of_garbage, found[0]):
            assert torch.equal(x, y), f"{label} depends on a row that sees no key"
    assert not found[0][0][blind].any() and not found[0][2][blind].any()
    assert all(x.isfinite().all() for x in found[0][2:])


RANGED = {
    "padding": Case(90, 90, 32, batch=2, num_heads=4, num_kv_heads=2),
    "dropout": Case(75, 200, 64, batch=2, dtype=torch.float16, dropout_p=0.2),
    "pairs": Case(70, 130, 128, batch=2, dtype=torch.bfloat16, window_right=0, value_dim=72),
    "windows": Case(90, 110, 47, batch=2, num_kv_heads=2, window_left=30, window_right=20),
}
RANGES = {  # of two samples of L queries and S keys
    "left padding": lambda q_len, kv_len: KeyRanges.from_lengths(
        torch.tensor([kv_len - 37, kv_len - 4]), q_len, starts=torch.tensor([37, 4])
    ),
    "right padding": lambda q_len, kv_len: KeyRanges.from_lengths(torch.tensor([33, 0]), q_len),
    "gaps": lambda q_len, kv_len: KeyRanges(  # documents of 20 queries, with 7 keys between them
        torch.stack(
            (
                (document := torch.arange(q_len) // 20) * 27,
                document * 27 + 20 * (document != 1),  # the second sees nothing
                document * 27 + torch.arange(q_len) % 20,
                torch.zeros(q_len, dtype=torch.int64),
            ),
            dim=-1,
        )[None, None].int()
    ),
}


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("problem", RANGED)
@pytest.mark.parametrize("device", DEVICES)
def test_hidden_by_key_ranges(device: str, problem: str, name: str):
    """Padding on both sides, gaps between documents; and rows that see nothing reach nothing."""
    case = RANGED[problem]
    ranges = RANGES[name](case.q_len, case.kv_len)
    windows = {"window_left": case.window_left, "window_right": case.window_right}
    full = (case.batch, case.num_heads, case.q_len, case.kv_len)
    seen = ranges.dense(case.kv_len, **windows).expand(full)
    unseen = ~seen.any(2).unflatten(1, (case.num_kv_heads, -1)).any(2)
    blind = ~seen.any(3)
    assert unseen.any() and not unseen.all() and (blind.any() or name == "left padding")
    scoring = case.scoring()._replace(key_ranges=ranges.tensor.to(device))
    check(case, unseen, scoring, device, IMPL[device])
    q, k, v, do = case.operands()
    expected = results(case, (q, k, v, do), scoring, device, IMPL[device])
    for garbage in (math.nan, math.inf):
        dirty = [x.masked_fill(blind.unsqueeze(-1), garbage) for x in (q, do)]
        found = results(case, (dirty[0], k, v, dirty[1]), scoring, device, IMPL[device])
        for label, x, y in zip(("out", "row_stats", "dq", "dk", "dv"), found, expected):
            assert torch.equal(x, y), f"{label} depends on {garbage} in a row that sees no key"
    assert not found[0][blind].any() and not found[2][blind].any()


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
    impl, scoring = IMPL[device], case.scoring(device)
    expected = results(case, operands, scoring, device, impl)
    dirty = [x.masked_fill(blind[:, None], math.nan) for x in (q, do)]
    found = results(case, (dirty[0], *operands[1:3], dirty[1]), scoring, device, impl)
    for label, x, y in zip(("out", "row_stats", "dq", "dk", "dv"), found, expected):
        assert torch.equal(x, y), f"{label} depends on a row that sees no key"
    assert not found[0][:, :, blind].any()
    assert not found[2][:, :, blind].any()


BESIDE_RANGES = {  # on Metal one for each kernel, as MASKED
    "narrow": Case(70, 50, 16, batch=2, num_heads=4, num_kv_heads=2),
    "storing": Case(70, 90, 64, batch=2, num_heads=2, dtype=torch.float16, dropout_p=0.2),
    "pairs": Case(40, 70, 128, batch=2, num_kv_heads=2, dtype=torch.bfloat16, value_dim=72),
    "elements": Case(40, 67, 47, batch=2, num_kv_heads=2, window_left=30, window_right=50),
}
OWN = {  # the dimensions of (B, Hq, L, S) of a mask, and (B, Hq) of key ranges, not broadcast
    "neither by head": ((False, False, True, True), (False, False)),
    "ranges by sample": ((False, False, True, True), (True, False)),
    "by sample and by head": ((True, False, True, True), (False, True)),
    "both by head": ((True, True, True, True), (True, True)),
    "mask of rows": ((False, False, True, False), (True, True)),
}


@pytest.mark.parametrize(
    "device, problem, name, kind",
    pairs(DEVICES, BESIDE_RANGES, OWN, ("bool", "float32")),
    ids=str,
)
def test_hidden_by_a_mask_and_key_ranges_together(
    device: str, problem: str, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
):
    """By neither alone: the mask leaves key 10 only to rows whose ranges it does not lie in."""
    small = scores.Limits(1, 32, 1)  # blocks of 16 rows
    monkeypatch.setattr(scores, "CPU_LIMITS", small)
    monkeypatch.setattr(scores, "GPU_LIMITS", small)
    case, (of_mask, of_ranges) = BESIDE_RANGES[problem], OWN[name]
    full = (case.batch, case.num_heads, case.q_len, case.kv_len)
    batch, heads = (n if keep else 1 for n, keep in zip(full, of_ranges))
    begin = torch.randint(0, case.kv_len, (batch, heads, case.q_len))
    begin[..., 0] = 10
    begin[..., 1::3] = 11
    numbers = (begin, begin + 20, begin, torch.zeros_like(begin))
    ranges = KeyRanges(torch.stack(numbers, -1).int())
    windows = {"window_left": case.window_left, "window_right": case.window_right}
    in_range = ranges.dense(case.kv_len, **windows).expand(full)
    rows_of_key = in_range[..., 10]
    for d in range(2):
        rows_of_key = rows_of_key if of_mask[d] else rows_of_key.any(d, keepdim=True)
    shown = torch.ones([n if keep else 1 for n, keep in zip(full, of_mask)], dtype=torch.bool)
    shown[..., 10 if of_mask[3] else 0] = ~rows_of_key
    of_kv_heads = [
        x.expand(full).any(2).unflatten(1, (case.num_kv_heads, -1)).any(2)
        for x in (in_range, shown, in_range & shown)
    ]
    assert of_kv_heads[0][..., 10].all() and of_kv_heads[1][..., 10].all()
    assert not of_kv_heads[2][..., 10].any() and of_kv_heads[2].any()
    scoring = masked(case, shown, kind)
    moved = {"attn_mask": scoring.attn_mask.to(device), "key_ranges": ranges.tensor.to(device)}
    check(case, ~of_kv_heads[2], scoring._replace(**moved), device, IMPL[device])
