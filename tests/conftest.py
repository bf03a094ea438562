"""The device under test: a Mac's GPU, or on Linux the simulated one."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SIMULATED = sys.platform != "darwin"
#: Folders whose tests need the simulated device or its engine: the marker `simulated`.
SIMULATED_FOLDERS = (ROOT / "tests" / "proof", ROOT / "tests" / "simulator")

if SIMULATED:
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


def _is_simulated(path: Path) -> bool:
    return any(path.is_relative_to(folder) for folder in SIMULATED_FOLDERS)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """A Mac does not even import them."""
    return True if not SIMULATED and _is_simulated(collection_path) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if _is_simulated(item.path):
            item.add_marker(pytest.mark.simulated)
    if not SIMULATED:
        left_out = [item for item in items if item.get_closest_marker("simulated")]
        items[:] = [item for item in items if not item.get_closest_marker("simulated")]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def recording() -> Callable[..., AbstractContextManager[list]]:
    """`with recording() as launches:` is the simulator's record of what runs on the device."""
    if not SIMULATED:
        pytest.skip("a Mac keeps no record of its launches")
    return simulator.recording


@pytest.fixture
def quiet_fallback() -> Iterator[None]:
    """For tests of what runs on the reference on mps by design."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", orchard_ops.OrchardFallbackWarning)
        yield
