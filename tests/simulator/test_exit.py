"""The end of programs on the simulated device: their exit status and output are Python's own.

When backward() returns, autograd's worker still has to release the finished graph, for which it
needs the interpreter. A program that ended meanwhile was aborted (status 134). RACE makes that
certain: it runs backward passes until the worker has the last reference and waits for the
interpreter, which the main thread, with an endless switch interval, does not hand over; and the
end of the interpreter sleeps, so that the worker then meets it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("the simulated device is for Linux", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]

RACE = """
import contextvars, sys, time, weakref
import torch

class Kept: pass

class Late:
    def __del__(self, sleep=time.sleep):
        sleep(0.3)

x = torch.randn(4, 4, device="mps", requires_grad=True)
held = contextvars.ContextVar("held")
sys.setswitchinterval(1000)
for _ in range(20_000):
    kept = Kept()
    alive = weakref.ref(kept)
    token = held.set(kept)  # a graph keeps the context of its backward pass
    (x * x).sum().backward()
    held.reset(token)
    del kept, token
    if alive():
        break
assert alive(), "the worker never had the last reference"
sys.late = Late()
print("from", "main")
print("to stderr", file=sys.stderr, end="")
"""

EARLY = "import torch, simulator\nsimulator.enable()\n"

ENDS = {
    "the last line": ("", 0, "to stderr"),
    "sys.exit()": ("sys.exit()", 0, "to stderr"),
    "sys.exit(3)": ("sys.exit(3)", 3, "to stderr"),
    "sys.exit(message)": ("sys.exit('no more')", 1, "no more\n"),
    "an exception": ("raise ValueError('wrong')", 1, "ValueError: wrong\n"),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt\n"),
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("end", ENDS)
def test_a_program_ends_as_python_ends_it(tmp_path: Path, end: str):
    statement, status, last_words = ENDS[end]
    script = tmp_path / "program.py"
    script.write_text(f"{RACE}{statement}\n")
    done = run("-m", "simulator", str(script))
    assert done.returncode == status, done.stderr
    assert done.stdout == "from main\n"
    assert done.stderr.endswith(last_words)
    assert ("Traceback" in done.stderr) == (end in ("an exception", "KeyboardInterrupt"))


@pytest.mark.parametrize("way", ("-c", "-m simulator -c", "-m simulator -m"))
def test_it_does_not_matter_how_the_device_is_enabled(tmp_path: Path, way: str):
    if way == "-c":
        done = run("-c", f"{EARLY}{RACE}sys.exit(3)")
    elif way == "-m simulator -c":
        done = run("-m", "simulator", "-c", f"{RACE}sys.exit(3)")
    else:
        (tmp_path / "a_program.py").write_text(f"{RACE}sys.exit(3)")
        code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        code += "from simulator.__main__ import main; main(['-m', 'a_program'])"
        done = run("-c", code)
    assert (done.returncode, done.stdout) == (3, "from main\n"), done.stderr


def test_the_end_of_a_test_session(tmp_path: Path):
    (tmp_path / "test_it.py").write_text(
        f"{EARLY}def test_it():\n" + "".join(f"    {line}\n" for line in RACE.splitlines())
    )
    done = run("-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_the_end_of_a_child_that_was_forked():
    """A fork has no worker to wait for, and only the parent waits for the parent's."""
    fork = """
import os
pid = os.fork()
if pid == 0:
    sys.exit(5)
_, status = os.waitpid(pid, 0)
sys.exit(os.waitstatus_to_exitcode(status) + 1)
"""
    done = run("-W", "ignore", "-m", "simulator", "-c", RACE + fork)
    assert done.returncode == 6, done.stderr


def test_the_end_of_a_program_without_autograd():
    code = "import torch; print(torch.ones(2, device='mps').sum().item())"
    done = run("-m", "simulator", "-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2.0\n", "")
