"""Every two features of a call together on Metal, for each family of kernels, in check mode.

A covering array of problems (covering.py) for each kernel of the backward; the forward, the map of
the mask and the sums of sinks run in all of them. One of 32 runs by default, always the same ones;
the others are marked slow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_cases import SEED, Case, kernel_head_dims, run
from covering import Choices, covering_array, digest
from torch import Tensor

from orchard_ops.scoring import Scoring
from orchard_ops.testing import MathResult, assert_attention_close, math_attention

pytestmark = pytest.mark.usefixtures("checked")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
WIDEST_ALONE = {F16: 96, BF16: 80, F32: 80}
"""Up to here one simdgroup has a key's dk and dv; beyond, two share them."""
SHARES = 32
"""One of so many problems runs by default."""

FACTORS: dict[str, tuple[Any, ...]] = {
    "width": kernel_head_dims(),
    "mask": ("none", *((kind, pairs) for kind in ("bool", "same", "float32") for pairs in (0, 1))),
    "broadcast": ("none", "BHLS", "HLS", "BLS", "BS", "S", "BHL", "inner", "outer"),
    "pattern": ("none", "scattered", "blocks", "padding"),
    "dtype": (F32, F16, BF16),
    "values": ("as wide", "narrower", "wider"),
    "ranges": ("", "any", "any B", "any H", "any BH", "documents", "padding", "prefix"),
    "window": ("open", "causal", "both sides", "bottom right"),
    "q_len": (1, 33, 64, 75),
    "kv_len": (2, 50, 64, 98),
    "heads": ((2, 2), (4, 2), (3, 1)),
    "alibi": ("", "head", "batch"),
    "chunks": (True, False),
    "dropout_p": (0.0, 0.2),
    "softcap": (0.0, 1.5),
    "sinks": (False, True),
    "dlse": (False, True),
    "mask_grad": (False, True),
}  # fmt: skip
FAMILIES = {  # whether two simdgroups share keys, and whether dS is stored
    "dkv": (False, False),
    "dkv, storing": (False, True),
    "pairs": (True, False),
    "pairs, storing": (True, True),
}


def possible(row: Choices, pairs: bool, storing: bool) -> bool:
    """Whether the choices so far may stand together in a family."""
    width, dtype = row.get("width"), row.get("dtype")
    if width is not None:
        limits = WIDEST_ALONE.values() if dtype is None else (WIDEST_ALONE[dtype],)
        if not any((width > limit) == pairs for limit in limits) or (storing and width < 64):
            return False
    of_mask = [row[name] for name in ("mask", "broadcast", "pattern") if name in row]
    if any(x == "none" for x in of_mask) and any(x != "none" for x in of_mask):
        return False
    mask, broadcast = row.get("mask", "none"), row.get("broadcast")
    if row.get("mask_grad") and ("none" in of_mask or mask[0] == "bool"):
        return False
    side_by_side = mask != "none" and mask[1]
    return not (side_by_side and broadcast == "BHL")


def problems() -> Iterator[Any]:
    for family, (pairs, storing) in FAMILIES.items():
        rows = covering_array(FACTORS, lambda row: possible(row, pairs, storing))  # noqa: B023
        for number, row in enumerate(rows):
            late = digest((family, row)) % SHARES != 0
            marks = [pytest.mark.slow] * late
            yield pytest.param(family, row, id=f"{family} {number}", marks=marks)


def case_of(row: Choices) -> Case:
    width, chunk = row["width"], 16 // row["dtype"].itemsize
    step = chunk if row["chunks"] else 1  # an odd width has no chunks
    wide = width if row["chunks"] else width - 1
    head_dim = wide - step if row["values"] == "wider" else wide
    value_dim = {"as wide": None, "narrower": wide - step, "wider": wide}[row["values"]]
    q_len, kv_len = row["q_len"], row["kv_len"]
    if row["mask"] != "none" and not row["mask"][1] and row["broadcast"] in ("HLS", "S"):
        kv_len -= 1  # which keeps elements from lying in pairs
    left, right, diagonal = {
        "open": (-1, -1, 0), "causal": (-1, 0, 0), "both sides": (20, 9, 5),
        "bottom right": (-1, 0, kv_len - q_len),
    }[row["window"]]  # fmt: skip
    ranges, _, full = row["ranges"].partition(" ")
    return Case(
        q_len, kv_len, head_dim, batch=4 if row["broadcast"] in ("inner", "outer") else 2,
        num_heads=row["heads"][0], num_kv_heads=row["heads"][1], dtype=row["dtype"],
        dropout_p=row["dropout_p"], window_left=left, window_right=right,
        diagonal=0 if ranges else diagonal,  # the ranges have positions
        value_dim=value_dim, softcap=row["softcap"], alibi=row["alibi"], sinks=row["sinks"],
        ranges=ranges, ranges_full=("B" in full, "H" in full),
    )  # fmt: skip


def mask_of(row: Choices, case: Case) -> Tensor | None:
    if row["mask"] == "none":
        return None
    kind, side_by_side = row["mask"]
    b, h, q_len, kv_len = case.batch, case.num_heads, case.q_len, case.kv_len
    shape = {
        "BHLS": (b, h, q_len, kv_len), "HLS": (1, h, q_len, kv_len), "BLS": (b, 1, q_len, kv_len),
        "BS": (b, 1, 1, kv_len), "S": (1, 1, 1, kv_len), "BHL": (b, h, q_len, 1),
        "inner": (1, 2, h, q_len, kv_len), "outer": (2, 1, 1, q_len, kv_len),
    }[row["broadcast"]]  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    rows, keys = torch.arange(shape[-2])[:, None], torch.arange(shape[-1])
    hides = {
        "scattered": torch.rand(shape, generator=generator) < 0.3,
        "blocks": ((rows // 32 + keys // 32) % 2 == 1) | (rows == 7),
        "padding": (keys >= 40) | (rows >= 60),
    }[row["pattern"]].expand(shape)
    if kind == "bool":
        mask = ~hides
    else:
        values = torch.randn(shape, generator=generator)
        values = values.to(case.dtype if kind == "same" else F32)
        mask = values.masked_fill(hides, -math.inf)
    mask = _placed(mask, side_by_side)
    assert _in_pairs(mask, kv_len) == bool(side_by_side)
    return mask


def _placed(mask: Tensor, side_by_side: bool) -> Tensor:
    """The mask in memory whose elements do or do not lie in pairs."""
    if mask.shape[-1] == 1:
        return mask
    if side_by_side:
        return mask
    if mask.shape[-1] % 2 == 0:  # a column of the memory is left out
        return torch.cat((mask[..., :1], mask), -1)[..., 1:]
    return mask


def _in_pairs(mask: Tensor, kv_len: int) -> bool:
    """As the plan decides it."""
    strides = [s for n, s in zip(mask.shape[:-1], mask.stride()) if n > 1]
    even = not any(s % 2 for s in (*strides, mask.storage_offset(), kv_len))
    return even and mask.shape[-1] > 1 and mask.stride(-1) == 1


def on_device(mask: Tensor | None) -> Tensor | None:
    """With its strides and offset."""
    if mask is None:
        return None
    whole = torch.empty(0, dtype=mask.dtype).set_(mask.untyped_storage()).to("mps")
    return whole.as_strided(mask.shape, mask.stride(), mask.storage_offset())


def mathematics(
    case: Case, operands: tuple[Tensor, ...], scoring: Scoring, dlse: Tensor | None
) -> tuple[MathResult, MathResult]:
    """In float64 and in the case's own dtype."""
    arguments = scoring._asdict() | {"dropout_seed": SEED}
    exact, own = (
        math_attention(*operands, dlse, dtype=dtype, **arguments)
        for dtype in (torch.float64, case.dtype)
    )
    return exact, own


@pytest.mark.parametrize(("family", "row"), list(problems()))
def test_two_features_together(
    family: str, row: Choices, recording, monkeypatch: pytest.MonkeyPatch
):
    pairs, storing = FAMILIES[family]
    monkeypatch.setenv("ORCHARD_BACKWARD_SCRATCH_MB", "64" if storing else "0")
    case = case_of(row)
    operands = case.operands()
    mask = mask_of(row, case)
    scoring = case.scoring()._replace(attn_mask=mask)
    dlse = torch.randn(operands[0].shape[:3]) if row["dlse"] else None
    ref, eager = mathematics(case, operands, scoring, dlse)
    on_metal = case.scoring("mps")._replace(attn_mask=on_device(mask))
    with recording() as launches:
        results = run(
            case, *(x.to("mps") for x in operands), None if dlse is None else dlse.to("mps"),
            scoring=on_metal, mask_grad=row["mask_grad"],
        )  # fmt: skip
    if launches is not None:
        names = [launch.kernel.partition(f"_{str(case.dtype)[6:]}_")[0] for launch in launches]
        assert f"attention_backward_dkv{'_pairs' * pairs}" in names
        assert f"attention_backward_dq{'_from_ds' * storing}" in names
    assert_attention_close(results, ref, eager)
