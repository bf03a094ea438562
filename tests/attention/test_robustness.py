"""Threads, forks, exits, import order, and a sweep of faults over a training run."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from attention_cases import Case, check_case
from flex_cases import FlexCase

import orchard_ops

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="uses the simulator's faults")

ROOT = Path(__file__).parents[2]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


# ---- a sweep of faults --------------------------------------------------------------------------


def training_losses(steps: int = 2) -> list[float]:
    """Two steps of one attention layer with dropout on mps."""
    torch.manual_seed(0)
    x = torch.randn(1, 20, 16).to("mps")
    weight = torch.randn(16, 48).div(4).to("mps").requires_grad_()
    losses = []
    for _ in range(steps):
        q, k, v = (x @ weight).view(1, 20, 3, 1, 16).permute(2, 0, 3, 1, 4)
        loss = torch.ops.orchard.flash_attn(q, k, v, dropout_p=0.2, is_causal=True).square().mean()
        (grad,) = torch.autograd.grad(loss, weight)
        with torch.no_grad():
            weight -= 0.5 * grad
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def correct_losses() -> list[float]:
    return training_losses()


def agree(losses: list[float], correct: list[float]) -> bool:
    return all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(losses, correct, strict=True))


DISPATCHES = 8  # of two steps: forward, delta, dk/dv, dq each


@pytest.mark.parametrize("n", range(1, DISPATCHES + 2))
def test_nth_dispatch_fails(n: int, correct_losses: list[float], quiet_fallback: None):
    import simulator

    orchard_ops.reset_stats()
    with simulator.faults(dispatch=n):
        losses = training_losses()
    assert agree(losses, correct_losses)
    assert orchard_ops.stats().fallbacks == (1 if n <= DISPATCHES else 0)


@pytest.mark.parametrize("n", range(1, DISPATCHES - 2))  # nobody reads the last gradients
def test_nth_dispatch_is_corrupted(n: int, correct_losses: list[float]):
    """A GPU that silently destroys its outputs: the damage must be loud (NaN), never plausible."""
    import simulator

    with simulator.faults(corrupt_dispatch=n):
        losses = training_losses()
    assert any(math.isnan(a) for a in losses)
    assert all(
        math.isnan(a) or math.isclose(a, b, rel_tol=1e-5) for a, b in zip(losses, correct_losses)
    )


def test_nth_allocation_fails(correct_losses: list[float]):
    """Every allocation of the run fails in turn: each time there is a clear error, and the next run
    is right."""
    import simulator

    messages = set()
    for n in range(1, 200):
        try:
            with simulator.faults(allocate=n):
                losses = training_losses()
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            assert "out of memory" in str(error)
            messages.add(str(error).split(":")[2] if "orchard::" in str(error) else "torch")
        else:
            assert agree(losses, correct_losses)
            break
    assert n > 20  # the sweep went through the whole run
    assert messages == {"torch", "flash_attn"}
    assert agree(training_losses(), correct_losses)


SCRATCH = {  # the call, and which allocation of its backward fails
    "dS": (Case(40, 50, 64, num_heads=4, num_kv_heads=2), 5),
    "parts of dk and dv": (Case(256, 40, 16, num_heads=4, num_kv_heads=2), 5),
    "dS, before parts": (Case(64, 64, 64, num_heads=16, num_kv_heads=1), 5),
    "parts, behind dS": (Case(64, 64, 64, num_heads=16, num_kv_heads=1), 6),
}


@pytest.mark.parametrize("name", SCRATCH)
def test_no_memory_for_the_scratch(name: str):
    """A backward goes on without dS, and without dividing groups of heads, on Metal."""
    import simulator

    case, failing = SCRATCH[name]
    q, k, v, dout = (x.to("mps") for x in case.operands())
    out, lse = torch.ops.orchard.flash_attn_fwd(q, k, v, *case.scoring())
    orchard_ops.reset_stats()

    def backward() -> list[torch.Tensor]:
        arguments = (dout, None, q, k, v, out, lse, *case.scoring(), False)
        return list(torch.ops.orchard.flash_attn_bwd(*arguments)[:3])

    with simulator.recording(execute=True) as launches, simulator.faults(allocate=failing):
        grads = backward()
    assert [x.kernel.split("_float32")[0] for x in launches] == [
        "attention_backward_delta",
        "attention_backward_dkv",
        "attention_backward_dq",
    ]
    assert orchard_ops.stats().fallbacks == 0
    with simulator.recording(execute=True) as launches:
        expected = backward()
    kernels = "".join(x.kernel for x in launches)
    assert "_from_ds" in kernels or "_dkv_sums" in kernels  # there was memory
    for x, y in zip(grads, expected, strict=True):
        assert torch.allclose(x.cpu(), y.cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("failing", (5, 6), ids=("dS", "parts of dk and dv"))
def test_no_memory_for_the_scratch_of_functions(failing: int):
    """A FlexAttention's backward goes on likewise."""
    import simulator

    case = FlexCase(130, 40, 64, "softcap", num_kv_heads=1)
    q, k, v, dout, _ = (x.to("mps") for x in case.operands())
    out, row_stats = torch.ops.orchard.flex_attn_fwd(q, k, v, *case.scoring(), "metal")

    def backward() -> list[torch.Tensor]:
        arguments = (dout, None, q, k, v, out, row_stats, *case.scoring(), "metal")
        return list(torch.ops.orchard.flex_attn_bwd(*arguments))

    with simulator.recording(execute=True) as wanted:
        expected = backward()
    with simulator.recording(execute=True) as launches, simulator.faults(allocate=failing):
        grads = backward()
    kernels, found = ["".join(x.kernel for x in run) for run in (wanted, launches)]
    assert "_from_ds" in kernels and "_dkv_sums" in kernels
    assert "_from_ds" not in found and "_dkv_sums" not in found
    for x, y in zip(grads, expected, strict=True):
        assert torch.allclose(x.cpu(), y.cpu(), rtol=1e-4, atol=1e-5)


def test_no_memory_for_a_forwards_parts():
    """The sums that threadgroups would merge find no memory: it goes on undivided, on Metal."""
    import simulator

    case = Case(70, 600, 16, dtype=torch.float16)
    q, k, v, _ = (x.to("mps") for x in case.operands())
    orchard_ops.reset_stats()

    def forward() -> torch.Tensor:
        return torch.ops.orchard.flash_attn_fwd(q, k, v, *case.scoring("mps"))[0]

    with simulator.recording(execute=True) as launches, simulator.faults(allocate=3):
        out = forward()
    assert [x.kernel for x in launches] == ["attention_forward_float16_d16_r2_k32_b2_chunks"]
    assert orchard_ops.stats().fallbacks == 0
    torch.testing.assert_close(out.cpu(), forward().cpu(), rtol=2e-3, atol=2e-3)


# ---- threads ------------------------------------------------------------------------------------


def test_two_threads_at_once():
    """Forward and backward from several threads, same and different variants."""
    cases = [Case(40, 50, d, dropout_p=p) for d in (16, 32) for p in (0.0, 0.2)]
    errors: list[BaseException] = []

    def work(case: Case) -> None:
        try:
            for _ in range(3):
                check_case(case)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(case,)) for case in cases * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


# ---- processes ----------------------------------------------------------------------------------

PREAMBLE = "import simulator; simulator.enable()\nimport torch, orchard_ops, os, sys\n"
USE = "q = torch.randn(1, 1, 5, 16, device='mps'); orchard_ops.flash_attn(q, q, q)\n"


def test_use_after_fork_is_a_clear_error():
    code = (
        PREAMBLE + USE + "pid = os.fork()\n"
        "if pid == 0:\n"
        "    try: orchard_ops.flash_attn(q, q, q)\n"
        "    except RuntimeError as e: print(e, flush=True); os._exit(7)\n"
        "    os._exit(0)\n"
        "print('child', os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    done = run_python(code)
    assert "was forked after the GPU had been used" in done.stdout
    assert done.stdout.endswith("child 7\n")


def test_fork_before_the_first_use_is_fine():
    code = (
        PREAMBLE + "pid = os.fork()\n"
        "if pid == 0:\n    " + USE.replace("; ", "\n    ") + "    os._exit(5)\n"
        "print('child', os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n" + USE
    )
    done = run_python(code)
    assert done.stdout == "child 5\n", done.stderr


ENDINGS = {
    "falls off the end": "",
    "sys.exit": "sys.exit(0)\n",
    "thread still running": "import threading\nthreading.Thread(target=run_often).start()\n",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_clean_exit(ending: str):
    code = (
        "x = torch.randn(1, 1, 50, 16, device='mps')\n"
        "def run_often():\n"
        "    for _ in range(5): orchard_ops.flash_attn(x, x, x)\n"
        "run_often()\n"
    )
    done = run_python(PREAMBLE + code + ENDINGS[ending])
    assert (done.returncode, done.stderr) == (0, "")


def test_import_without_mps():
    """On plain Linux, without simulator and native library, the reference runs without a
    warning."""
    code = (
        "import torch, orchard_ops\n"
        "q = torch.randn(1, 1, 5, 16, requires_grad=True)\n"
        "orchard_ops.flash_attn(q, q, q).sum().backward()\n"
        "print(orchard_ops.explain(q, q, q).path, torch.backends.mps.is_available())\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "ORCHARD_NATIVE_LIBRARY"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("reference False\n", "")


def test_import_does_not_ask_for_mps():
    """torch caches its answer for good: importing must leave later users free to load a device."""
    code = (
        "import torch, orchard_ops, simulator\n"
        "simulator.enable()\n"
        "print(torch.randn(2, device='mps').device)\n"
    )
    done = run_python(code, ORCHARD_NATIVE_LIBRARY="/nonexistent/liborchard_ops.so")
    assert done.stdout == "mps:0\n", done.stderr


def test_neither_import_nor_calls_load_the_compiler():
    """torch._dynamo takes about as long to import as torch itself."""
    code = (
        PREAMBLE + USE + "q.requires_grad_(); orchard_ops.flash_attn(q, q, q).sum().backward()\n"
        "x = q.detach().cpu(); bias = torch.randn(5, 5)\n"
        "for mask in (bias, torch.nn.Parameter(bias)): orchard_ops.flash_attn(x, x, x, mask)\n"
        "print([name for name in ('torch._dynamo', 'sympy') if name in sys.modules])\n"
    )
    done = run_python(code)
    assert done.stdout == "[]\n", done.stderr


def test_a_takeover_that_is_interrupted_has_not_begun():
    """What it loads takes a while: Ctrl-C leaves PyTorch's attention as it was."""
    code = (
        PREAMBLE + "class Stop:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch.nn.attention.bias': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stop())\n"
        "try: orchard_ops.enable()\n"
        "except KeyboardInterrupt: print('stopped')\n"
        "del sys.meta_path[0]\n"
        "q = torch.randn(1, 2, 5, 16, device='mps', requires_grad=True)\n"
        "for _ in range(2):\n"
        "    torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()\n"
        "    print(orchard_ops.stats().metal['flash_attn_fwd'])\n"
        "    orchard_ops.enable()\n"
    )
    done = run_python(code)
    assert done.stdout == "stopped\n0\n1\n", done.stderr


def test_import_after_other_users_of_the_device():
    code = (
        "import simulator; simulator.enable()\n"
        "import torch\n"
        "x = torch.randn(4, 4, device='mps', requires_grad=True); x.square().sum().backward()\n"
        "import orchard_ops\n" + USE + "print(orchard_ops.stats().metal)\n"
    )
    done = run_python(code)
    assert done.stdout == "{'flash_attn_fwd': 1, 'flash_attn_bwd': 0}\n", done.stderr


@pytest.mark.parametrize("route", ("mangled method", "torch_mps_set_arg_bytes"))
def test_both_routes_for_struct_arguments(route: str):
    """torch 2.10 ... 2.13 export a C++ method, later ones a C shim: both carry the parameters."""
    shim = str(route != "mangled method")
    code = (
        f"import simulator; simulator.enable(set_arg_bytes={shim})\n"
        "import ctypes, sys; sys.path.insert(0, " + repr(str(ROOT / "tests")) + ")\n"
        "import orchard_ops\n"
        "from attention_cases import Case, check_case\n"
        "check_case(Case(33, 40, 16, dropout_p=0.1))\n"
        "print(hasattr(ctypes.CDLL(None), 'torch_mps_set_arg_bytes'))\n"
    )
    done = run_python(code)
    assert done.stdout == f"{shim}\n", done.stderr
