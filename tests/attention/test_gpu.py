"""The machine's GPU: what torch says of it, and the scratch that follows from its memory."""

from __future__ import annotations

import re

import pytest
import torch

import orchard_ops
from orchard_ops import environment, gpu

GIB = 1 << 30


@pytest.mark.parametrize(
    ("memory", "scratch_mb"),
    (
        (0, 260),  # not known
        (5 * GIB, 260),
        (10 * GIB, 325),
        (12 * GIB - 1, 325),
        (12 * GIB, 390),
        (48 * GIB, 1560),
        (128 * GIB, 4160),
        (400 * GIB, 4160),
    ),
)
def test_the_scratch_is_a_share_of_the_memory(memory: int, scratch_mb: int):
    assert gpu.Gpu(8, memory).scratch_mb == scratch_mb


@pytest.mark.parametrize(
    ("ram", "memory"),
    ((24, 16 * GIB), (32, 32 * GIB * 2 // 3), (36, 27 * GIB), (48, 36 * GIB), (64, 48 * GIB)),
)
def test_metal_recommends_a_part_of_a_machine_s_memory(ram: int, memory: int):
    assert gpu.of_machine(ram * GIB) == (gpu.LEAST_CORES, memory)


def test_a_gpu_that_says_nothing_is_the_smallest(monkeypatch: pytest.MonkeyPatch):
    def refuses() -> int:
        raise RuntimeError("no such property")

    ask = gpu.here.__wrapped__
    monkeypatch.setattr(torch.backends.mps, "get_core_count", lambda: 0)
    assert ask().cores == gpu.LEAST_CORES
    monkeypatch.setattr(torch.backends.mps, "get_core_count", refuses)
    assert ask() == (gpu.LEAST_CORES, 0)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: False)
    assert ask() == (gpu.LEAST_CORES, 0)


def test_plans_are_for_the_machine_s_cores_unless_told(monkeypatch: pytest.MonkeyPatch):
    """In turns, 1 MiB stores dS of 600 keys faster than it is computed twice, on one core alone."""
    monkeypatch.setenv("ORCHARD_BACKWARD_SCRATCH_MB", "1")
    q, k, v = (torch.randn(1, 2, 600, 64, device="mps", requires_grad=True) for _ in range(3))
    of_machine = orchard_ops.explain(q, k, v).products
    found = {}
    for cores in (1, gpu.here().cores, 1 << 20):
        monkeypatch.setenv("ORCHARD_GPU_CORES", str(cores))
        found[cores] = orchard_ops.explain(q, k, v).products
    assert found[1].startswith("five products: dS of ") and found[1].endswith(" at a time")
    assert found[gpu.here().cores] == of_machine
    assert found[1 << 20].startswith("seven products: dS is computed twice, since no part of it")


@pytest.mark.parametrize("name", ("ORCHARD_GPU_CORES", "ORCHARD_BACKWARD_SCRATCH_MB"))
@pytest.mark.parametrize(
    "value", ("0", " 12 ", "007", "", " ", "-3", "+8", "many", "1 2", "8.0", str(1 << 40))
)
def test_a_number_is_the_same_for_the_library_and_for_python(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(name, value)
    q = torch.randn(1, 2, 64, 64, device="mps", requires_grad=True)
    read = environment.gpu_cores if name == "ORCHARD_GPU_CORES" else environment.scratch_mb
    least = 1 if name == "ORCHARD_GPU_CORES" else 0
    blank = not value.strip()
    if blank or (value.strip().isdecimal() and least <= int(value) < 1 << 40):
        assert read() == (None if blank else int(value))
        assert orchard_ops.explain(q, q, q).path == "metal"
        return
    for ask in (read, lambda: orchard_ops.explain(q, q, q)):
        with pytest.raises(
            RuntimeError, match=f"{name} must be a whole number.*got '{re.escape(value)}'"
        ):
            ask()
