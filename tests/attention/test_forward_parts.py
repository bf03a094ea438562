"""A forward of few threadgroups: each has a share of the keys, and a kernel merges what they leave.
Against float64, in the simulator's check mode."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case, check_case

from orchard_ops import explain

HALF, BFLOAT = torch.float16, torch.bfloat16
CASES = {
    "two heads, ragged": Case(70, 1100, 64, dtype=HALF),
    "two sequences, grouped heads": Case(9, 800, 40, batch=2, num_heads=4, num_kv_heads=2),
    "one query": Case(1, 1030, 16, dtype=BFLOAT),
    "causal, rows without a key, parts without a block": Case(
        560, 560, 32, num_heads=1, window_right=0, diagonal=-20
    ),
    "window": Case(75, 1300, 48, window_left=300, window_right=290, diagonal=200, dtype=BFLOAT),
    "dropout": Case(37, 700, 64, dtype=HALF, dropout_p=0.25),
    "boolean mask": Case(45, 650, 24, mask="bool"),
    "mask of keys": Case(45, 650, 24, mask="bool", mask_full=(True, False, False, True)),
    "additive mask, sinks": Case(33, 777, 64, mask="same", sinks=True, dtype=HALF),
    "sinks": Case(33, 513, 80, sinks=True),
    "softcap, ALiBi": Case(33, 520, 128, softcap=5.0, alibi="batch", batch=2),
    "narrow values": Case(50, 600, 192, value_dim=128, dtype=HALF),
    "values of 7": Case(20, 530, 64, value_dim=7, dtype=HALF),
    "any ranges": Case(60, 700, 32, ranges="any", batch=2, sinks=True),
    "documents": Case(60, 700, 32, ranges="documents", dropout_p=0.1),
    "padding": Case(60, 700, 64, ranges="padding", batch=2, dtype=HALF),
    "ranges, mask": Case(60, 600, 32, ranges="prefix", mask="bool", window_left=90),
}


def _kernels(launches) -> list[str]:
    return [x.kernel for x in launches if x.kernel.startswith("attention_forward")]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("checked")
def test_results_and_gradients(name: str, recording):
    with recording() as launches:
        check_case(CASES[name])
    if launches is not None:
        first, second = _kernels(launches)
        assert first.endswith("_part") and "merge" in second


def _forward(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v, _ = (x.to("mps") for x in case.operands())
    return torch.ops.orchard.flash_attn_fwd(q, k, v, *case.scoring("mps"))


def test_the_same_bits_in_every_run():
    case = CASES["dropout"]
    for x, y in zip(_forward(case), _forward(case)):
        assert torch.equal(x.cpu(), y.cpu())


def test_explained():
    case = CASES["two heads, ragged"]
    q, k, v, _ = (x.to("mps") for x in case.operands())
    found = explain(q.requires_grad_(), k, v, enable_gqa=True)
    if found.path == "metal":
        first, second = found.forward_kernels
        assert first.endswith("_part")
        assert found.tiles[second].startswith("keys in 4 parts, 147840 bytes for their sums; ")
