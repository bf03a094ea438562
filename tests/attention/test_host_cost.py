"""What a call costs the host, in counts: it does not wait, takes no extra memory and repeats no
work.

benchmarks/host/measure.py measures times, which are no test: a loaded machine must not fail.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import simulator
import torch
from counted import HALF, B, Counted, D, H, L, S, qkv

import orchard_ops

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks.host import flex, measure, takeover  # noqa: E402


class TestRecordingEngine:
    def test_launches_are_recorded_as_they_would_run(self):
        q, k, v = qkv()
        with simulator.recording() as executed:
            orchard_ops.flash_attn(q, k, v, enable_gqa=True)
        with simulator.recording(execute=False) as recorded:
            orchard_ops.flash_attn(q, k, v, enable_gqa=True)
        assert len(recorded) == len(executed) == 1
        for field in ("kernel", "threads", "group", "arguments"):
            assert getattr(recorded[0], field) == getattr(executed[0], field)

    def test_nothing_runs(self):
        # No other test has these operands: memory that is used again may still hold another test's
        # results.
        q, k, v = (x + 0.625 for x in qkv())
        with simulator.recording() as executed, simulator.recording(execute=False):
            out = orchard_ops.flash_attn(q, k, v, enable_gqa=True)
        assert executed == []
        with simulator.recording() as launches:
            expected = orchard_ops.flash_attn(q, k, v, enable_gqa=True)
        assert len(launches) == 1
        assert not torch.equal(out, expected)  # what lay in memory

    def test_does_not_nest(self):
        with (
            simulator.recording(execute=False),
            pytest.raises(RuntimeError, match="inside another"),
            simulator.recording(execute=False),
        ):
            pass

    def test_waits_are_counted(self):
        x = torch.ones(2, device="mps")
        for wait, kind in (
            (torch.mps.synchronize, "synchronize"),
            (x.cpu, "copy"),
            (lambda: torch.ones(2).to("mps"), "copy"),
            (lambda: x.sum().item(), "read"),
            (lambda: torch.nonzero(x), "read"),
        ):
            before = getattr(simulator.waits(), kind)
            wait()
            assert getattr(simulator.waits(), kind) == before + 1


@pytest.mark.parametrize("dropout_p", (0.0, 0.25))
class TestNoWaitingAndNoExtraMemory:
    def test_forward(self, dropout_p: float):
        q, k, v = qkv()
        with Counted() as counted:
            out = orchard_ops.flash_attn(
                q, k, v, enable_gqa=True, is_causal=True, dropout_p=dropout_p
            )
        assert counted.num_waits == 0
        assert counted.num_allocations == 2  # out, row_stats
        assert counted.peak_bytes == out.numel() * HALF + B * H * L * 2 * 4

    @pytest.mark.parametrize("head_dim", (D, 64))
    def test_backward(self, dropout_p: float, head_dim: int):
        leaves = qkv(requires_grad=True, head_dim=head_dim)
        out = orchard_ops.flash_attn(*leaves, enable_gqa=True, is_causal=True, dropout_p=dropout_p)
        dout = torch.randn_like(out)
        with Counted() as counted:
            grads = torch.autograd.grad(out, leaves, dout)
        assert counted.num_waits == 0
        ds = B * H * L * S * 4 if head_dim >= 64 else 0
        assert counted.num_allocations == 4 + (ds > 0)  # dq, dk, dv, delta
        assert counted.peak_bytes == sum(x.numel() for x in grads) * HALF + B * H * L * 4 + ds


def test_a_call_that_was_taken_over_waits_and_allocates_as_much():
    q, k, v = qkv()
    with orchard_ops.sdpa(), Counted() as counted:
        torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True)
    assert counted.num_waits == 0
    assert counted.num_allocations == 2  # out, row_stats


class GPT(torch.nn.Module):
    """The attention calls of two layers, with dropout in training and without in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        width = H * D
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, 3 * width) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            q, k, v = layer(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
            dropout_p = 0.1 if self.training else 0.0
            attended = orchard_ops.flash_attn(
                q, k, v, enable_gqa=True, is_causal=True, dropout_p=dropout_p
            )
            x = x + attended.transpose(1, 2).flatten(2)
        return x


def test_a_training_run_compiles_few_variants():
    model = GPT().to("mps")
    optimizer = torch.optim.AdamW(model.parameters())
    with simulator.recording() as launches:
        for step, length in enumerate((16, 16, 11)):  # the last batch is shorter
            optimizer.zero_grad()
            model.train()(torch.randn(2, length, H * D, device="mps")).square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                model.eval()(torch.randn(1, length + step, H * D, device="mps"))
    variants = {launch.kernel for launch in launches}
    # Two layers: forward, delta, dk and dv, dq; forward.
    assert len(launches) == 3 * 2 * 5
    assert len(variants) <= 5, variants


# ---- what is documented -------------------------------------------------------------------------


def test_the_documented_command_makes_the_documented_table():
    text = (ROOT / "docs" / "performance-tables.md").read_text()
    result = json.loads(measure.RESULT.read_text())
    for line in measure.table(result).splitlines():
        assert line in text
    environment = result["environment"]
    settings = (environment["batches"], environment["repeats"])
    assert settings == (measure.BATCHES, measure.REPEATS)  # what the command takes by default
    assert "one of {} batches of {} repeats".format(*settings) in text


def test_the_quietest_batch_is_that_of_the_control_s_lowest_median():
    def batch(control: list[float], ours: list[float]) -> measure.Times:
        rows = ((measure.PEERS[0], control), ("orchard_ops.flash_attn", ours))
        return {(name, measure.WAYS[3]): {"whole": times} for name, times in rows}

    quiet, spiky, loud = batch([5, 5, 90], [9]), batch([1, 7, 7], [1]), batch([8, 8, 8], [2])
    assert measure.quietest([spiky, quiet, loud]) is quiet


def test_the_documented_cost_of_the_takeover():
    text = (ROOT / "docs" / "sdpa.md").read_text()
    result = json.loads(takeover.RESULT.read_text())
    for line in takeover.table(result).splitlines():
        assert line in text
    for figure in (result["switch"], result["left_to_pytorch"]):
        assert f"{figure['median']:.1f}" in text
    assert result["environment"]["repeats"] == takeover.REPEATS
    assert f"over {takeover.REPEATS} repeats" in text
    for case, figures in result["microseconds_above"][takeover.OP].items():
        assert figures["median"] < 10.0, case


def test_the_table_of_flex_attention_is_that_of_the_data():
    """`python -m simulator -m benchmarks.host.flex` writes both."""
    page = (ROOT / "docs" / "flex-attention.md").read_text()
    assert flex.table(json.loads(flex.RESULT.read_text())) in page
