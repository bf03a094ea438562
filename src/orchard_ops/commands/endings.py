"""How a command ends: its exit status, in one line why, and the files that it leaves.

Status 1 always means that a result is wrong. Whatever else stops a command has another status.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

RIGHT = 0
WRONG = 1
CANNOT_RUN = 2
"""The status that argparse gives a wrong command line, too."""
BROKEN = 3
"""The command itself failed, with a traceback to report."""
INTERRUPTED = 130
CLOSED_PIPE = 141
"""A shell gives these two statuses to a program that SIGINT or SIGPIPE ended."""

_EXTRAS = {"rich": "commands", "matplotlib": "bench", "numpy": "demo"}
"""What the commands import beyond torch, and the extra that installs it."""


class CannotRun(Exception):
    """The command cannot run for a reason that the user can change, such as a path, a device or a
    missing package. The message is one line."""


def exit_status(name: str, command: Callable[[], int]) -> int:
    """Runs a command; every way in which it can end becomes a status and a line on stderr."""
    try:
        status = command()
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except CannotRun as error:
        _say(name, str(error), error)
        return CANNOT_RUN
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in _EXTRAS:
            extra = name if name in _EXTRAS.values() else _EXTRAS[package]
            _say(name, f'it needs {package}: pip install "orchard_ops[{extra}]"', error)
            return CANNOT_RUN
        traceback.print_exc()
        return BROKEN
    except KeyboardInterrupt as error:
        _say(name, "interrupted", error)
        return INTERRUPTED
    except BrokenPipeError as error:
        _drop_stdout()
        _say(name, "the output was closed", error)
        return CLOSED_PIPE
    except Exception:
        traceback.print_exc()
        return BROKEN


def _say(name: str, what: str, error: BaseException) -> None:
    """Prints one line, with the notes that the command added to the exception."""
    line = "; ".join((what, *getattr(error, "__notes__", ())))
    print(f"{name}: {' '.join(line.split())}", file=sys.stderr)


def _drop_stdout() -> None:
    """Points the output at nothing: nobody reads it any more, and Python would complain when it
    flushes the rest at exit."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (AttributeError, OSError, ValueError):  # the stream is no file
        return


def writable(path: Path) -> Path:
    """Creates the folder of a file and opens the file, before there is anything to lose.

    What the file holds stays, and a file that was not there is not there afterwards.

    Raises:
        CannotRun: nothing can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with path.open("ab"):
            pass
        if new:
            path.unlink()
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise CannotRun(f"cannot write {path}: {_reason(error)}") from error
    return path


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all, so that a reader never meets half of it. What is no file
    (a device, a pipe) is written directly.

    Raises:
        CannotRun: it cannot be written.
    """
    try:
        if path.exists() and not path.is_file():  # a device or a pipe
            path.write_text(text)
            return
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            beside.write_text(text)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise CannotRun(f"cannot write {path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
