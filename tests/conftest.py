"""The device under test: a Mac's GPU, or on Linux the simulated one."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SIMULATED = sys.platform != "darwin"

if SIMULATED:
    sys.path.insert(0, str(ROOT))
    import simulator

    _library = ROOT / "build" / "native" / "liborchard_ops.so"
    if not _library.exists():
        pytest.exit(f"{_library.relative_to(ROOT)} is missing: run `make native` first", 2)
    os.environ.setdefault("ORCHARD_NATIVE_LIBRARY", str(_library))
    simulator.enable()

import torch  # noqa: E402

import orchard_ops  # noqa: E402


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def checked() -> Iterator[None]:
    """Kernels run under the simulator's checks (bounds, races, ...); nothing changes on a Mac."""
    if not SIMULATED:
        yield
        return
    simulator.check(True)
    try:
        yield
    finally:
        simulator.check(False)


@pytest.fixture
def fresh_stats() -> Iterator[None]:
    """Call counters start at 0 and each fallback warns once."""
    orchard_ops.reset_stats()
    yield
    orchard_ops.reset_stats()


def pytest_configure(config: pytest.Config) -> None:
    """A fallback nobody asked for is an error. (pyproject would import the package too early.)"""
    config.addinivalue_line("filterwarnings", "error::orchard_ops.OrchardFallbackWarning")


@pytest.fixture
def quiet_fallback() -> Iterator[None]:
    """For tests of what runs on the reference on mps by design."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", orchard_ops.OrchardFallbackWarning)
        yield
