"""Values narrower than queries: 128 beside 192, as multi-head latent attention has, take tiles of
their own width."""

from __future__ import annotations

import sys

import pytest
import torch
from attention_cases import DTYPES, Case, check_case

if sys.platform != "linux":
    pytest.skip("products are counted on the simulated device", allow_module_level=True)

import simulator

FROM_DS, DQ = "attention_backward_dq_from_ds", "attention_backward_dq"
PRODUCTS = {  # for a pair of fragments: of the head dim, and of the values
    "attention_forward": (1, 1),
    "attention_backward_dkv_pairs": (2, 2),
    DQ: (2, 1),
    FROM_DS: (1, 0),
}


@pytest.mark.parametrize("scratch", ("0", "64"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "value_dim"), ((192, 128), (170, 33)))
@pytest.mark.usefixtures("checked")
def test_products_follow_the_values(
    head_dim: int, value_dim: int, dtype: torch.dtype, scratch: str, monkeypatch: pytest.MonkeyPatch
):
    """Results obey the rule, and no product is of columns beyond the padded widths."""
    monkeypatch.setenv("ORCHARD_BACKWARD_SCRATCH_MB", scratch)
    case = Case(96, 128, head_dim, num_heads=2, num_kv_heads=1, dtype=dtype, value_dim=value_dim)
    with simulator.recording() as launches:
        check_case(case)
    width, of_values = 192 // 8, 128 // 8
    pairs = case.num_heads * (case.q_len // 8) * (case.kv_len // 8)
    found = {}
    for launch in launches:
        family = launch.kernel.partition(f"_{str(dtype)[6:]}")[0]
        if family in PRODUCTS:
            found[family] = launch.counters.mma
            assert launch.kernel.endswith("_v128") == (family != FROM_DS)
    expected = {
        name: pairs * (a * width + b * of_values)
        for name, (a, b) in PRODUCTS.items()
        if name != (DQ if scratch != "0" else FROM_DS)
    }
    assert found == expected


FEATURES = {
    "causal, bottom right": {"window_right": 0, "diagonal": 32, "dropout_p": 0.2},
    "scores": {"softcap": 2.0, "alibi": "head", "sinks": True},
    "mask": {"mask": "float32", "window_left": 40},
    "documents": {"ranges": "documents", "window_right": 0, "kv_len": 96},
}


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.usefixtures("checked")
def test_beside_every_feature(dtype: torch.dtype, name: str):
    check_case(Case(96, 128, 192, num_heads=2, dtype=dtype, value_dim=128).but(**FEATURES[name]))
