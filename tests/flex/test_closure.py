"""What a mod reads is found in the byte code of every Python that is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchard_ops.flex import closure

CASES = Path(__file__).with_name("closure_cases.py")


def _pythons() -> list[str]:
    """This one, and newer ones in the search path and of pyenv."""
    folders = [Path(x) for x in os.environ.get("PATH", "").split(os.pathsep)]
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    folders += sorted(root.glob("versions/*/bin"))
    found = {sys.version_info[:2]: sys.executable}
    for version in ((3, 12), (3, 13), (3, 14), (3, 15)):
        for folder in folders:
            python = folder / f"python{version[0]}.{version[1]}"
            if version not in found and python.exists() and folder.name != "shims":
                found[version] = str(python)
    return list(found.values())


@pytest.mark.parametrize("python", _pythons())
def test_closures_are_read(python: str):
    done = subprocess.run(
        [python, CASES, closure.__file__], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("closures are read on Python 3.")


def test_instructions_that_are_not_known_are_not_followed():
    """Whatever this Python has besides, such as for `super` and imports."""
    import dis

    named = {dis.opname[n] for n in (*dis.hasname, *dis.hasfree)}
    assert named - closure._REFUSED == named & {*closure._FOLLOWED}
    assert {"IMPORT_NAME", "STORE_GLOBAL", "STORE_DEREF", "STORE_ATTR"} <= closure._REFUSED
