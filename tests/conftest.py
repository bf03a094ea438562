"""The device under test: a Mac's GPU, on Linux the simulated one, or the CPU alone (rooms.py)."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import rooms

if TYPE_CHECKING:
    from benchmarks.planner import Planner

ROOT = Path(__file__).resolve().parent.parent
DEVICE = rooms.device(sys.platform, os.environ)
SIMULATED = DEVICE == rooms.SIMULATED
LEFT_OUT = pytest.StashKey[list[Path]]()

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
    """A fallback that no test asked for is an error. (pyproject would import the package too
    early.)"""
    config.addinivalue_line("filterwarnings", "error::orchard_ops.OrchardFallbackWarning")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="for the loop of work: `make quick`")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if not rooms.leaves_out(collection_path, DEVICE):
        return None
    config.stash.setdefault(LEFT_OUT, []).append(collection_path)
    return True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left: list[pytest.Item] = []
    items[:], left = rooms.split(items, DEVICE)
    if config.getoption("quick"):
        items[:], more = rooms.quick(items)
        left += more
    if left:
        config.hook.pytest_deselected(items=left)


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> str:
    """What the rule leaves out is said, beside pytest's own count of deselected tests."""
    versions = f"torch {torch.__version__}, Python {sys.version.split()[0]}"
    paths = config.stash.get(LEFT_OUT, [])
    names = ", ".join(sorted(path.relative_to(rooms.TESTS).as_posix() for path in paths))
    return f"on {DEVICE}: {len(items)} tests, {versions}; left out by rule: {names or 'nothing'}"


@pytest.fixture
def recording() -> Callable[..., AbstractContextManager[list | None]]:
    """`with recording() as launches:` is the simulator's record of what runs on the device.

    A Mac keeps none: `launches` is None there, and the test judges by the results alone.
    """
    return simulator.recording if SIMULATED else contextlib.nullcontext


@pytest.fixture(scope="session")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Planner:
    """native/plan as a library of its own, where it can be compiled."""
    if sys.platform != "linux":
        pytest.skip("the plan alone is compiled on Linux")
    from benchmarks import planner

    library = tmp_path_factory.mktemp("planner") / "planner.so"
    planner.compile_planner(library)
    return planner.Planner(library)


@pytest.fixture
def quiet_fallback() -> Iterator[None]:
    """Lets calls run on the reference without a warning, for tests in which they do so by
    design."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", orchard_ops.OrchardFallbackWarning)
        yield
