"""Training never crashes for want of a kernel, and never silently changes its result."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import Case

import orchard_ops

pytestmark = pytest.mark.skipif(
    sys.platform == "darwin", reason="injects faults into the simulator"
)

ROOT = Path(__file__).parents[2]

# Trains two attention layers with dropout on mps and prints losses, stats and warnings as JSON. The
# process is its own because a shader that failed to compile is not tried again.
TRAINING = """
import contextlib, json, time, warnings
import simulator
simulator.enable()
import torch, orchard_ops

def train(steps=4):
    torch.manual_seed(0)
    x = torch.randn(2, 24, 32).to("mps")
    layers = [torch.nn.Linear(32, 96).to("mps") for _ in range(2)]
    optimizer = torch.optim.SGD([p for l in layers for p in l.parameters()], lr=0.5)
    losses = []
    for _ in range(steps):
        h = x
        for layer in layers:
            q, k, v = layer(h).view(2, 24, 3, 2, 16).permute(2, 0, 3, 1, 4)
            h = torch.ops.orchard.flash_attn(q, k, v, dropout_p=0.2, is_causal=True)
            h = h.transpose(1, 2).reshape(2, 24, 32)
        loss = h.square().mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
    return losses

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with FAULT:
        losses = train()
# torch aborts at exit if autograd's worker thread still has Python references to let go of.
time.sleep(0.1)
print("RESULT" + json.dumps({
    "losses": losses,
    "metal": orchard_ops.stats().metal,
    "reference": orchard_ops.stats().reference,
    "fallbacks": orchard_ops.stats().fallbacks,
    "warnings": [str(w.message) for w in caught
                 if issubclass(w.category, orchard_ops.OrchardFallbackWarning)],
}))
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def train(fault: str = "contextlib.nullcontext()", **environment: str) -> dict:
    done = run_python(TRAINING.replace("FAULT", fault), **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("RESULT")[1])


@pytest.fixture(scope="module")
def undisturbed() -> dict:
    result = train()
    assert result["metal"] == {"flash_attn_fwd": 8, "flash_attn_bwd": 8}
    assert result["reference"] == {} and result["warnings"] == []
    return result


def assert_same_training(result: dict, undisturbed: dict) -> None:
    """Losses agree to rounding: the dropout masks must have been the same."""
    torch.testing.assert_close(
        torch.tensor(result["losses"]), torch.tensor(undisturbed["losses"]), rtol=1e-5, atol=1e-7
    )


def test_missing_library(undisturbed: dict, tmp_path: Path):
    result = train(ORCHARD_NATIVE_LIBRARY=str(tmp_path / "liborchard_ops.so"))
    assert_same_training(result, undisturbed)
    assert result["reference"] == {
        "the native library liborchard_ops.so is missing": {
            "flash_attn_fwd": 8,
            "flash_attn_bwd": 8,
        }
    }
    assert len(result["warnings"]) == 1


def test_library_that_does_not_load(undisturbed: dict, tmp_path: Path):
    broken = tmp_path / "liborchard_ops.so"
    broken.write_bytes(b"not a library")
    result = train(ORCHARD_NATIVE_LIBRARY=str(broken))
    assert_same_training(result, undisturbed)
    (reason,) = result["reference"]
    assert reason.startswith("liborchard_ops.so is not a native library of orchard_ops")
    assert len(result["warnings"]) == 1


@pytest.mark.parametrize(
    "fault, words",
    [
        ('simulator.faults(compile="all")', "does not compile"),
        ('simulator.faults(function="all")', "cannot be created"),
        ('simulator.faults(dispatch="all")', "the dispatch failed"),
    ],
)
def test_every_kernel_fails(undisturbed: dict, fault: str, words: str):
    result = train(fault)
    assert_same_training(result, undisturbed)
    assert result["metal"] == {"flash_attn_fwd": 0, "flash_attn_bwd": 0}
    assert result["fallbacks"] == 16
    assert len(result["reference"]) == 2  # the forward's and the backward's first kernel
    for reason, warning in zip(result["reference"], result["warnings"], strict=True):
        assert words in reason and reason in warning


@pytest.mark.parametrize("n", (1, 2, 3))
def test_one_shader_does_not_compile(undisturbed: dict, n: int):
    """The n-th of forward, dq and dk/dv does not compile: its op falls back for good, and the other
    op stays on Metal."""
    result = train(f"simulator.faults(compile={n})")
    assert_same_training(result, undisturbed)
    failed, other = ("fwd", "bwd") if n == 1 else ("bwd", "fwd")
    assert result["metal"] == {f"flash_attn_{failed}": 0, f"flash_attn_{other}": 8}
    assert len(result["warnings"]) == 1


@pytest.mark.parametrize("n", (1, 2, 4, 9, 24))
def test_one_dispatch_fails(undisturbed: dict, n: int):
    """Only that call falls back; the next one is tried on Metal again."""
    result = train(f"simulator.faults(dispatch={n})")
    assert_same_training(result, undisturbed)
    assert sum(result["metal"].values()) == 15 and result["fallbacks"] == 1
    assert len(result["warnings"]) == 1


def test_switched_off(undisturbed: dict):
    result = train(ORCHARD_DISABLE_METAL="1")
    assert_same_training(result, undisturbed)
    assert result["reference"] == {
        "ORCHARD_DISABLE_METAL is set": {"flash_attn_fwd": 8, "flash_attn_bwd": 8}
    }


def test_fast_math_is_refused(undisturbed: dict):
    """Shaders compiled without infinities would mask wrongly."""
    result = train(PYTORCH_MPS_FAST_MATH="1")
    assert_same_training(result, undisturbed)
    (reason,) = result["reference"]
    assert reason.startswith("PYTORCH_MPS_FAST_MATH is set")


def test_explain_knows_of_failed_shaders():
    code = (
        "import simulator; simulator.enable()\nimport torch, orchard_ops, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "q = torch.randn(1, 2, 5, 16, device='mps')\n"
        "print(orchard_ops.explain(q, q, q).path)\n"
        "with simulator.faults(compile='all'): orchard_ops.flash_attn(q, q, q)\n"
        "e = orchard_ops.explain(q, q, q)\n"
        "print(e.path, 'does not compile' in e.reason)\n"
    )
    done = run_python(code)
    assert done.stdout == "metal\nreference True\n", done.stderr


def test_strict_turns_a_fallback_into_an_error(tmp_path: Path):
    for environment in (
        {"ORCHARD_DISABLE_METAL": "1"},
        {"ORCHARD_NATIVE_LIBRARY": str(tmp_path / "liborchard_ops.so")},
    ):
        done = run_python(
            TRAINING.replace("FAULT", "contextlib.nullcontext()"), ORCHARD_STRICT="1", **environment
        )
        assert done.returncode == 1
        assert (
            "RuntimeError: orchard::flash_attn_fwd: the Metal kernels cannot run this call: "
            in (done.stderr)
        )


def test_strict_changes_nothing_where_metal_runs(undisturbed: dict):
    assert train(ORCHARD_STRICT="1") == undisturbed


@pytest.mark.parametrize("name", ("ORCHARD_DEBUG", "ORCHARD_DEBUG_FLASHATN"))
def test_debug_log_names_each_calls_path(name: str):
    code = (
        "import simulator; simulator.enable()\nimport torch, orchard_ops\n"
        "for device in ('mps', 'cpu'):\n"
        "    q = torch.randn(1, 2, 5, 16, device=device, requires_grad=True)\n"
        "    torch.ops.orchard.flash_attn(q, q, q).sum().backward()\n"
    )
    done = run_python(code, **{name: "1"})
    lines = [line for line in done.stderr.splitlines() if line.startswith("[orchard]")]
    assert [line.split(" (")[0] for line in lines] == [
        "[orchard] flash_attn_fwd: metal attention_forward_float32_d16_r2_k32_b1_chunks",
        # .sum() expands its gradient: no 16-byte rows
        "[orchard] flash_attn_bwd: metal attention_backward_delta_float32_d16_elements",
        "[orchard] flash_attn_bwd: metal attention_backward_dkv_float32_d16_q32_elements",
        "[orchard] flash_attn_bwd: metal attention_backward_dq_float32_d16_r1_k32_elements",
        "[orchard] flash_attn_fwd: reference",
        "[orchard] flash_attn_bwd: reference",
    ]
    assert not [line for line in run_python(code).stderr.splitlines() if "[orchard]" in line]


# ---- in this process ----------------------------------------------------------------------------


def refused(**changes: object) -> dict:
    case = Case(6, 7, 16)
    q, k, v, _ = (x.to("mps") for x in case.operands())
    return {"query": q, "key": k, "value": v} | changes


WIDE = {"query": torch.ones(1, 2, 6, 257), "key": torch.ones(1, 1, 7, 257)}
REFUSALS = {  # the arguments, and what the reason says of them
    "query": (WIDE, "head_dim is above 256", " (got 257)"),
    "value": ({"value": torch.ones(1, 1, 7, 300)}, "head_dim is above 256", " (got 300)"),
    "softcap": (
        {"scale": 1e10, "softcap": 1e-30},
        "the scale divided by the softcap is no normal float32 number",
        " (got 1e+10 and 1e-30)",
    ),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_refusals_fall_back_with_their_reason(refusal: str, fresh_stats: None):
    changes, reason, detail = REFUSALS[refusal]
    arguments = refused(
        **{n: x.to("mps") if isinstance(x, torch.Tensor) else x for n, x in changes.items()}
    )
    with pytest.warns(orchard_ops.OrchardFallbackWarning, match=reason) as caught:
        out = orchard_ops.flash_attn(**arguments)
        orchard_ops.flash_attn(**arguments)
    assert len(caught) == 1  # once per reason
    on_cpu = {n: x.cpu() if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
    torch.testing.assert_close(out.cpu(), orchard_ops.flash_attn(**on_cpu))
    assert orchard_ops.stats().reference[reason] == {"flash_attn_fwd": 2}
    explanation = orchard_ops.explain(**arguments)
    message = reason + detail
    assert (explanation.path, explanation.reason) == ("reference", message)
    assert explanation.advice
    with pytest.raises(RuntimeError, match=re.escape(f"cannot run this call: {message}")):
        orchard_ops.flash_attn(**arguments, impl="metal")


@pytest.mark.parametrize("name", ("alibi_slopes", "sinks"))
def test_the_functional_op_wants_float32_per_head(name: str, fresh_stats: None):
    """flash_attn casts; the op below it takes what it gets, and says what would do."""
    case = Case(6, 7, 16)
    q, k, v, _ = (x.to("mps") for x in case.operands())
    scoring = case.scoring()._replace(**{name: torch.ones(2, dtype=torch.float16, device="mps")})
    with pytest.raises(RuntimeError, match="alibi_slopes or sinks are not float32"):
        torch.ops.orchard.flash_attn_fwd(q, k, v, *scoring, "metal")
    with pytest.warns(orchard_ops.OrchardFallbackWarning, match="are not float32"):
        torch.ops.orchard.flash_attn_fwd(q, k, v, *scoring, "auto")


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_slopes_and_sinks_of_any_dtype_run_on_metal(dtype: torch.dtype, fresh_stats: None):
    """They are cast, and the gradient of sinks comes back in their own dtype."""
    device = "mps" if dtype != torch.float64 else "cpu"
    case = Case(6, 7, 16, dtype=torch.float16 if dtype != torch.float64 else dtype)
    q, k, v, _ = (x.to(device) for x in case.operands())
    slopes, sinks = torch.tensor((0.5, 0.25), dtype=dtype), torch.tensor((1.0, -2.0), dtype=dtype)
    slopes, sinks = slopes.to(device), sinks.to(device).requires_grad_()
    out = orchard_ops.flash_attn(q, k, v, enable_gqa=True, alibi_slopes=slopes, sinks=sinks)
    out.sum().backward()
    assert sinks.grad is not None and sinks.grad.dtype == dtype and sinks.grad.all()
    if device == "mps":
        assert orchard_ops.stats().metal == {"flash_attn_fwd": 1, "flash_attn_bwd": 1}


def test_a_warning_turned_into_an_error_says_what_it_is(fresh_stats: None):
    with pytest.raises(orchard_ops.OrchardFallbackWarning, match="head_dim is above 256"):
        orchard_ops.flash_attn(**refused(value=torch.ones(1, 1, 7, 300, device="mps")))
    assert orchard_ops.stats().reference == {}  # it did not run


def test_impl_reference_never_touches_metal(fresh_stats: None):
    import simulator

    q = torch.randn(1, 2, 5, 16, device="mps", requires_grad=True)
    with simulator.recording() as launches:
        orchard_ops.flash_attn(q, q, q, impl="reference").sum().backward()
    assert not launches
    assert orchard_ops.stats().reference == {
        'impl="reference" was asked for': {"flash_attn_fwd": 1, "flash_attn_bwd": 1}
    }


def test_stats_count_and_reset(fresh_stats: None):
    q = torch.randn(1, 2, 5, 16, device="mps", requires_grad=True)
    orchard_ops.flash_attn(q, q, q).sum().backward()
    orchard_ops.flash_attn(*(x.detach().cpu() for x in (q, q, q)))
    stats = orchard_ops.stats()
    assert stats.metal == {"flash_attn_fwd": 1, "flash_attn_bwd": 1}
    assert stats.reference == {"the tensors are on cpu, not on mps": {"flash_attn_fwd": 1}}
    assert stats.fallbacks == 0
    orchard_ops.reset_stats()
    assert orchard_ops.stats().metal == {"flash_attn_fwd": 0, "flash_attn_bwd": 0}
    assert orchard_ops.stats().reference == {}
