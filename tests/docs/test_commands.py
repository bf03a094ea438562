"""Whatever a page tells somebody to type is run, as it stands but for what makes it small.

Programs take their last word for an option, so that sizes are added behind those of the page; the
page's own words are parsed and used in any case.
"""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pages
import pytest
from pages import PAGES, ROOT

from orchard_ops.__main__ import build_parser, main

_TINY = "--cases gpt --heads 1 --head-dims 8 --dtypes float32 --lengths 16 24 --seconds 0.01"
SMALL = {
    "bench": f"--device cpu {_TINY}",
    "demo": "--device cpu --steps 1 --sample-bytes 2",
    "selftest": "--device cpu --quick",
    "doctor": "",
    "plan": "",
    "train_gpt.py": "--steps 1 --length 16",
    "patch_sdpa.py": "--steps 1 --length 16",
    "packed_documents.py": "--steps 1 --length 16",
    "finetune_transformers.py": "--steps 1 --length 16",
    "diffusers_unet.py": "--steps 1 --size 8",
}
"""Behind the words of the page."""
FEW_TILES = f"--device mps {_TINY} --head-dims 64 --tiles r1_k16_b0"
"""Instead of SMALL for measurements that need Metal kernels."""
COLLECT = "--collect-only -q -n 0 -p no:cacheprovider tests/docs/test_commands.py"
MADE = {
    "demo": "--steps 1 --sample-bytes 2",
    "bench": SMALL["bench"],
    "test": COLLECT,
    "quick": COLLECT,
    "mutants": "keys.h --list",
}
"""ARGS of make, behind those of the page. The suite is collected, not run from within itself."""
BUILT = (
    *(".venv/ready", ".venv/dev", "tools", "lint"),
    *("build/native/liborchard_ops.so", "src/orchard_ops/liborchard_ops.dylib"),
)
"""What make takes as done: a test installs and builds nothing in the checkout."""
LINUX_ONLY = ("make mutants",)
"""Instruments that are built on the simulated device."""

COMMANDS = {
    " ".join(words): (words, block)
    for page in PAGES
    for block in pages.blocks(page)
    if block.language == "bash"
    for words in pages.commands(block)
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shows the checkout's files under their relative names, and takes what a command writes."""
    for name in ("examples", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_package(words: list[str]) -> int:
    small = SMALL[words[0]].split()
    if words[0] == "bench" and {"--tiles", "--scratch"} & set(words):
        small = FEW_TILES.split()
    if "--plot" in words:
        small = []
    output = ["--output", "out"] if words[0] in ("bench", "demo") else []
    return main([*words, *small, *output])


def run_example(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    script = Path(words[0]).name
    monkeypatch.setattr(sys, "argv", [*words, *SMALL[script].split()])
    assert words[0] == f"examples/{script}", f"no such program: {words[0]}"
    runpy.run_path(words[0], run_name="__main__")
    return 0


def run_make(words: list[str], folder: Path) -> int:
    target, *arguments = words
    own = next((x.removeprefix("ARGS=") for x in arguments if x.startswith("ARGS=")), "")
    done = [word for file in BUILT for word in ("-o", file)]
    output = f"--output {folder}" if target in ("demo", "bench") else ""
    small = f"ARGS={own} {MADE[target]} {output}"
    variables = (f"PY={sys.executable}", "MAKE=true", small)  # no make within make builds either
    return subprocess.call(["make", "-C", str(ROOT), *done, target, *variables])


def run_pip(words: list[str], folder: Path) -> int:
    """Built as far as metadata goes, from a copy; nothing is installed or downloaded."""
    assert words[0] == "install", words
    source = folder / "copy"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info"))
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    dry = ["--dry-run", "--no-deps", "--no-build-isolation", "--quiet", "--no-index"]
    pip = [sys.executable, "-m", "pip", "install", *dry, *words[1:]]
    return subprocess.call(pip, cwd=source)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(x, marks=[pytest.mark.simulated] if x.startswith(LINUX_ONLY) else [])
        for x in COMMANDS
    ],
)
def test_a_page_s_command_runs(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    words, block = COMMANDS[command]
    while "=" in words[0]:
        name, _, value = words[0].partition("=")
        monkeypatch.setenv(name, value)
        words = words[1:]
    if words[:3] == _PACKAGE:
        status = run_package(words[3:])
    elif words[0] == "python":
        status = run_example(words[1:], monkeypatch)
    elif words[0] == "make":
        status = run_make(words[1:], folder)
    elif words[0] == "pip":
        status = run_pip(words[1:], folder)
    else:
        pytest.fail(f"{block}: no test knows how to run {command!r}: add it to {__file__}")
    assert status == 0, f"{block}: {command}"


def test_every_command_of_the_package_is_on_a_page():
    """And the reverse: what is made small here exists."""
    parser = build_parser()
    (commands,) = (a.choices for a in parser._actions if hasattr(a, "choices") and a.choices)
    told = {words[3] for words, _ in COMMANDS.values() if words[:3] == _PACKAGE}
    assert set(commands) - {"demo"} <= told  # `make demo` is on the first one


_PACKAGE = ["python", "-m", "orchard_ops"]
