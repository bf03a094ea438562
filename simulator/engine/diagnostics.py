"""Makes clang's diagnostics speak of the program only.

An error inside the library's headers (a failed static_assert, say) is moved to the place in the
program that led to it, and notes about the headers are dropped.
"""

import re
import subprocess
from collections.abc import Sequence

from .errors import CompileError
from .toolchain import INCLUDE, run_unchecked

_HEAD = re.compile(r"^(?P<place>[^\s:][^:\n]*:\d+(?::\d+)?): (?P<kind>[a-z ]+): (?P<text>.*)")
_MAX_LENGTH = 6000


def run_compiler(command: Sequence[str], text: str) -> subprocess.CompletedProcess:
    """Runs clang on a program; its diagnostics become a CompileError."""
    result = run_unchecked(command, text)
    if result.returncode < 0 or "PLEASE submit a bug report" in result.stderr:
        raise RuntimeError(f"the compiler crashed: {' '.join(command)}\n{result.stderr}")
    if result.returncode:
        raise CompileError(clean(result.stderr))
    return result


def clean(diagnostics: str) -> str:
    result = []
    for group in _groups(diagnostics):
        head = _HEAD.match(group[0][0])
        if _in_library(head["place"]):
            caller = next(
                (n for n in group[1:] if not _in_library(_HEAD.match(n[0])["place"])), None
            )
            place = _HEAD.match(caller[0])["place"] if caller else head["place"]
            result.append(f"{place}: {head['kind']}: {head['text']}")
            result += caller[1:] if caller else []
        else:
            for part in group:
                if not _in_library(_HEAD.match(part[0])["place"]):
                    result += part
    text = "\n".join(result) or diagnostics.strip()
    return text if len(text) <= _MAX_LENGTH else text[:_MAX_LENGTH] + "\n..."


def _in_library(place: str) -> bool:
    return place.startswith(str(INCLUDE))


def _groups(diagnostics: str) -> list[list[list[str]]]:
    """Errors and warnings, each with its notes; each of those with its lines of source text."""
    groups: list[list[list[str]]] = []
    for line in diagnostics.splitlines():
        head = _HEAD.match(line)
        if head and head["kind"] != "note":
            groups.append([[line]])
        elif head and groups:
            groups[-1].append([line])
        elif groups and re.match(r"\s+\d* \|", line):
            groups[-1][-1].append(line)
    return groups
