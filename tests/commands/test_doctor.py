"""python -m orchard_ops doctor: it finds each fault, says what to do, and takes no note for one."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import orchard_ops
from orchard_ops import native
from orchard_ops.__main__ import main
from orchard_ops.commands import doctor, kernel_check, machine, probes, selftest, variables
from orchard_ops.commands.bench import command, results
from orchard_ops.commands.findings import FAULT, NOTE
from orchard_ops.commands.place import find_place

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, fresh_stats: None):
    """The suite's own library is loaded by now."""
    for name in list(os.environ):
        if name.startswith("ORCHARD_"):
            monkeypatch.delenv(name)


def report(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict]:
    capsys.readouterr()
    status = main(["doctor", "--json"])
    return status, json.loads(capsys.readouterr().out)


def faults(found: dict) -> dict[str, str]:
    """name -> remedy"""
    return {f["name"]: f["remedy"] for f in found["findings"] if f["state"] == FAULT}


def test_on_mps_all_is_in_order(capsys: pytest.CaptureFixture[str]):
    assert torch.ones(1, device="mps").is_mps
    status, found = report(capsys)
    assert (status, found["healthy"], faults(found)) == (0, True, {})
    assert orchard_ops.stats().metal["flash_attn_bwd"] >= 1  # it ran
    paths = {call["call"]: call["path"] for call in found["calls"]}
    assert paths.pop("bfloat16, head_dim 320") == "reference"
    assert set(paths.values()) == {"metal"} and len(paths) >= 14


def test_the_text_says_what_the_data_says(capsys: pytest.CaptureFixture[str]):
    _, found = report(capsys)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for finding in found["findings"]:
        assert f"{finding['name']}: {finding['found']}" in said
    for call in found["calls"]:
        assert f"    {call['call']}\n" in said
    assert said.rstrip().endswith(found["verdict"])
    assert "the advice" not in said and "None" not in said


def test_probes_are_what_explain_says():
    """And a probe that runs takes the path that it is said to take."""
    device = find_place("auto").device
    for words, call in probes._calls(device):
        explanation = orchard_ops.explain(**call())
        answer = probes._answer(words, call)
        assert (answer.path, answer.kernels) == (explanation.path, explanation.kernels)
        if answer.path == "metal" and device.type == "mps":
            with orchard_ops.report(show=False) as ran:
                orchard_ops.flash_attn(**call())
            assert [c.path for c in ran.calls] == ["metal"], words


def test_it_takes_seconds_and_nothing_but_torch():
    """Without rich, numpy and matplotlib, and without the simulated device."""
    code = (
        "import sys\n"
        "for name in ('rich', 'numpy', 'matplotlib'): sys.modules[name] = None\n"
        "import warnings; warnings.simplefilter('ignore')\n"
        "from orchard_ops.__main__ import main\n"
        "import time; start = time.process_time()\n"
        "status = main(['doctor'])\n"
        "print('seconds', time.process_time() - start); sys.exit(status)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert float(done.stdout.split("seconds")[1]) < 2.0  # of the processor, beyond the imports
    if sys.platform != "darwin":
        assert "in order, without an Apple GPU: attention runs on the reference" in done.stdout


# ---- each fault ---------------------------------------------------------------------------------


def test_a_library_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert torch.ones(1, device="mps").is_mps
    monkeypatch.setattr(native, "_why_not", "the native library liborchard_ops.dylib is missing")
    status, found = report(capsys)
    assert (status, found["healthy"]) == (1, False)
    assert faults(found) == {"native library": _reinstall()}
    assert {call["reason"] for call in found["calls"]} == {native.why_not()}
    monkeypatch.setenv("ORCHARD_NATIVE_LIBRARY", "/home/somebody/lib.so")
    _, found = report(capsys)
    assert faults(found)["native library"].startswith("unset ORCHARD_NATIVE_LIBRARY")
    assert "somebody" not in json.dumps(found)


def _reinstall() -> str:
    return "pip install --force-reinstall --no-deps orchard-ops"


def test_a_device_that_cannot_compute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """As virtual machines have it."""
    assert torch.ones(1, device="mps").is_mps

    def ones(*args: object, **kwargs: object) -> None:
        raise RuntimeError("MPS backend out of memory\n(more)")

    monkeypatch.setattr(torch, "ones", ones)
    status, found = report(capsys)
    assert status == 1 and list(faults(found)) == ["device"]
    assert "virtual machines" in faults(found)["device"]
    assert found["calls"] == []


def test_kernels_that_are_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    real = kernel_check.Case.math
    monkeypatch.setattr(
        kernel_check.Case, "math", lambda case, *a: real(case.but(diagonal=case.diagonal + 1), *a)
    )
    status, found = report(capsys)
    assert status == 1 and list(faults(found)) == ["kernels"]
    assert "selftest" in faults(found)["kernels"]
    assert main(["doctor"]) == 1
    assert "docs/reporting-a-bug.md" in capsys.readouterr().out


def test_kernels_that_do_not_compile(capsys: pytest.CaptureFixture[str]):
    import simulator

    with simulator.faults(dispatch="all"):
        status, found = report(capsys)
    assert status == 1 and list(faults(found)) == ["kernels"]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    (
        ("ORCHARD_DISABLE_METAL", "1", "unset ORCHARD_DISABLE_METAL"),
        ("ORCHARD_STRICT", "maybe", "set ORCHARD_STRICT to 1 or 0"),
        ("ORCHARD_DEBUG", "2", "set ORCHARD_DEBUG to 1 or 0"),
        ("ORCHARD_BACKWARD_SCRATCH_MB", "-1", "to 256, or to 0"),
        ("ORCHARD_BACKWARD_SCRATCH_MB", "1GB", "to 256, or to 0"),
        ("ORCHARD_GPU_CORES", "0", "unset ORCHARD_GPU_CORES"),
        ("ORCHARD_GPU_CORES", "ten", "unset ORCHARD_GPU_CORES"),
        ("PYTORCH_MPS_FAST_MATH", "1", "unset PYTORCH_MPS_FAST_MATH"),
    ),
)
def test_a_variable_that_is_in_the_way(
    name: str,
    value: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv(name, value)
    status, found = report(capsys)
    assert status == 1 and list(faults(found)) == [name]
    assert words in faults(found)[name]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    (
        ("ORCHARD_STRICT", "1", "on: a call on mps that Metal cannot run is an error"),
        ("ORCHARD_DISABLE_METAL", "0", "off"),
        (
            "ORCHARD_GPU_CORES",
            "38",
            "'38': cores that kernels are planned for instead of the GPU's",
        ),
        ("ORCHARD_BACKWARD_SCRATCH_MB", "0", "'0': MiB that a backward may take for speed"),
        ("ORCHARD_STRIKT", "1", "no variable of orchard_ops; ORCHARD_STRICT is"),
    ),
)
def test_a_variable_that_is_no_fault(
    name: str,
    value: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv(name, value)
    status, found = report(capsys)
    assert status == 0
    (finding,) = (f for f in found["findings"] if f["name"] == name)
    assert (finding["state"], finding["found"]) == (NOTE, words)


def test_every_variable_that_is_read_is_known():
    sources = [*(ROOT / "src").rglob("*.py"), *(ROOT / "native").rglob("*.cpp")]
    read = set()
    for path in sources:
        read |= set(re.findall(r"\"(ORCHARD_[A-Z_]+)\"", path.read_text()))
    assert read == set(variables.KNOWN)


@pytest.mark.parametrize(
    ("architecture", "version", "remedy"),
    (
        ("x86_64", "15.5", "install a Python for Apple silicon"),
        ("arm64", "13.6.1", "update to macOS 14 or later"),
        ("arm64", "14.0", ""),
        ("arm64", "26.1", ""),
    ),
)
def test_a_mac_that_is_too_old_or_played(
    architecture: str, version: str, remedy: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: architecture)
    monkeypatch.setattr(platform, "mac_ver", lambda: (version, ("", "", ""), architecture))
    finding = doctor._system()
    assert finding.remedy.startswith(remedy) and bool(finding.remedy) == bool(remedy)
    assert (finding.state == FAULT) == bool(remedy)
    assert f"macOS {version}" in finding.found


def test_a_mac_without_a_device(monkeypatch: pytest.MonkeyPatch):
    place = find_place("cpu")
    for built, words in ((True, "run on the Mac itself"), (False, "install torch from PyPI")):
        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(torch.backends.mps, "is_built", lambda built=built: built)
        finding = doctor._device(place)
        assert finding.state == FAULT and finding.remedy.endswith(words)


# ---- one description of the machine -------------------------------------------------------------


def test_every_command_describes_the_machine_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Those of bench, selftest, demo and doctor are one, but for the load at their moment."""
    monkeypatch.setattr(selftest, "check", lambda v, *_: selftest.Outcome(str(v), True, "", 0.0))
    monkeypatch.setattr(command, "measure", lambda *_: results.CaseResult("none", 16, "none", []))
    small = "--lengths 16 24 --heads 2 --head-dims 8 --cases gpt --dtypes float32 --seconds 0.01"
    assert main(["bench", "--device", "cpu", *small.split(), "--output", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.json")
    of_bench = json.loads(file.read_text())["machine"]
    report_file = tmp_path / "selftest.json"
    assert main(["selftest", "--quick", "--device", "cpu", "--report", str(report_file)]) == 0
    of_selftest = json.loads(report_file.read_text())["environment"]
    of_selftest.pop("date")
    _, found = report(capsys)
    for of_command, device in ((of_bench, "cpu"), (of_selftest, "cpu"), (found["machine"], "auto")):
        expected = machine.describe(find_place(device))
        del of_command["load_average"], expected["load_average"]
        assert of_command == expected
    assert {"machine", "system", "torch", "native_library", "memory_gib"} <= set(expected)


def test_it_says_whether_sdpa_is_taken_over():
    said = doctor.takeover()
    assert said.startswith("PyTorch's own")
    with orchard_ops.sdpa():
        assert doctor.takeover() == "taken over on mps"
    assert doctor.takeover() == said
