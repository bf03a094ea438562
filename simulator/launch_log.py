"""What was dispatched: one Launch for every kernel that ran."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator

from . import library


@dataclasses.dataclass(frozen=True)
class Argument:
    """A buffer that was bound to a kernel."""

    index: int
    nbytes: int  # from the tensor's first byte to the end of its storage
    is_tensor: bool  # False: bytes, which the kernel can only read


@dataclasses.dataclass(frozen=True)
class Launch:
    """One dispatch that ran to its end, or was only recorded."""

    kernel: str
    threads: tuple[int, int, int]  # the whole grid, in threads
    group: tuple[int, int, int]  # threads of one threadgroup
    arguments: tuple[Argument, ...]
    counters: object  # the engine's Counters; None if it was only recorded
    seconds: float


_lock = threading.Lock()
_recordings: list[list[Launch]] = []


def wanted() -> bool:
    """Whether a block records; else nothing is kept, so that long runs do not grow."""
    return bool(_recordings)


def add(launch: Launch) -> None:
    with _lock:
        for recording in _recordings:
            recording.append(launch)


@contextlib.contextmanager
def recording(execute: bool = True) -> Iterator[list[Launch]]:
    """Collects the launches of the block, of all threads. Blocks nest.

    execute=False is the recording engine: kernels are written down and not run, so that only the
    host's work is left to measure. Results are then whatever lay in memory, the list fills at the
    end of the block (with the last 10 000 launches), and such blocks do not nest.

    >>> with simulator.recording() as launches:
    ...     model(x)
    >>> [launch.kernel for launch in launches]
    """
    if not execute:
        with _unexecuted() as mine:
            yield mine
        return
    mine = []
    with _lock:
        _recordings.append(mine)
    try:
        yield mine
    finally:
        with _lock:
            # By identity: two recordings with equal contents are equal lists.
            _recordings[:] = [other for other in _recordings if other is not mine]


_only_recording = threading.Lock()


@contextlib.contextmanager
def _unexecuted() -> Iterator[list[Launch]]:
    device = library.get()
    if not _only_recording.acquire(blocking=False):
        raise RuntimeError(
            "simulator: recording(execute=False) inside another one; such blocks do not nest"
        )
    mine: list[Launch] = []
    device.simulator_set_only_recording(1)
    try:
        yield mine
    finally:
        device.simulator_set_only_recording(0)
        lines = device.simulator_take_recorded().decode().splitlines()
        mine.extend(_parsed(line) for line in lines)
        _only_recording.release()


def _parsed(line: str) -> Launch:
    """A line of device/unexecuted.cpp: kernel, grid, threadgroup, index:nbytes:is_tensor ..."""
    kernel, *words = line.split(" ")
    sizes = tuple(map(int, words[:6]))
    arguments = (tuple(map(int, word.split(":"))) for word in words[6:])
    return Launch(
        kernel=kernel,
        threads=sizes[:3],
        group=sizes[3:],
        arguments=tuple(
            Argument(index, nbytes, bool(tensor)) for index, nbytes, tensor in arguments
        ),
        counters=None,
        seconds=0.0,
    )
