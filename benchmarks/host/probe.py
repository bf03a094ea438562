"""The native probe (native_probe.cpp): built, loaded, read."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "host"

sys.path.insert(0, str(ROOT / "native"))

import build as native_build  # noqa: E402


@functools.cache
def load() -> None:
    """Builds the probe with the native library's sources and puts its clock before the kernels."""
    directory = Path(torch.__file__).parent
    compiler = os.environ.get("CXX", "c++")
    objects = native_build.compile_sources([compiler], BUILD / "objects")
    objects = [path for path in objects if path.stem != "module"]  # its ops are registered already
    library = BUILD / "native_probe.so"
    source = Path(__file__).with_name("native_probe.cpp")
    flags = [*native_build.compile_flags(directory), *native_build.link_flags(directory)]
    command = [compiler, str(source), *map(str, objects), *flags, "-o", str(library)]
    subprocess.run(command, check=True)
    torch.ops.load_library(library)


def take_times() -> tuple[list[int], list[int]]:
    """Nanoseconds inside the MPS kernels since the last time: of forwards, of backwards."""
    forward, backward = torch.ops.orchard_host_cost.take_times()
    return forward.tolist(), backward.tolist()


def shims_ns(
    like: Tensor, allocations: int, launches: int, arguments: int, repeats: int
) -> list[int]:
    """Nanoseconds of the calls into torch alone, in a tight loop."""
    return torch.ops.orchard_host_cost.time_shims(
        like, allocations, launches, arguments, repeats
    ).tolist()
