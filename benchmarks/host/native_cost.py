"""Times of the native code alone: the probe (native_probe.cpp) built and loaded."""

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
def load_probe() -> None:
    """Builds the probe from the sources of the native library and registers its ops."""
    directory = Path(torch.__file__).parent
    compiler = os.environ.get("CXX", "c++")
    objects = native_build.compile_sources([compiler], BUILD / "objects")
    objects = [path for path in objects if path.stem != "module"]  # the ops are registered already
    library = BUILD / "native_probe.so"
    probe = Path(__file__).with_name("native_probe.cpp")
    flags = [*native_build.compile_flags(directory), *native_build.link_flags(directory)]
    command = [compiler, str(probe), *map(str, objects), *flags, "-o", str(library)]
    subprocess.run(command, check=True)
    torch.ops.load_library(library)


def forward_ns(q: Tensor, k: Tensor, v: Tensor, repeats: int) -> list[int]:
    """Nanoseconds of each of `repeats` causal forwards inside the MPS kernel."""
    load_probe()
    return torch.ops.orchard_host_cost.time_forward(q, k, v, q.shape[-1] ** -0.5, repeats).tolist()


def backward_ns(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, repeats: int
) -> list[int]:
    load_probe()
    scale = q.shape[-1] ** -0.5
    return torch.ops.orchard_host_cost.time_backward(
        dout, q, k, v, out, lse, scale, repeats
    ).tolist()


def shims_ns(
    like: Tensor, allocations: int, launches: int, arguments: int, repeats: int
) -> list[int]:
    """Nanoseconds of the calls into torch alone: the simulator's share of the above."""
    load_probe()
    return torch.ops.orchard_host_cost.time_shims(
        like, allocations, launches, arguments, repeats
    ).tolist()
