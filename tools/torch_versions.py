"""Tests what needs no mps device on other releases of torch: `make versions`.

Each release gets an environment of its own, which is thrown away. Releases are the arguments; by
default the oldest supported one and the newest that pip finds. Exit status 1: a test failed; 2: an
environment could not be made.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = "2.10.0"
NEWEST = "newest"
TESTING = ("numpy", "pytest>=8", "hypothesis>=6.100", "rich>=13", "setuptools>=77")
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"


def install(python: Path, release: str) -> bool:
    """Installs torch for the CPU if PyTorch's own index can be reached, or else that of the default
    index."""
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    packages = ["torch" if release == NEWEST else f"torch=={release}", *TESTING]
    if sys.platform == "linux":
        index = ["--extra-index-url", CPU_WHEELS, "--retries", "0", "--timeout", "10"]
        if subprocess.run([*pip, *packages, *index], stderr=subprocess.DEVNULL).returncode == 0:
            return True
    return subprocess.run([*pip, *packages]).returncode == 0


def run(release: str) -> int:
    """pytest's exit status for one release, or 2."""
    with tempfile.TemporaryDirectory(prefix="torch-") as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        if not install(python, release):
            print(f"torch {release}: pip could not install it", file=sys.stderr)
            return 2
        environment = os.environ | {"ORCHARD_TESTS": "cpu", "PYTHONPATH": str(ROOT / "src")}
        environment.pop("ORCHARD_NATIVE_LIBRARY", None)
        command = [
            str(python),
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/attention",
            "tests/flex",
        ]
        return subprocess.run(command, cwd=ROOT, env=environment).returncode


def main() -> int:
    releases = sys.argv[1:] or [OLDEST, NEWEST]
    statuses = {}
    for release in releases:
        print(f"torch {release}", flush=True)
        statuses[release] = run(release)
    for release, status in statuses.items():
        print(f"torch {release}: {'passed' if status == 0 else f'failed (pytest said {status})'}")
    if 2 in statuses.values():
        return 2
    return int(any(statuses.values()))


if __name__ == "__main__":
    sys.exit(main())
