"""Compiled kernels: loading, launching, and turning reports into file:line."""

import ctypes
import dataclasses
import functools
import math
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import compiler
from .counters import Counters
from .errors import KernelError
from .toolchain import INCLUDE, SYMBOLIZER, run_unchecked

MAX_BUFFERS = 31
MAX_THREADS = 1024
_COUNTED = [f.name for f in dataclasses.fields(Counters)][:-1]
_REPORT_BYTES = 1 << 16
_uint = ctypes.c_uint
_ulong = ctypes.c_ulong


@dataclass(frozen=True)
class Buffer:
    """Memory that is bound to a kernel; the caller keeps it alive during the launch."""

    address: int
    nbytes: int
    writable: bool = True


class _Launch(ctypes.Structure):
    """msl::Launch"""

    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("threads", _uint * 3),
        ("group", _uint * 3),
        ("buffers", ctypes.c_void_p * MAX_BUFFERS),
        ("buffer_bytes", _ulong * MAX_BUFFERS),
        ("bound", _uint),
        ("writable", _uint),
        ("declared", _uint),
        ("threadgroup_bytes", _uint * MAX_BUFFERS),
        ("check", _uint),
        ("random_schedule", _uint),
        ("seed", _uint),
        ("workers", _uint),
        ("block_counts", ctypes.POINTER(_ulong)),
        ("block_count", _uint),
        ("report_text", ctypes.c_char_p),
        ("report_capacity", _uint),
        ("reports", _uint),
        ("memory_bytes", _uint),
        ("counters", _ulong * len(_COUNTED)),
        ("groups", _uint * 3),
        ("arena_peak", _uint),
        ("image", ctypes.c_void_p * 2),
    ]


class _Entry(ctypes.Structure):
    """msl::Entry"""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("run", ctypes.c_void_p),
        ("max_threads", _uint),
        ("declared", _uint),
        ("read_only", _uint),
    ]


@functools.cache
def _runtime() -> ctypes.CDLL:
    library = ctypes.CDLL(str(compiler.runtime()), mode=ctypes.RTLD_GLOBAL)
    library.msl_launch.argtypes = [ctypes.POINTER(_Launch)]
    return library


class Library:
    """The kernels of one source.  May be used from several threads at once."""

    def __init__(self, path: Path, check: bool):
        _runtime()
        self.path = path
        self.check = check
        facts = compiler.facts_of(path)
        #: language warnings, such as C++17 features that Metal 3 accepts as an extension
        self.warnings: list[str] = facts["warnings"]
        self._blocks: list[dict[str, int]] = facts["blocks"]
        self._handle = ctypes.CDLL(str(path))
        self._kernels = {entry.name.decode(): entry for entry in self._entries()}

    def _entries(self) -> list[_Entry]:
        ends = []
        for function in (self._handle.msl_entries_begin, self._handle.msl_entries_end):
            function.restype = ctypes.c_void_p
            ends.append(function() or 0)
        count = (ends[1] - ends[0]) // ctypes.sizeof(_Entry)
        return list((_Entry * count).from_address(ends[0])) if count else []

    @property
    def names(self) -> list[str]:
        return sorted(self._kernels)

    def max_threads(self, name: str) -> int:
        """max_total_threads_per_threadgroup of a kernel."""
        return min(self._kernel(name).max_threads, MAX_THREADS)

    def launch(
        self,
        name: str,
        threads: tuple[int, int, int],
        group: tuple[int, int, int],
        buffers: Mapping[int, Buffer],
        *,
        threadgroup_memory: Mapping[int, int] | None = None,
        workers: int = 2,
        seed: int | None = None,
    ) -> Counters:
        """Runs a kernel on a grid of ``threads`` in threadgroups of ``group``.

        As with Metal's dispatchThreads the grid need not divide: threadgroups at its edges are
        smaller.  ``threadgroup_memory`` gives the bytes of [[threadgroup(i)]] arguments,
        ``workers`` the operating system threads; with a ``seed`` the lanes run in random order.
        Raises KernelError if the launch is refused or anything is reported.
        """
        launch = self._prepare(name, threads, group, buffers, threadgroup_memory or {})
        launch.workers = max(1, workers)
        if seed is not None:
            launch.random_schedule = 1
            launch.seed = seed & 0xFFFFFFFF
        return self._run(name, launch)

    def instruction_mix(self, *args, **kwargs) -> tuple[Counters, dict[str, int]]:
        """Launches like launch(), and counts the executed LLVM instructions by class.

        Loads and stores are counted by width as well: "load_threadgroup:4" are those of 4 bytes.
        Needs a library compiled with check=True.
        """
        if not self.check:
            raise ValueError("instruction_mix needs a library compiled with check=True")
        counts = (_ulong * max(1, len(self._blocks)))()
        with _counting(counts):
            counters = self.launch(*args, **kwargs)
        mix: dict[str, int] = {}
        for block, executions in zip(self._blocks, counts, strict=False):
            for class_, number in block.items():
                mix[class_] = mix.get(class_, 0) + number * executions
        return counters, {k: v for k, v in mix.items() if v}

    def _kernel(self, name: str) -> _Entry:
        if name not in self._kernels:
            raise KernelError(f"there is no kernel '{name}' in the library")
        return self._kernels[name]

    def _prepare(self, name, threads, group, buffers, threadgroup_memory) -> _Launch:
        entry = self._kernel(name)
        if len(threads) != 3 or len(group) != 3 or min(*threads) < 0 or min(*group) < 1:
            raise KernelError(
                f"{name}: invalid grid {tuple(threads)} or threadgroup {tuple(group)}"
            )
        limit = self.max_threads(name)
        if math.prod(group) > limit:
            raise KernelError(
                f"{name}: a threadgroup of {tuple(group)} has {math.prod(group)} threads; "
                f"the kernel allows {limit}"
            )
        for index in [*buffers, *threadgroup_memory]:
            if not 0 <= index < MAX_BUFFERS:
                raise KernelError(f"{name}: index {index}; Metal has 31 buffers, 0 to 30")
        launch = _Launch(entry=entry.run, declared=entry.declared, check=self.check)
        launch.threads[:] = threads
        launch.group[:] = group
        for index, buffer in buffers.items():
            launch.buffers[index] = buffer.address
            launch.buffer_bytes[index] = buffer.nbytes
            launch.bound |= 1 << index
            if buffer.writable and not entry.read_only >> index & 1:
                launch.writable |= 1 << index
        for index, nbytes in threadgroup_memory.items():
            launch.threadgroup_bytes[index] = nbytes
        return launch

    def _run(self, name: str, launch: _Launch) -> Counters:
        text = ctypes.create_string_buffer(_REPORT_BYTES)
        launch.report_text = ctypes.cast(text, ctypes.c_char_p)
        launch.report_capacity = _REPORT_BYTES
        counts = getattr(_counting_state, "counts", None)
        if counts is not None:
            launch.block_counts = ctypes.cast(counts, ctypes.POINTER(_ulong))
            launch.block_count = len(counts)
        if math.prod(launch.threads) and _runtime().msl_launch(ctypes.byref(launch)):
            lines = text.value.decode(errors="replace").splitlines()
            raise KernelError(resolve_reports(self.path, name, lines))
        values = dict(zip(_COUNTED, launch.counters, strict=True))
        for product in ("mma", "mma_half", "mma_bfloat"):
            values[product] //= 32
        return Counters(**values, threadgroup_memory=launch.memory_bytes)


# The block counters of an instruction_mix call reach the launch below it through the thread.
_counting_state = threading.local()


class _counting:
    def __init__(self, counts: ctypes.Array):
        self.counts = counts

    def __enter__(self) -> None:
        _counting_state.counts = self.counts

    def __exit__(self, *exception) -> None:
        _counting_state.counts = None


# ---- reports

_OFFSET = re.compile(r"@0x([0-9a-f]+)")


def resolve_reports(library: Path, kernel: str, lines: Sequence[str]) -> list[str]:
    """Replaces the offsets that the runtime writes by file:line."""
    offsets = sorted({int(m, 16) for line in lines for m in _OFFSET.findall(line)} - {0})
    places = dict(zip(offsets, _places(library, offsets), strict=True))
    reports = []
    for line in lines:
        m = _OFFSET.match(line)
        place = places.get(int(m[1], 16)) or "unknown place"
        rest = _OFFSET.sub(lambda m: places.get(int(m[1], 16), "?"), line[m.end() :].strip())
        reports.append(f"{place}: kernel '{kernel}', {rest}")
    return list(dict.fromkeys(reports))


def _places(library: Path, offsets: Sequence[int]) -> list[str]:
    """file:line of return addresses; callers of inlined functions follow behind an arrow."""
    if not offsets:
        return []
    command = [SYMBOLIZER, "-e", str(library), "--functions=none", "--inlines"]
    output = run_unchecked([*command, *(hex(offset - 1) for offset in offsets)]).stdout
    places = []
    for chunk in output.strip().split("\n\n"):
        frames = [f for f in chunk.splitlines() if not f.startswith((str(INCLUDE), "?"))]
        places.append(" <- ".join(f.rsplit("/", 1)[-1].rsplit(":", 1)[0] for f in frames))
    return places
