"""A simulated MPS device for Linux: ``device="mps"`` on a CPU build of PyTorch.

>>> import torch, simulator
>>> simulator.enable()
>>> torch.ones(3, device="mps") + 1

Operators of PyTorch run on the CPU, over memory that no CPU code can read by accident. Metal
kernels, whether of an extension or of torch.mps.compile_shader, are compiled and executed by
``simulator.engine``. The README beside this file says what that proves and what it cannot.

This module imports torch only in enable(), so that the engine can be used without it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import platform
from typing import TYPE_CHECKING

from . import library
from .build import compile_flags
from .fault_injection import faults
from .launch_log import Argument, Launch, recording
from .strictness import strict

if TYPE_CHECKING:
    from .engine_bridge import EngineBridge

__all__ = [
    "Argument",
    "Launch",
    "Memory",
    "Waits",
    "check",
    "checking",
    "compile_flags",
    "enable",
    "enabled",
    "fallback_ops",
    "faults",
    "memory",
    "recording",
    "reset_peak",
    "schedule_seed",
    "strict",
    "waits",
]

_bridge: EngineBridge | None = None
_set_arg_bytes: ctypes.CDLL | None = None


def enable(
    check: bool | None = None,
    *,
    set_arg_bytes: bool = False,
    schedule_seed: int | None = None,
) -> None:
    """Makes ``device="mps"`` work in this process. Calling it again changes what is passed.

    Must come before PyTorch is first asked for MPS: right after ``import torch``.

    check: have the engine check memory accesses, races and so on; off at first (see check()).
    set_arg_bytes: also provide torch_mps_set_arg_bytes, which torch has from 2.14 on. It stays.
    schedule_seed: run the threadgroups in an order drawn from this seed (see schedule_seed()).
    """
    global _bridge, _set_arg_bytes
    if _bridge is None:
        if platform.system() != "Linux":
            raise RuntimeError(
                "simulator: the simulated device is for Linux; a Mac has the real one"
            )
        import torch

        if torch.version.cuda is not None or torch.version.hip is not None:
            raise RuntimeError(
                f"simulator: torch {torch.__version__} is built for a GPU, and PyTorch takes one "
                "accelerator at a time; install a CPU build, as in `pip install torch==2.13.0 "
                "--index-url https://download.pytorch.org/whl/cpu`"
            )
        device = library.load()
        # A backward pass just before the end of the program must not abort it (device/exit.cpp).
        atexit.register(device.simulator_settle_autograd)
        from . import torch_bindings

        torch_bindings.install()
        from . import engine
        from .engine_bridge import EngineBridge

        _bridge = EngineBridge(device, engine)
    if set_arg_bytes and _set_arg_bytes is None:
        from . import build

        _set_arg_bytes = ctypes.CDLL(str(build.set_arg_bytes_library()), mode=ctypes.RTLD_GLOBAL)
    if check is not None:
        _bridge.check = check
    if schedule_seed is not None:
        _bridge.schedule_seed = schedule_seed


def enabled() -> bool:
    return _bridge is not None


def check(on: bool = True) -> None:
    """Switches the engine's checks, at once, also for libraries that are compiled already."""
    _the_bridge().check = on


@contextlib.contextmanager
def checking(on: bool = True):
    """check() for the duration of a block."""
    bridge = _the_bridge()
    before, bridge.check = bridge.check, on
    try:
        yield
    finally:
        bridge.check = before


def schedule_seed(seed: int | None) -> None:
    """Has the engine run threadgroups in an order drawn from the seed; None: in its own order."""
    _the_bridge().schedule_seed = seed


@dataclasses.dataclass(frozen=True)
class Memory:
    """Device memory in bytes. What a borrowed CPU kernel needs on the way is not counted."""

    allocated: int
    peak: int  # since reset_peak()
    allocations: int  # how many there have been in all
    total: int  # the bytes of all of them


def memory() -> Memory:
    values = [ctypes.c_int64() for _ in range(4)]
    library.get().simulator_memory(*map(ctypes.byref, values))
    return Memory(*(value.value for value in values))


def reset_peak() -> None:
    """Makes the memory allocated now the peak."""
    library.get().simulator_reset_peak()


@dataclasses.dataclass(frozen=True)
class Waits:
    """Counts how often the CPU of a Mac would have waited for the GPU in this process."""

    synchronize: int  # synchronize() of the device, a stream or an event
    copy: int  # blocking copies between cpu and mps
    read: int  # operators that need data for a number or a size: .item(), nonzero, equal

    @property
    def total(self) -> int:
        return self.synchronize + self.copy + self.read


def waits() -> Waits:
    values = [ctypes.c_int64() for _ in range(3)]
    library.get().simulator_waits(*map(ctypes.byref, values))
    return Waits(*(value.value for value in values))


def fallback_ops() -> dict[str, int]:
    """The operators of PyTorch that borrowed a CPU kernel in this process, and how often."""
    lines = library.get().simulator_fallback_ops().decode().splitlines()
    return {name: int(count) for count, name in (line.split(" ", 1) for line in lines)}


def _the_bridge() -> EngineBridge:
    if _bridge is None:
        raise RuntimeError("simulator: the device is not enabled; call simulator.enable() first")
    return _bridge
