"""The most memory that a call holds at once beyond its inputs, and which errors mean that there was
too little.

The bytes that PyTorch's allocator gives out are counted: results, tensors that autograd keeps, and
temporary tensors, also those inside of an operator. Memory that a library takes by itself (the C
heap, MPSGraph) is not counted.
"""

from __future__ import annotations

import functools
import gc
import os
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "invalid buffer size",
)


def is_out_of_memory(error: BaseException) -> bool:
    """The MPS and CPU allocators raise plain RuntimeErrors; Metal limits one buffer's size."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY)


def release(device: torch.device) -> None:
    """Returns unused memory to the system, also after an error."""
    gc.collect()
    if device.type == "mps":
        torch.mps.empty_cache()


def method(device: torch.device) -> str:
    """A sentence that says how `peak_bytes` measures on this device."""
    if device.type == "cpu":
        return "allocations of PyTorch's CPU allocator, by torch.profiler"
    if _has_peak():
        return "torch.accelerator.max_memory_allocated"
    return "growth of torch.mps.driver_allocated_memory after empty_cache"


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The bytes that one call holds at its peak, with its results and without its inputs. `method`
    says how they are measured."""
    if device.type == "cpu":
        return _cpu_peak(call)
    has_peak = _has_peak()
    release(device)
    _settle()
    if has_peak:
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        results = call()
        torch.mps.synchronize()
        peak = torch.accelerator.max_memory_allocated() - before
    else:
        # The cache keeps what the call has freed, so the driver's total after the call is its peak.
        before = torch.mps.driver_allocated_memory()
        results = call()
        torch.mps.synchronize()
        peak = torch.mps.driver_allocated_memory() - before
    del results
    return peak


def _settle() -> None:
    """Waits until memory in use no longer falls: the thread that ran a backward gives back the last
    of its gradients a little after the call has returned."""
    torch.mps.synchronize()
    before, quiet, deadline = -1, 0, time.monotonic() + 2.0
    while quiet < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
        now = torch.mps.current_allocated_memory()
        quiet = quiet + 1 if now == before else 0
        before = now


@functools.cache
def _has_peak() -> bool:
    """Whether PyTorch's MPS allocator remembers its peak, as new releases do. Older ones raise or
    answer 0, which tells something only while memory is allocated."""
    something = torch.empty(1, device="mps")
    try:
        torch.accelerator.reset_peak_memory_stats()
        return torch.accelerator.max_memory_allocated() >= something.nbytes
    except (AttributeError, RuntimeError):
        return False


def _cpu_peak(call: Callable[[], object]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler logs every start
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        results = call()
    del results
    events = record.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, nbytes in changes:
        held += nbytes
        peak = max(peak, held)
    return peak
