"""However a command ends, it says why in one line, has the right exit status and keeps what was
done."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchard_ops.__main__ import main
from orchard_ops.commands import endings

BENCH = shlex.split(
    "bench --device cpu --lengths 16 24 --heads 2 --head-dims 8 --cases gpt --dtypes float32 "
    "--seconds 0.01"
)
LONG = {  # each would run for many minutes
    "bench": (*BENCH, *("--lengths", *map(str, range(16, 4000)))),
    "demo": ("demo", "--device", "cpu", "--steps", "100000"),
    "selftest": ("selftest", "--device", "cpu"),
}
AFTER = {"bench": "3/", "demo": "step ", "selftest": "3/"}  # the output once something is done


def arguments(command: str, folder: Path) -> list[str]:
    output = {
        "bench": ("--output", str(folder)),
        "demo": ("--output", str(folder), "--json", str(folder / "demo.json")),
        "selftest": ("--report", str(folder / "selftest.json")),
    }[command]
    return [*LONG[command], *output]


def started(command: str, folder: Path) -> subprocess.Popen[str]:
    """A process without the simulated device, read up to where something is done."""
    environment = {k: v for k, v in os.environ.items() if k != "ORCHARD_NATIVE_LIBRARY"}
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_DEMO, *arguments(command, folder)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(AFTER[command]):
            return process
    raise AssertionError(process.communicate()[1])


# The demo prints every tenth of its steps where no terminal is; here every one.
SLOW_DEMO = """
import sys
from orchard_ops.__main__ import main
if "demo" in sys.argv:
    from orchard_ops.commands.demo import report
    report._LINES_WITHOUT_TERMINAL = 100000
sys.exit(main(sys.argv[1:]))
"""


def kept(command: str, folder: Path) -> int:
    """How many cases, steps or variants the files hold."""
    if command == "bench":
        (file,) = folder.glob("*.unfinished.json")
        return len(json.loads(file.read_text())["cases"])
    report = json.loads((folder / f"{command}.json").read_text())
    if command == "demo":
        assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert not report["passed"] and "stopped after step" in report["failures"][-1]
        return len(report["losses"]["cpu"])
    assert "(stopped after" in report["verdict"]
    return len(report["outcomes"])


@pytest.mark.parametrize("command", LONG)
@pytest.mark.parametrize("how", ("interrupt", "closed pipe"))
def test_a_run_that_is_stopped_keeps_what_is_done(command: str, how: str, tmp_path: Path):
    process = started(command, tmp_path)
    assert process.stdout is not None
    if how == "interrupt":
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    else:
        process.stdout.close()
        process.stdout = None
        _, said = process.communicate(timeout=120)
    status, why = {
        "interrupt": (130, "interrupted"),
        "closed pipe": (141, "the output was closed"),
    }[how]
    assert process.returncode == status, said
    assert said.startswith(f"{command}: {why}; ") and said.count("\n") == 1, said
    assert str(tmp_path) in said
    assert kept(command, tmp_path) >= 1


def works(*args: object, **kwargs: object) -> None:
    raise AssertionError("the work has begun")


WORK = {
    "bench": "orchard_ops.commands.bench.command.measure",
    "demo": "orchard_ops.commands.demo.train_twins",
    "selftest": "orchard_ops.commands.selftest.check",
}


@pytest.mark.parametrize("command", LONG)
def test_the_output_is_tried_before_the_work(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(WORK[command], works)
    (tmp_path / "file").write_text("kept")
    assert main(arguments(command, tmp_path / "file" / "below")) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{command}: cannot write {tmp_path / 'file'}")
    assert said.count("\n") == 1
    assert (tmp_path / "file").read_text() == "kept"


def test_a_folder_in_the_place_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["selftest", "--report", str(tmp_path)]) == 2
    assert f"cannot write {tmp_path}: Is a directory" in capsys.readouterr().err
    (tmp_path / "demo.json").mkdir()
    assert (
        main([*LONG["demo"], "--output", str(tmp_path), "--json", str(tmp_path / "demo.json")]) == 2
    )
    assert "demo.json: Is a directory" in capsys.readouterr().err


def test_plots_into_a_bad_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([*BENCH, "--output", str(tmp_path)]) == 0
    (json_file,) = tmp_path.glob("*.json")
    capsys.readouterr()
    assert main(["bench", "--plot", str(json_file), "--output", str(json_file)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("bench: cannot write ") and said.count("\n") == 1


def test_an_earlier_result_stays_until_a_run_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert main([*BENCH, "--output", str(tmp_path)]) == 0
    (json_file,) = tmp_path.glob("*.json")
    before = json_file.read_bytes()

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(WORK["bench"], interrupted)
    assert main([*BENCH, "--output", str(tmp_path)]) == 130
    assert json_file.read_bytes() == before


def test_a_failure_of_the_command_is_not_a_wrong_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(WORK["selftest"], works)
    assert main(arguments("selftest", tmp_path)) == 3
    assert "the work has begun" in capsys.readouterr().err


def test_a_disk_that_is_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    assert main(["selftest", "--quick", "--device", "cpu", "--report", "/dev/full"]) == 2
    said = capsys.readouterr().err
    assert (
        said
        == "selftest: cannot write /dev/full: No space left on device; " + said.partition("; ")[2]
    )
    assert said.count("\n") == 1


@pytest.mark.parametrize("package", ("rich", "matplotlib"))
def test_without_a_package(
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    for name in list(sys.modules):
        if name.startswith("orchard_ops.commands.") and name != endings.__name__:
            monkeypatch.delitem(sys.modules, name)
        if name.partition(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    assert main([*LONG["demo"], "--output", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said == f'demo: it needs {package}: pip install "orchard_ops[demo]"\n'


@pytest.mark.parametrize(
    ("command", "option", "values"),
    (
        ("demo", "--seed", ("99999999999999999999", str(2**64), str(-(2**63) - 1), "x", "")),
        ("demo", "--steps", ("0", "-3", "many", "99999999999999999999")),
        ("demo", "--sample-bytes", ("0", "1.5", "99999999999999999999")),
        ("bench", "--heads", ("4/", "/4", "4/3", "4/2/1", "0", "4/0", "99999999999999999999")),
        ("bench", "--lengths", ("0", "-1", "99999999999999999999", "1e3")),
        ("bench", "--head-dims", ("0", "99999999999999999999")),
        ("bench", "--batch", ("0", "99999999999999999999")),
        ("bench", "--scratch", ("-1", "99999999999999999999", "a")),
        ("bench", "--seconds", ("0", "-1", "nan", "inf", "1e9")),
    ),
)
def test_values_that_cannot_be(
    command: str, option: str, values: tuple[str, ...], capsys: pytest.CaptureFixture[str]
):
    for value in values:
        with pytest.raises(SystemExit) as ended:
            main([command, f"{option}={value}"])
        assert ended.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert f"argument {option}: invalid " in last and last.endswith(f"value: {value!r}"), last


@pytest.mark.parametrize("seed", (2**64 - 1, -(2**63)))
def test_the_largest_seeds_are_seeds(seed: int, tmp_path: Path):
    demo = shlex.split("demo --device cpu --steps 1 --sample-bytes 1")
    status = main([*demo, f"--seed={seed}", "--output", str(tmp_path)])
    assert status == 0


def test_operands_that_fit_no_memory_are_a_result(tmp_path: Path):
    arguments = ["--lengths", str(2**31 - 1), "--head-dims", "256", "--dtypes", "float32"]
    status = main(
        ["bench", "--device", "cpu", "--cases", "gpt", *arguments, "--output", str(tmp_path)]
    )
    (json_file,) = tmp_path.glob("*.json")
    cases = json.loads(json_file.read_text())["cases"]
    statuses = {figures["status"] for case in cases for figures in case["figures"]}
    assert (status, statuses) == (0, {"out of memory"})
