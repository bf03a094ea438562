"""The simulated device, where a test needs a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("the simulated device is for Linux", allow_module_level=True)

ROOT = Path(__file__).parents[2]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


# ------------------------------------------------------------------------------------- memory


def test_dereferencing_a_handle_faults():
    code = """
import ctypes, torch
address = torch.ones(2, device="mps").data_ptr()
print("about to read", flush=True)
ctypes.c_float.from_address(address).value
"""
    result = python("-m", "simulator", "-c", code)
    assert result.stdout == "about to read\n"
    assert result.returncode == -signal.SIGSEGV


# ------------------------------------------------------------------------------------- loading


def test_enabling_too_late_is_an_error():
    code = """
import torch, simulator
assert not torch.backends.mps.is_available()
simulator.enable()
"""
    result = python("-c", code)
    assert result.returncode == 1
    assert "RuntimeError: simulator: enabled too late" in result.stderr


def test_what_may_come_before_enabling():
    code = """
import torch
torch.manual_seed(0)
torch.randn(3, generator=torch.Generator()) + torch.rand(3)
torch.nn.Linear(2, 2)(torch.ones(2))
import simulator
simulator.enable()
print(torch.ones(1, device="mps").item())
"""
    result = python("-c", code)
    assert result.stdout == "1.0\n", result.stderr


def test_importing_needs_no_torch():
    result = python("-c", "import sys, simulator; print('torch' in sys.modules)")
    assert result.stdout == "False\n", result.stderr


def test_using_it_disabled_is_an_error():
    result = python("-c", "import simulator; simulator.memory()")
    assert "RuntimeError: simulator: the device is not enabled" in result.stderr


def test_no_compiler_is_a_clear_error(tmp_path):
    result = python(
        "-c", "import simulator; simulator.enable()", PATH="", CXX="", SIMULATOR_CACHE=str(tmp_path)
    )
    assert result.returncode == 1
    assert "RuntimeError: simulator: no C++ compiler" in result.stderr


def test_concurrent_builds_compile_once(tmp_path):
    """Several processes find an empty cache; one compiles, the others wait for it."""
    code = "from simulator import build; print(build.set_arg_bytes_library())"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "SIMULATOR_CACHE": str(tmp_path)},
        )
        for _ in range(3)
    ]
    results = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], results
    assert len({out for out, _ in results}) == 1
    assert sum("compiling" in err for _, err in results) == 1
    assert len(list(tmp_path.glob("*.so"))) == 1
    assert not list(tmp_path.glob("*.tmp"))


# ----------------------------------------------------------------------------------- dispatch


def test_attention_may_be_replaced_by_a_library():
    """As on a Mac: nothing sits at MPS and AutogradMPS, so a kernel that is put there wins."""
    code = """
import torch, torch.nn.functional as F
name = "aten::scaled_dot_product_attention"
q = torch.randn(1, 1, 4, 8, device="mps", requires_grad=True)
library = torch.library.Library("aten", "IMPL")
for key in ("MPS", "AutogradMPS"):
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    library.impl("scaled_dot_product_attention", lambda q, k, v, *_, **__: v * 2, key)
print(torch.equal(F.scaled_dot_product_attention(q, q, q), q * 2))
with torch.inference_mode():
    print(torch.equal(F.scaled_dot_product_attention(q, q, q), q * 2))
library._destroy()
print(torch.equal(F.scaled_dot_product_attention(q, q, q), q * 2))
"""
    result = python("-m", "simulator", "-c", code)
    assert result.stdout.split() == ["True", "True", "False"], result.stderr
    assert "Overriding a previously registered kernel" not in result.stderr


# --------------------------------------------------------------- the two generations of torch


@pytest.fixture(scope="module")
def extension(tmp_path_factory) -> str:
    from test_device_metal import compile_extension

    return compile_extension(tmp_path_factory.mktemp("extension"))


GENERATION = """
import sys, torch
torch.ops.load_library(sys.argv[1])
x = torch.arange(5.0, device="mps")
routes = torch.ops.simulator_example.routes(x)
print(routes, torch.ops.simulator_example.saxpy(x, x, 2.0, bool(routes & 1)).tolist())
if routes & 1:
    print(torch.ops.simulator_example.too_many_bytes(x) != 0)
"""


def test_bytes_by_the_exported_method(extension):
    result = python("-m", "simulator", "-c", GENERATION, extension)
    assert result.stdout == "2 [0.0, 3.0, 6.0, 9.0, 12.0]\n", result.stderr


def test_bytes_by_the_newer_shim(extension):
    result = python("-m", "simulator", "--set-arg-bytes", "-c", GENERATION, extension)
    assert result.stdout == "3 [0.0, 3.0, 6.0, 9.0, 12.0]\nTrue\n", result.stderr


# ------------------------------------------------------------------------------- the launcher


SHOW = """
import sys, torch
print(__name__, sys.argv[1:], (torch.ones(1, device="mps") + 1).item())
"""
SHOWN = "__main__ ['--check', 'a b'] 2.0\n"


def test_launcher_runs_a_script(tmp_path):
    (tmp_path / "neighbour.py").write_text("name = 'found'\n")
    script = tmp_path / "script.py"
    script.write_text("import neighbour\n" + SHOW + "print(sys.argv[0], neighbour.name)\n")
    result = python("-m", "simulator", str(script), "--check", "a b")
    assert result.stdout == SHOWN + f"{script} found\n", result.stderr


def test_launcher_runs_a_module(tmp_path):
    (tmp_path / "a_module.py").write_text(SHOW + "print(sys.argv[0])\nraise SystemExit(3)\n")
    path = os.pathsep.join([str(ROOT), str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = python("-m", "simulator", "-m", "a_module", "--check", "a b", PYTHONPATH=path)
    assert result.stdout == SHOWN + f"{tmp_path / 'a_module.py'}\n", result.stderr
    assert result.returncode == 3


def test_launcher_runs_code_with_options():
    code = """
import sys, torch
print(__name__, sys.argv)
torch.linalg.eigvals(torch.eye(2, device="mps"))
"""
    result = python("-m", "simulator", "--check", "--strict", "-c", code, "--check")
    assert result.stdout == "__main__ ['-c', '--check']\n"
    assert "strict mode" in result.stderr and result.returncode == 1


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-x"], ["-m"], ["--check", "-c"]])
def test_launcher_usage(arguments):
    from simulator.__main__ import main

    with pytest.raises(SystemExit, match=r"python -m simulator .*SCRIPT"):
        main(arguments)


def test_launcher_enables_what_it_is_told(monkeypatch, tmp_path):
    import simulator
    from simulator.__main__ import main

    enabled = []
    monkeypatch.setattr(simulator, "enable", lambda **options: enabled.append(options))
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    script = tmp_path / "nothing.py"
    script.touch()
    main([str(script)])
    main(["--set-arg-bytes", "--check", str(script)])
    assert enabled == [
        {"check": False, "set_arg_bytes": False},
        {"check": True, "set_arg_bytes": True},
    ]


def test_a_gpu_build_of_torch_is_refused_with_advice():
    """PyTorch takes one accelerator at a time: it would fail later, and obscurely."""
    code = "import torch; torch.version.cuda = '13.0'; import simulator; simulator.enable()"
    done = python("-c", code)
    assert done.returncode == 1
    assert "install a CPU build" in done.stderr
