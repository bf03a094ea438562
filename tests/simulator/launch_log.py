"""What was dispatched: one Launch for every kernel that ran."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
from collections.abc import Iterator

# Enough for the longest test; a training run of any length keeps the last ones only.
MAX_LAUNCHES = 10_000


@dataclasses.dataclass(frozen=True)
class Argument:
    """A buffer that was bound to a kernel."""

    index: int
    nbytes: int  # from the tensor's first byte to the end of its storage
    is_tensor: bool  # False: bytes, which the kernel can only read


@dataclasses.dataclass(frozen=True)
class Launch:
    """One dispatch that ran to its end."""

    kernel: str
    threads: tuple[int, int, int]  # the whole grid, in threads
    group: tuple[int, int, int]  # threads of one threadgroup
    arguments: tuple[Argument, ...]
    counters: object  # the engine's Counters
    seconds: float


_lock = threading.Lock()
_launches: collections.deque[Launch] = collections.deque(maxlen=MAX_LAUNCHES)
_recordings: list[list[Launch]] = []


def add(launch: Launch) -> None:
    with _lock:
        _launches.append(launch)
        for recording in _recordings:
            recording.append(launch)


def launches() -> list[Launch]:
    """The launches since clear_launches(), oldest first; at most the last 10 000 of them."""
    with _lock:
        return list(_launches)


def clear_launches() -> None:
    with _lock:
        _launches.clear()


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects the launches of the block, of all threads, and leaves launches() alone.

    >>> with simulator.recording() as launches:
    ...     model(x)
    >>> [launch.kernel for launch in launches]
    """
    mine: list[Launch] = []
    with _lock:
        _recordings.append(mine)
    try:
        yield mine
    finally:
        with _lock:
            # By identity: two recordings with equal contents are equal lists.
            _recordings[:] = [other for other in _recordings if other is not mine]
