"""`orchard_ops.report`: each distinct call that ran, by path, and nothing else; the log."""

from __future__ import annotations

import io
import json
import logging
import threading

import pytest
import torch
import torch.nn.functional as F
from attention_cases import Case
from torch.nn.attention import SDPBackend, sdpa_kernel

import orchard_ops
from orchard_ops.descriptions import describe_sdpa

FORWARD, BACKWARD = "forward", "backward"


def operands(device: str = "mps", head_dim: int = 16, dtype: torch.dtype = torch.float32) -> list:
    case = Case(24, 40, head_dim, dtype=dtype)
    return [x.to(device).requires_grad_() for x in case.operands()[:3]]


def attend(q, k, v, **arguments):
    return orchard_ops.flash_attn(q, k, v, enable_gqa=True, **arguments)


def train(q, k, v, **arguments) -> None:
    out = attend(q, k, v, **arguments)
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out).contiguous())


def counts(report: orchard_ops.Report) -> dict[tuple[str, str], int]:
    """(direction, path) -> calls"""
    found: dict[tuple[str, str], int] = {}
    for call in report.calls:
        key = call.direction, call.path
        found[key] = found.get(key, 0) + call.count
    return found


@pytest.fixture
def agrees(fresh_stats: None):
    """The report and the native library's own counters are two counts of the same calls."""

    def check(report: orchard_ops.Report) -> None:
        found, metal = counts(report), orchard_ops.stats().metal
        assert found.get((FORWARD, "metal"), 0) == metal["flash_attn_fwd"]
        assert found.get((BACKWARD, "metal"), 0) == metal["flash_attn_bwd"]
        reference = orchard_ops.stats().reference.values()
        for direction, op in ((FORWARD, "flash_attn_fwd"), (BACKWARD, "flash_attn_bwd")):
            expected = sum(ops.get(op, 0) for ops in reference)
            assert found.get((direction, "reference"), 0) == expected

    return check


# ---- what is seen -------------------------------------------------------------------------------


def eager(q, k, v):
    train(q, k, v)


def no_grad(q, k, v):
    with torch.no_grad():
        attend(q, k, v)


def inference_mode(q, k, v):
    with torch.inference_mode():
        attend(*(x.clone() for x in (q, k, v)))
        torch.ops.orchard.flash_attn(*(x.clone() for x in (q, k, v)), enable_gqa=True)


def functional_pair(q, k, v):
    out, _ = torch.ops.orchard.flash_attn_fwd(q, k, v, *Case(24, 40, 16).scoring(), "auto")
    out.sum().backward()


def compiled(q, k, v):
    step = torch.compile(lambda *x: attend(*x).square().sum(), backend="aot_eager")
    for _ in range(2):
        step(q, k, v).backward()


def inductor(q, k, v):
    step = torch.compile(lambda q, k, v: (attend(q * 2, k, v) + 1).square().sum())
    for _ in range(2):
        step(q, k, v).backward()


def func_grad(q, k, v):
    torch.func.grad(lambda q: attend(q, k.detach(), v.detach()).square().sum())(q.detach())


def vmapped(q, k, v):
    torch.vmap(lambda q: attend(q, k.detach(), v.detach()))(torch.stack([q.detach()] * 3))


def checkpointed(q, k, v):
    from torch.utils.checkpoint import checkpoint

    checkpoint(attend, q, k, v, use_reentrant=False).square().sum().backward()


def under_a_mode(q, k, v):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        train(q, k, v)


def autocast(q, k, v):
    with torch.autocast("mps", dtype=torch.float16):
        train(q, k, v)


def other_thread(q, k, v):
    thread = threading.Thread(target=train, args=(q, k, v))
    thread.start()
    thread.join()


def reference(q, k, v):
    train(q, k, v, impl="reference")


WAYS = {
    "eager": (eager, (1, 1)),
    "no_grad": (no_grad, (1, 0)),
    "inference_mode": (inference_mode, (2, 0)),
    "functional pair": (functional_pair, (1, 1)),
    "torch.compile": (compiled, (2, 2)),
    "torch.compile, inductor": (inductor, (2, 2)),
    "torch.func.grad": (func_grad, (1, 1)),
    "vmap": (vmapped, (1, 0)),
    "checkpoint": (checkpointed, (2, 1)),
    "a dispatch mode": (under_a_mode, (1, 1)),
    "autocast": (autocast, (1, 1)),
    "another thread": (other_thread, (1, 1)),
    "impl=reference": (reference, (1, 1)),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_call_is_counted_once(way: str, agrees):
    call, (forwards, backwards) = WAYS[way]
    q, k, v = operands("mps")
    with orchard_ops.report(show=False) as report:
        call(q, k, v)
    found = counts(report)
    path = "reference" if way == "impl=reference" else "metal"
    assert found.get((FORWARD, path), 0) == forwards
    assert found.get((BACKWARD, path), 0) == backwards
    assert {p for _, p in found} == {path}
    agrees(report)


def test_only_the_block_is_seen(fresh_stats: None):
    q, k, v = operands("mps")
    train(q, k, v)
    with orchard_ops.report(show=False) as report:
        pass
    train(q, k, v)
    assert report.calls == []


def test_blocks_nest(fresh_stats: None):
    q, k, v = operands("mps")
    with orchard_ops.report(show=False) as outer:
        train(q, k, v)
        with orchard_ops.report(show=False) as inner:
            train(q, k, v)
    assert (len(inner.calls), len(outer.calls)) == (2, 2)
    assert [call.count for call in inner.calls] == [1, 1]
    assert [call.count for call in outer.calls] == [2, 2]


def test_a_call_that_raises_is_not_listed(fresh_stats: None):
    q, k, v = operands("mps", head_dim=257)
    with orchard_ops.report(show=False) as report, pytest.raises(RuntimeError, match="above 256"):
        attend(q, k, v, impl="metal")
    assert report.calls == []


# ---- what is said -------------------------------------------------------------------------------


def test_kernels_are_those_that_are_launched(fresh_stats: None):
    import simulator

    for arguments in ({}, {"softcap": 30.0}, {"attn_mask": torch.zeros(24, 40, device="mps")}):
        q, k, v = operands("mps", head_dim=64)
        with orchard_ops.report(show=False) as report, simulator.recording() as launches:
            train(q, k, v, **arguments)
        said = [name for call in report.calls for name in call.kernels]
        assert list(dict.fromkeys(said)) == list(dict.fromkeys(x.kernel for x in launches))


def test_a_fallback_has_its_reason_and_advice(quiet_fallback: None, agrees):
    q, k, v = operands("mps", head_dim=300)
    with orchard_ops.report(show=False) as report:
        train(q, k, v)
        train(q, k, v, is_causal=True)
    assert [call.path for call in report.calls] == ["reference"] * 4
    for call in report.calls:
        assert (call.reason, call.kernels) == ("head_dim is above 256", ())
        assert call.advice == orchard_ops.explain(q, k, v, enable_gqa=True).advice != ""
    assert [call.arguments for call in report.calls] == ["", "", "causal", "causal"]
    agrees(report)


def test_calls_of_one_problem_are_one_entry_in_any_layout(fresh_stats: None):
    """Rows that begin elsewhere need other kernels; another order of dimensions does not."""
    q, k, v = (x.detach() for x in operands("mps"))
    shifted = torch.empty(q.numel() + 1, device="mps")[1:].view(q.shape)
    shifted.copy_(q)
    length_first = q.transpose(1, 2).contiguous().transpose(1, 2)
    with orchard_ops.report(show=False) as report:
        for query in (q, length_first, q, shifted):
            attend(query, k, v)
    assert [call.count for call in report.calls] == [3, 1]
    assert report.calls[1].advice.startswith("rows that start at multiples of 16 bytes")


def test_arguments_are_told_apart(fresh_stats: None):
    q, k, v = (x.detach() for x in operands("mps"))
    mask = torch.zeros(24, 40, dtype=torch.bool, device="mps").fill_(True)
    with orchard_ops.report(show=False) as report:
        attend(q, k, v, window_left=3, scale=0.5)
        attend(q, k, v, dropout_p=0.25, softcap=20.0)
        attend(q, k, v, attn_mask=mask, sinks=torch.zeros(q.shape[1], device="mps"))
    assert [call.arguments for call in report.calls] == [
        "window_left 3, scale 0.5",
        "dropout_p 0.25, softcap 20",
        f"attn_mask (1, 1, 24, 40) bool, sinks ({q.shape[1]},) float32",
    ]


def test_bytes_are_those_of_the_softmax_that_stock_keeps(fresh_stats: None):
    q, k, v = operands("mps", dtype=torch.float16)
    (batch, heads, q_len, _), kv_len = q.shape, k.shape[2]
    with orchard_ops.report(show=False) as report:
        attend(q, k, v)  # a forward alone keeps nothing for long
        for _ in range(3):
            train(q, k, v)
    assert report.bytes_not_allocated == 3 * 4 * batch * heads * q_len * kv_len


def test_the_text_and_the_data_say_the_same(fresh_stats: None):
    q, k, v = operands("mps")
    file = io.StringIO()
    with orchard_ops.report(file) as report:
        train(q, k, v)
    assert file.getvalue() == f"{report}\n"
    first, *rest = file.getvalue().splitlines()
    assert first == "orchard_ops: 2 attention calls on Metal, 0 on the reference"
    data = json.loads(json.dumps(report.as_dict()))
    for call in data["calls"]:
        assert any(line.startswith(f"1 x {call['direction']} on metal") for line in rest)
        assert all(f"    kernel: {name}" in rest for name in call["kernels"])
    assert data["bytes_not_allocated"] == report.bytes_not_allocated


def test_an_empty_report_says_what_is_not_seen(capsys: pytest.CaptureFixture[str]):
    with orchard_ops.report():
        q = torch.ones(1, 1, 4, 8)
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    said = capsys.readouterr().out
    assert said.startswith("orchard_ops: no attention call was seen. Not seen are ")
    assert "F.scaled_dot_product_attention that is not taken over" in said


# ---- the log ------------------------------------------------------------------------------------


def test_the_log_has_each_distinct_call_once(
    fresh_stats: None, quiet_fallback: None, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG, logger="orchard_ops")
    wide, narrow = operands("mps", head_dim=300), operands("mps")
    for _ in range(2):
        attend(*(x.detach() for x in wide))
        attend(*(x.detach() for x in wide), is_causal=True)
        attend(*(x.detach() for x in narrow))  # on Metal, so it is not logged
        attend(*(x.detach().cpu() for x in narrow))
    assert [(r.levelname, r.name) for r in caplog.records] == [
        ("WARNING", "orchard_ops"),
        ("WARNING", "orchard_ops"),
        ("DEBUG", "orchard_ops"),
    ]
    first, second, third = (record.getMessage() for record in caplog.records)
    assert "head_dim is above 256; query (1, 2, 24, 300)" in first and "causal" not in first
    assert second.endswith(", causal")
    assert "the tensors are on cpu, not on mps" in third


def test_a_program_without_logging_reads_one_warning(capfd: pytest.CaptureFixture[str]):
    """The logger has a handler of its own, or Python would print the record beside the warning."""
    import subprocess
    import sys

    code = (
        "import simulator; simulator.enable()\nimport torch, orchard_ops\n"
        "q = torch.randn(1, 2, 5, 300, device='mps')\norchard_ops.flash_attn(q, q, q)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.count("head_dim is above 256") == 1


def test_the_log_does_not_grow_without_end(
    fresh_stats: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(orchard_ops.calls, "_MOST_LOGGED", 2)
    caplog.set_level(logging.DEBUG, logger="orchard_ops")
    for length in range(3, 8):
        q = torch.ones(1, 1, length, 8)
        orchard_ops.flash_attn(q, q, q)
    assert len(caplog.records) == len(orchard_ops.calls._logged) == 2


# ---- F.scaled_dot_product_attention, taken over -------------------------------------------------


def test_calls_that_are_taken_over_are_seen(agrees):
    q, k, v = operands("mps")
    with orchard_ops.sdpa(), orchard_ops.report(show=False) as report:
        F.scaled_dot_product_attention(q, k, v, enable_gqa=True).sum().backward()
    assert counts(report) == {(FORWARD, "metal"): 1, (BACKWARD, "metal"): 1}
    agrees(report)


def test_calls_that_are_left_to_pytorch_are_listed_with_the_reason(
    fresh_stats: None, quiet_fallback: None, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG, logger="orchard_ops")
    q, k, v = (x.detach() for x in operands("mps"))
    wide = torch.ones(1, 1, 4, 300, device="mps")
    with orchard_ops.sdpa(), orchard_ops.report(show=False) as report:
        for _ in range(2):
            F.scaled_dot_product_attention(wide, wide, wide, is_causal=True, scale=0.5)
        with sdpa_kernel(SDPBackend.MATH):
            F.scaled_dot_product_attention(q, k, v, scale=2.0, enable_gqa=True)
    not_allowed = (
        "sdpa_kernel or torch.backends.cuda.enable_flash_sdp does not allow "
        "SDPBackend.FLASH_ATTENTION"
    )
    assert [(c.path, c.reason, c.arguments, c.count) for c in report.calls] == [
        ("pytorch", "head_dim is above 256", "causal, scale 0.5", 2),
        ("pytorch", not_allowed, "scale 2", 1),
    ]
    assert report.bytes_not_allocated == 0
    first, second, *_ = str(report).splitlines()
    assert first.endswith("0 on the reference, 3 left to PyTorch")
    assert second.startswith("2 x forward left to PyTorch: query (1, 1, 4, 300)")
    assert sum(call.count for call in report.calls) == sum(
        orchard_ops.stats().left_to_pytorch.values()
    )
    assert [record.levelname for record in caplog.records] == ["WARNING", "DEBUG"]


def test_lengths_of_a_compiler_stay_open(fresh_stats: None, quiet_fallback: None):
    """Describing a call that is traced does not fix its lengths, or others would be traced anew."""
    torch.compiler.reset()
    step = torch.compile(F.scaled_dot_product_attention, backend="aot_eager", dynamic=True)
    traced = []
    with orchard_ops.sdpa(), orchard_ops.report(show=False) as report:
        for length in (4, 5, 6, 7):
            x = torch.ones(1, 1, length, 300, device="mps")
            step(x, x, x)
            traced.append(sum(call.count for call in report.calls))
    torch.compiler.reset()
    assert traced == [traced[0]] * 4 and traced[0] > 0


def test_nested_tensors_are_described():
    x = torch.nested.as_nested_tensor([torch.ones(2, 3, 8), torch.ones(2, 5, 8)])
    assert x.is_nested and x.layout == torch.strided  # which have no shape
    found = describe_sdpa(x, x, x, None, 0.1, False, None, False)
    assert found == ((), (), (), "float32", "cpu", "dropout_p 0.1")
