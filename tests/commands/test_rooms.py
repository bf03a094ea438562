"""The rule of what runs where (rooms.py), applied as on a Mac and as with another torch.

Both are played here: a process whose sys.platform says darwin and that finds neither the simulator
nor clang-19 collects the suite; nothing in it can touch Linux without failing the collection.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.simulated  # it plays the other devices from Linux

PLAYED = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("simulator", "mutation", "dialect", "fuzz"):
            raise ModuleNotFoundError(f"no {name} here", name=name)

sys.meta_path.insert(0, Missing())
import psutil, pytest, sysconfig, torch._inductor.config  # with the platform of their build
sysconfig.get_config_vars()
sys.platform = PLATFORM
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "tests"]))
"""


def collected(platform: str, **variables: str) -> tuple[set[str], str]:
    """(the ids of the tests, what pytest printed)"""
    environment = os.environ | {"PATH": str(Path(sys.executable).parent)} | variables
    environment.pop("ORCHARD_NATIVE_LIBRARY", None)
    done = subprocess.run(
        [sys.executable, "-c", PLAYED.replace("PLATFORM", repr(platform))],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return set(re.findall(r"^tests/\S.*::.+$", done.stdout, re.MULTILINE)), done.stdout


def files(tests: set[str]) -> set[str]:
    return {test.partition("::")[0].removeprefix("tests/") for test in tests}


def test_a_mac_runs_the_op_and_the_commands_on_its_gpu():
    tests, printed = collected("darwin")
    rooms = {name.partition("/")[0] for name in files(tests)}
    assert rooms == {"attention", "clients", "commands", "docs", "flex"}
    assert {
        f"attention/test_{name}.py"
        for name in ("kernels", "layouts", "reference", "registration", "bad_input", "dropout")
    } <= files(tests)
    kernels = [test for test in tests if "test_kernels" in test]
    assert len(kernels) > 400 and any("test_other_tiles" in test for test in kernels)
    assert "attention/test_host_cost.py" not in files(tests)  # it counts in the simulator
    assert not [test for test in tests if "corrupt" in test]
    line = re.search(r"left out by rule: (.+)", printed)
    assert line is not None and {"proof", "simulator"} < set(line[1].split(", "))
    assert re.search(r"\d+/\d+ tests collected \(\d+ deselected\)", printed)


def test_another_torch_runs_what_needs_no_device():
    tests, printed = collected("linux", ORCHARD_TESTS="cpu")
    assert {
        "attention/test_bad_input.py",
        "attention/test_properties.py",
        "attention/test_reference.py",
        "attention/test_registration.py",
        "attention/test_versions.py",
    } <= files(tests)
    assert {"flex/test_api.py", "flex/test_compile.py"} <= files(tests)
    assert not [name for name in files(tests) if not name.startswith(("attention/", "flex/"))]
    assert len(tests) > 150
    assert sum("test_mark_dynamic" in test for test in tests) == 4  # the function as well as the op
    assert not [test for test in tests if re.search(r"\bmps\b", test)]
    assert "on the CPU: " in printed and "attention/test_kernels.py" in printed


def test_the_quick_run_is_small_and_has_kernels_of_every_kind():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "--quick", "tests/attention"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    tests = set(re.findall(r"^tests/\S.*::.+$", done.stdout, re.MULTILINE))
    kernels = [test for test in tests if "test_kernels" in test]
    assert 40 <= len(kernels) <= 45
    assert len({test.split("::")[1].partition("[")[0] for test in kernels}) > 5
    assert len(tests) < 900


@pytest.mark.parametrize("target", ("test", "demo", "selftest", "bench"))
def test_a_mac_builds_the_library_that_it_tests(target: str):
    """`make -n` after an edit of one shader: the library's rule comes before what uses it."""
    done = subprocess.run(
        ["make", "-n", "-W", "shaders/keys.h", "SYSTEM=Darwin", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    build = done.stdout.index("native/build.py src/orchard_ops/liborchard_ops.dylib")
    run = done.stdout.index("-m pytest" if target == "test" else f"-m orchard_ops {target}")
    assert build < run
