"""The demo: its twins agree, see the same masks, and a wrong attention function fails it."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

import orchard_ops
from orchard_ops.__main__ import build_parser, main
from orchard_ops.commands.demo import run
from orchard_ops.commands.demo.attention import orchard_attention, sdpa_math_attention
from orchard_ops.commands.demo.data import Corpus, batches, indent_with_tabs, load_corpus
from orchard_ops.commands.demo.model import GPT, ModelConfig, generate
from orchard_ops.commands.demo.training import TOLERANCE, Comparison, TrainingConfig, train_twins
from orchard_ops.commands.machine import chip

MODEL = ModelConfig(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, context_length=24)
TRAINING = TrainingConfig(
    steps=5, batch_size=2, learning_rate=1e-3, warmup_steps=2, held_out_batches=2
)
STEPS = TRAINING.steps


@pytest.fixture(params=["cpu", "mps"])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "mps" and not torch.backends.mps.is_available():
        pytest.skip("no mps device in this process")
    return torch.device(request.param)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus()


def train(corpus: Corpus, device: torch.device, attention=orchard_attention) -> Comparison:
    return train_twins(MODEL, TRAINING, corpus, device, attention, sdpa_math_attention)


def run_demo(tmp_path: Path, *options: str, **changes) -> tuple[int, dict]:
    """Exit status and JSON of a small run."""
    report = tmp_path / "report" / "demo.json"
    argv = ["demo", "--steps", str(STEPS), "--sample-bytes", "5", "--output", str(tmp_path / "out")]
    args = build_parser().parse_args([*argv, "--json", str(report), *options])
    status = run(args, model=MODEL, training=TRAINING, **changes)
    return status, json.loads(report.read_text())


def slightly_wrong(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
    return orchard_attention(query * 1.5, key, value, dropout_p)


def not_causal(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
    return torch.ops.orchard.flash_attn(query, key, value, None, dropout_p, enable_gqa=True)


def other_masks(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
    """Draws as often as the op, but gets other seeds."""
    if dropout_p > 0.0:
        after = torch.randint(2**63 - 1, (), dtype=torch.int64)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(after))
            return orchard_attention(query, key, value, dropout_p)
    return orchard_attention(query, key, value, dropout_p)


def makes_nan(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
    return orchard_attention(query, key, value, dropout_p) * math.nan


# ---- attention ----------------------------------------------------------------------------------


def exact(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, rescale: float) -> Tensor:
    """Causal attention with a given dropout mask, as in the definition."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    weights = scores.masked_fill(~causal, -math.inf).softmax(-1)
    return (weights * keep * rescale) @ v


# 0.3 and 0.1 are not multiples of 2^-16: the rounded rate must be the one that rescales.
@pytest.mark.parametrize("dropout_p", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("attention", [sdpa_math_attention, orchard_attention])
def test_attention_uses_the_mask_of_the_generator_state(attention, dropout_p: float) -> None:
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, heads, 33, 8, dtype=torch.float64) for heads in (4, 2, 2))
    state = torch.get_rng_state()
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64)
    keep = orchard_ops.dropout_mask(seed, dropout_p, (2, 4, 33, 33))
    rescale = 1.0 / (1.0 - round(dropout_p * 2**16) / 2**16)
    torch.set_rng_state(state)
    out = attention(q, k, v, dropout_p)
    torch.testing.assert_close(out, exact(q, k, v, keep, rescale), rtol=1e-10, atol=1e-10)


def test_both_attentions_agree_with_gradients(device: torch.device) -> None:
    torch.manual_seed(4)
    cpu = [torch.randn(2, heads, 40, 16, requires_grad=True) for heads in (4, 2, 2)]
    there = [x.detach().to(device).requires_grad_() for x in cpu]
    weight = torch.randn(2, 4, 40, 16)
    state = torch.get_rng_state()
    twin = sdpa_math_attention(cpu[0], cpu[1], cpu[2], 0.25)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    out = orchard_attention(there[0], there[1], there[2], 0.25)
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(after, state)
    (twin * weight).sum().backward()
    (out * weight.to(device)).sum().backward()
    torch.testing.assert_close(out.cpu(), twin, rtol=1e-4, atol=1e-5)
    for x, y in zip(there, cpu, strict=True):
        assert x.grad is not None
        torch.testing.assert_close(x.grad.cpu(), y.grad, rtol=1e-4, atol=1e-5)


# ---- data and model -----------------------------------------------------------------------------


def test_batches_are_seeded_excerpts_shifted_by_one() -> None:
    text = torch.arange(200, dtype=torch.uint8)
    first, second = (batches(text, 3, 10, seed=1) for _ in range(2))
    state = torch.get_rng_state()
    for _ in range(20):
        tokens, targets = next(first)
        assert tokens.shape == targets.shape == (3, 10)
        assert torch.equal(targets, tokens + 1)
        assert torch.equal(tokens, next(second)[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(next(batches(text, 3, 10, seed=2))[0], next(batches(text, 3, 10, 1))[0])


def test_corpus_keeps_whole_files_apart(tmp_path: Path) -> None:
    files = []
    for i in range(20):
        files.append(tmp_path / f"{i:02}.py")
        files[-1].write_bytes(bytes([65 + i]) * 5)
    corpus = load_corpus(files)
    assert bytes(corpus.held_out.tolist()) == b"JJJJJTTTTT"
    assert set(corpus.train.tolist()).isdisjoint(corpus.held_out.tolist())
    assert len(corpus.train) == 18 * 5
    assert corpus.num_files == 20


def test_indentation() -> None:
    assert indent_with_tabs(b"a    b\n    c\n         d\n  e") == b"a    b\n\tc\n\t\t d\n  e"


def test_model_is_causal_and_drops_only_in_training() -> None:
    torch.manual_seed(0)
    model = GPT(MODEL, orchard_attention).eval()
    tokens = torch.randint(256, (2, 24))
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])
    assert torch.equal(model(tokens), before)
    model.train()
    assert not torch.equal(model(tokens), before)


def test_generated_text_is_seeded(device: torch.device) -> None:
    torch.manual_seed(0)
    model = GPT(MODEL, orchard_attention).to(device)
    first = generate(model, b"import ", 20, seed=1)  # longer than the context
    assert len(first) == 20
    assert generate(model, b"import ", 20, seed=1) == first
    assert generate(model, b"import ", 20, seed=2) != first
    assert model.training


def test_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    config = TrainingConfig(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [config.learning_rate_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(rates) == pytest.approx(1.0)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


# ---- the twins ----------------------------------------------------------------------------------


def test_twins_agree(corpus: Corpus, device: torch.device) -> None:
    state = torch.get_rng_state()
    comparison = train(corpus, device)
    assert len(comparison.device_run.losses) == len(comparison.cpu_run.losses) == STEPS
    assert comparison.first_disagreement(1e-5) is None
    assert comparison.held_out_relative_difference < 1e-5
    assert comparison.device_run.losses[0] == pytest.approx(math.log(256), rel=0.1)
    assert comparison.device_run.losses[-1] < comparison.device_run.losses[0]
    assert torch.equal(torch.get_rng_state(), state)


def test_twins_depend_on_the_masks(corpus: Corpus) -> None:
    comparison = train(corpus, torch.device("cpu"), other_masks)
    # Far above rounding, so that agreement to 1e-5 means the same masks.
    assert max(comparison.relative_differences) > 1e-5 * 3


def test_other_random_draws_are_refused(corpus: Corpus) -> None:
    def draws_twice(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
        torch.rand(())
        return orchard_attention(query, key, value, dropout_p)

    with pytest.raises(RuntimeError, match=r"step 1: .*dropout masks differ"):
        train(corpus, torch.device("cpu"), draws_twice)


def comparison_of(corpus: Corpus, device_losses: list[float], cpu_losses: list[float]):
    comparison = train_twins(
        MODEL,
        TrainingConfig(steps=1, batch_size=1, held_out_batches=1),
        corpus,
        torch.device("cpu"),
        orchard_attention,
        sdpa_math_attention,
    )
    comparison.device_run.losses[:] = device_losses
    comparison.cpu_run.losses[:] = cpu_losses
    return comparison


def test_disagreement_names_the_step(corpus: Corpus) -> None:
    comparison = comparison_of(corpus, [2.0, 2.001, 2.01, 2.004], [2.0, 2.0, 2.0, 2.0])
    assert comparison.first_disagreement() == 3
    assert comparison.largest_difference() == (pytest.approx(0.005), 3)
    comparison = comparison_of(corpus, [2.0, 3.0, math.nan], [2.0, 2.0, 2.0])
    assert comparison.largest_difference()[1] == 3
    assert comparison_of(corpus, [math.nan], [math.nan]).first_disagreement() == 1


# ---- the command --------------------------------------------------------------------------------


def test_demo_reports_everything(
    tmp_path: Path, device: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = run_demo(tmp_path, "--device", device.type, "--seed", "5")
    printed = " ".join(capsys.readouterr().out.split())
    assert status == 0, printed
    assert "PASSED" in printed
    assert report["passed"] is True
    assert report["failures"] == []
    assert report["config"]["model"]["num_kv_heads"] == 2
    assert report["config"]["training"]["seed"] == 5
    assert report["config"]["tolerance"] == TOLERANCE
    assert len(report["config"]["text_sha256"]) == 64
    assert report["environment"]["torch"] == torch.__version__
    assert report["environment"]["device"] == device.type
    assert report["environment"]["machine"] == chip() != ""
    assert platform.release() not in str(report["environment"])
    for name in ("device", "cpu"):
        assert len(report["losses"][name]) == STEPS
        assert report["tokens_per_second"][name] > 0
        assert 0 < report["held_out_loss"][name] < 10
    differences = report["relative_differences"]
    for a, b, difference in zip(*report["losses"].values(), differences, strict=True):
        assert abs(a - b) / b == pytest.approx(difference)
    worst = report["max_relative_difference"]
    assert worst["value"] == max(differences) == differences[worst["step"] - 1]
    assert report["fallbacks"] == 0
    assert report["seconds"] > 0
    assert Path(report["figure"]).read_bytes().startswith(b"\x89PNG")
    assert report["sample"] and report["prompt"].startswith("    def")

    forward = MODEL.num_layers * (STEPS + TRAINING.held_out_batches + 5)
    backward = MODEL.num_layers * STEPS
    calls = {"flash_attn_fwd": forward, "flash_attn_bwd": backward}
    if device.type == "mps":
        assert report["kernels"]["calls"] == calls
        assert report["kernels"]["names"]
        assert report["reference_calls"] == {}
    else:
        assert "reference on the CPU" in printed[:100]
        assert report["environment"]["kind"] == "cpu"
        assert report["kernels"]["names"] == []
        assert list(report["reference_calls"].values()) == [calls]


@pytest.mark.parametrize("attention", [slightly_wrong, not_causal])
def test_wrong_attention_fails_the_demo(
    tmp_path: Path, attention, capsys: pytest.CaptureFixture[str]
) -> None:
    training = TrainingConfig(steps=STEPS, batch_size=2, warmup_steps=1, held_out_batches=1)
    args = build_parser().parse_args(
        [
            "demo",
            "--device",
            "cpu",
            "--steps",
            "30",
            "--sample-bytes",
            "1",
            "--output",
            str(tmp_path),
            "--json",
            str(tmp_path / "demo.json"),
        ]
    )
    assert run(args, MODEL, training, attention) == 1
    report = json.loads((tmp_path / "demo.json").read_text())
    differences = report["relative_differences"]
    step = next(i for i, d in enumerate(differences, start=1) if d > TOLERANCE)
    assert f"at step {step}, more than" in report["failures"][0]
    assert report["passed"] is False
    printed = " ".join(capsys.readouterr().out.split())
    assert "FAILED: the losses differ" in printed
    assert "PASSED" not in printed


def test_nan_fails_the_demo_and_is_null_in_json(tmp_path: Path) -> None:
    status, report = run_demo(tmp_path, "--device", "cpu", attention=makes_nan)
    assert status == 1
    assert report["losses"]["device"] == [None] * STEPS
    assert report["max_relative_difference"] == {"value": None, "step": 1}
    assert "at step 1," in report["failures"][0]


def test_calls_that_miss_metal_fail_the_demo(tmp_path: Path) -> None:
    if not torch.backends.mps.is_available():
        pytest.skip("no mps device in this process")

    def on_the_reference(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
        return orchard_ops.flash_attn(
            query, key, value, None, dropout_p, is_causal=True, enable_gqa=True, impl="reference"
        )

    status, report = run_demo(tmp_path, "--device", "mps", attention=on_the_reference)
    assert status == 1
    assert report["fallbacks"] > 0
    assert any("fell back" in failure for failure in report["failures"])
    assert any("backward calls ran as Metal" in failure for failure in report["failures"])


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac has an mps device")
def test_machine_without_mps(tmp_path: Path) -> None:
    """In a process of its own: this one has the simulated device."""

    def demo(*options: str) -> subprocess.CompletedProcess[str]:
        argv = ["demo", "--steps", "1", "--sample-bytes", "1", "--output", str(tmp_path / "out")]
        return subprocess.run(
            [sys.executable, "-m", "orchard_ops", *argv, *options],
            capture_output=True,
            text=True,
            timeout=300,
        )

    refused = demo("--device", "mps")
    assert refused.returncode == 2
    assert 'no "mps" device here' in refused.stderr
    assert not (tmp_path / "out").exists()

    ran = demo()
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("cpu: reference on the CPU (there is no Apple GPU here)")
    assert ran.stderr == ""


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "demo" in capsys.readouterr().out
    for steps in ("0", "-3", "many"):
        with pytest.raises(SystemExit) as error:
            main(["demo", "--steps", steps])
        assert error.value.code == 2
        assert "--steps" in capsys.readouterr().err
