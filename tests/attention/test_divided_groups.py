"""Few key/value heads: the key's side of the backward divides a group's query heads between
threadgroups, and adds up their sums (shaders/dkv_parts.h)."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case, check_case, run

from orchard_ops import explain

CASES = {  # the parts of a group, and how many heads each has
    "causal": Case(128, 40, 64, batch=2, num_heads=8, num_kv_heads=2, dtype=torch.float16,
                   window_right=0, diagonal=-50),
    "dropout, windows, pairs": Case(90, 24, 128, num_heads=12, num_kv_heads=2, dropout_p=0.2,
                                    dtype=torch.bfloat16, window_left=40, window_right=5),
    "narrow values, D 256": Case(129, 20, 256, num_heads=4, num_kv_heads=1, value_dim=200,
                                 dtype=torch.float32),
    "softcap, documents": Case(64, 64, 30, num_heads=16, num_kv_heads=1, dtype=torch.float32,
                               softcap=2.0, ranges="documents", window_right=0),
    "bias, alibi, sinks": Case(256, 36, 40, num_heads=4, num_kv_heads=2, dtype=torch.float16,
                               mask="float32", alibi="head", sinks=True),
    "bias of keys": Case(130, 33, 64, batch=2, num_heads=4, num_kv_heads=1, dtype=torch.float16,
                         mask="same", mask_full=(True, True, False, True)),
}  # fmt: skip


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("name", CASES)
def test_results_obey_the_rule(name: str, recording):
    with recording() as launches:
        check_case(CASES[name])
    if launches is None:
        return
    kernels = [launch.kernel for launch in launches]
    assert sum("_dkv_" in kernel and kernel.endswith("_parts") for kernel in kernels) == 1
    assert sum("_dkv_sums_" in kernel for kernel in kernels) == 1


def test_twice_the_same_bits():
    case = CASES["dropout, windows, pairs"]
    operands = [x.to("mps") for x in case.operands()]
    first, second = run(case, *operands), run(case, *operands)
    assert all(map(torch.equal, first, second))


def test_parts_are_scratch(recording, monkeypatch: pytest.MonkeyPatch):
    """4 parts of 4 heads, whose sums take 64 x (64 + 64) floats each, beside dS; none in the
    low-memory mode."""
    case = Case(64, 64, 64, num_heads=16, num_kv_heads=1, dtype=torch.float16)
    q, k, v, _ = (x.to("mps").requires_grad_() for x in case.operands())
    found = explain(q, k, v, enable_gqa=True)
    assert found.scratch_bytes == 4 * 4 * 64 * 128 + 4 * 16 * 64 * 64
    assert any("dkv_sums" in kernel for kernel in found.kernels)
    monkeypatch.setenv("ORCHARD_BACKWARD_SCRATCH_MB", "0")
    low = explain(q, k, v, enable_gqa=True)
    assert low.scratch_bytes == 0 and "_parts" not in "".join(low.kernels)


TURNS = {  # how many launches share a MiB for dS, and how many of them the heads of a group take
    "heads": (Case(330, 300, 64, batch=2, num_heads=8, num_kv_heads=2, dtype=torch.float16,
                   window_right=0, diagonal=40), 8),
    "heads and keys, dropout": (Case(600, 400, 64, num_heads=4, num_kv_heads=1, dropout_p=0.2,
                                     dtype=torch.bfloat16), 8),
    "pairs, sums in parts": (Case(600, 90, 96, num_heads=12, num_kv_heads=1, dtype=torch.float32,
                                  softcap=3.0), 3),
    "sums in parts": (Case(1100, 70, 64, num_heads=8, num_kv_heads=1, value_dim=40,
                           dtype=torch.float32, alibi="head"), 4),
    "window": (Case(500, 500, 64, num_heads=8, num_kv_heads=1, dtype=torch.float16,
                    window_left=130, window_right=9), 4),
}  # fmt: skip


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("name", TURNS)
def test_heads_of_a_group_take_turns(name: str, recording, monkeypatch: pytest.MonkeyPatch):
    """dS of a whole group does not fit: parts of its heads share the buffer in turns."""
    monkeypatch.setenv("ORCHARD_BACKWARD_SCRATCH_MB", "1")
    monkeypatch.setenv("ORCHARD_GPU_CORES", "1")
    case, turns = TURNS[name]
    with recording() as launches:
        check_case(case)
    if launches is None:
        return
    kernels = [launch.kernel for launch in launches]
    assert sum("_dq_from_ds_" in kernel for kernel in kernels) == turns
    assert sum("_dkv_" in kernel and kernel.endswith("_parts") for kernel in kernels) == turns
    assert sum("_dkv_sums_" in kernel for kernel in kernels) == case.batch * case.num_kv_heads


WINDOWS = {  # any 8 queries see at most 108 keys, so that dS takes 128 for each
    "dropout": Case(500, 530, 64, num_heads=2, num_kv_heads=2, dtype=torch.bfloat16, dropout_p=0.1,
                    window_left=80, window_right=20, diagonal=15),
    "gradient of a bias": Case(200, 230, 128, dtype=torch.float32, mask="float32",
                               window_left=80, window_right=20, diagonal=15),
}  # fmt: skip


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("name", WINDOWS)
def test_keys_of_a_window_share_places(name: str, recording, monkeypatch: pytest.MonkeyPatch):
    case = WINDOWS[name]
    monkeypatch.setenv("ORCHARD_GPU_CORES", "1")
    q, k, v, _ = (x.to("mps").requires_grad_() for x in case.operands())
    found = explain(q, k, v, window_left=80, window_right=20, enable_gqa=True)
    heads = case.batch * case.num_heads
    assert found.scratch_bytes == 4 * heads * -(-case.q_len // 8) * 8 * 128
    monkeypatch.setenv("ORCHARD_BACKWARD_SCRATCH_MB", "2")
    with recording() as launches:
        check_case(case)
    if launches is not None:
        assert sum("_dq_from_ds_" in launch.kernel for launch in launches) == 1
