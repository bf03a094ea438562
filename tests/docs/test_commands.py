"""Whatever a page tells somebody to type is run, as it stands but for what makes it small.

Programs take their last word for an option, so that sizes are added behind those of the page; the
page's own words are parsed and used in any case.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pages
import pytest
from pages import PAGES, ROOT

from orchard_ops.__main__ import build_parser

SMALL = {
    "bench": "--device cpu --lengths 16 24 --seconds 0.01",
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
ON_MPS = {
    "bench --tiles": "--device mps --cases gpt --heads 1 --head-dims 64 --dtypes float16 "
    "--lengths 16 --seconds 0.01"
}
"""Instead of SMALL for calls that need Metal kernels."""
COLLECT = "--collect-only -q -p no:xdist -p no:cacheprovider tests/docs/test_commands.py"
MADE = {
    "demo": "--steps 1 --sample-bytes 2",
    "bench": SMALL["bench"],
    "test": COLLECT,
    "quick": COLLECT,
    "mutants": "keys.h --list",
}
"""ARGS of make, behind those of the page. The suite is collected, not run from within itself."""
BUILT = (".venv/ready", ".venv/dev", "tools", "lint", "build/native/liborchard_ops.so")
"""What make takes as done: a test installs and builds nothing in the checkout."""

COMMANDS = {
    " ".join(words): (words, block)
    for page in PAGES
    for block in pages.blocks(page)
    if block.language == "bash"
    for words in pages.commands(block)
}


def run(words: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """In a folder where nothing of the checkout is written."""
    return subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shows the checkout's files under their relative names."""
    for name in ("examples", "benchmarks", "src"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def python_command(words: list[str]) -> list[str]:
    """The words behind `python`, made small, through the simulated device where there is one."""
    on_device = [sys.executable, *(["-m", "simulator"] if sys.platform == "linux" else [])]
    if words[:2] == ["-m", "orchard_ops"]:
        small = SMALL[words[2]]
        if words[2] == "bench" and {"--tiles", "--scratch"} & set(words):
            small = ON_MPS["bench --tiles"]
        if "--plot" in words:
            small = ""
        output = ["--output", "out"] if words[2] in ("bench", "demo") else []
        return [*on_device, *words, *small.split(), *output]
    script = Path(words[0]).name
    assert words[0] == f"examples/{script}", f"no such program: {words[0]}"
    return [*on_device, *words, *SMALL[script].split()]


def make_command(words: list[str]) -> list[str]:
    (target, *arguments) = words
    own = next((x.removeprefix("ARGS=") for x in arguments if x.startswith("ARGS=")), "")
    done = [word for file in BUILT for word in ("-o", file)]
    python = f"PY={sys.executable}"
    return ["make", "-C", str(ROOT), *done, target, python, f"ARGS={own} {MADE[target]}"]


def pip_command(words: list[str]) -> list[str]:
    """Resolved and built as far as metadata goes; nothing is installed or downloaded."""
    assert words[0] == "install", words
    dry = ["--dry-run", "--no-deps", "--no-build-isolation", "--quiet", "--no-index"]
    return [sys.executable, "-m", "pip", "install", *dry, *words[1:]]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_page_s_command_runs(command: str, folder: Path):
    words, block = COMMANDS[command]
    variables = {}
    while "=" in words[0]:
        name, _, variables[name] = words[0].partition("=")
        words = words[1:]
    program, *words = words
    if program == "python":
        done = run(python_command(words), folder, PYTHONPATH=str(ROOT), **variables)
    elif program == "make":
        (folder / "out").mkdir()
        done = run(make_command(words), folder, **variables)
    elif program == "pip":
        source = shutil.copytree(
            ROOT / "src", folder / "copy" / "src", ignore=shutil.ignore_patterns("*.egg-info")
        ).parent
        for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / file, source)
        done = run(pip_command(words), source, **variables)
    else:
        pytest.fail(f"{block}: no test knows how to run {command!r}: add it to {__file__}")
    assert done.returncode == 0, f"{block}: {command}\n{done.stdout}\n{done.stderr}"


def test_every_command_of_the_package_is_on_a_page():
    """And the reverse: what is made small here exists."""
    parser = build_parser()
    (commands,) = (a.choices for a in parser._actions if hasattr(a, "choices") and a.choices)
    told = {words[3] for words, _ in COMMANDS.values() if words[:3] == _PACKAGE}
    assert set(commands) - {"demo"} <= told  # `make demo` is on the first one


_PACKAGE = ["python", "-m", "orchard_ops"]
