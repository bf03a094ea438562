"""Which tests run where: the rule that conftest.py applies, and how many it leaves out.

The suite runs on one of three devices. On the simulated one (Linux) everything runs. On an Apple
GPU the simulator, and the instruments of proof that are built on it, stay out: they need Linux and
clang-19. On the CPU alone, with whatever torch there is (`make versions`), what needs no mps
device runs. The rule looks at folders and at what a test's code names, so that a new test needs no
mark.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent

SIMULATED = "the simulated mps device"
APPLE_GPU = "an Apple GPU"
CPU = "the CPU"

_LINUX_ONLY = ("simulator", "proof")
_ANY_TORCH = (
    "test_reference*",
    "test_registration*",
    "test_bad_input*",
    "test_properties*",
    "test_versions*",
    "test_dropout*",
    "test_constant_scores*",
    "test_export*",
    "test_exceptions*",
    "test_nested_transforms*",
    "test_rule*",
    "test_sdpa_calls*",
    "test_unseen_keys*",
    "test_merge*",
    "test_flash_attention*",
    "test_key_ranges*",
    "test_ranged_attention*",
    "test_varlen*",
)
"""Files of tests/attention that say something without an mps device."""
_FLEX_ANY_TORCH = ("test_api*", "test_compile.py")
"""The same of tests/flex."""
_QUICK = (
    "test_reference*",
    "test_registration*",
    "test_bad_input*",
    "test_properties*",
    "test_versions*",
    "test_dropout*",
    "test_rule*",
    "test_plan*",
)
_KERNEL_CASES = 40


def device(platform: str, variables: Mapping[str, str]) -> str:
    """What the suite runs on: ORCHARD_TESTS=cpu asks for the CPU alone."""
    if variables.get("ORCHARD_TESTS") == "cpu":
        return CPU
    return APPLE_GPU if platform == "darwin" else SIMULATED


def leaves_out(path: Path, device: str) -> bool:
    """Whether a file or folder of tests is not even imported on a device."""
    try:
        room, *inside = path.relative_to(TESTS).parts
    except ValueError:
        return False
    if device == CPU:
        files = {"attention": _ANY_TORCH, "flex": _FLEX_ANY_TORCH}.get(room)
        wanted = files is not None and (not inside or _matches(inside[0], files))
        return path != TESTS and (path.is_dir() or path.name.startswith("test_")) and not wanted
    if device == APPLE_GPU:
        return room in _LINUX_ONLY or (path.name.startswith("test_") and _imports_simulator(path))
    return False


def needs(item: Any) -> str | None:
    """The device without which a test says nothing: the simulated one, any mps device, or none."""
    if item.get_closest_marker("simulated") or _names(item.function, "simulator"):
        return SIMULATED
    if {"checked", "recording"} & set(item.fixturenames):
        return APPLE_GPU
    values = list(item.callspec.params.values()) if hasattr(item, "callspec") else []
    # Cases may stand in a table of the module, by the names that the test is parametrized with.
    module = item.function.__globals__
    tables = [module.get(name) for name in item.function.__code__.co_names]
    names = [value for value in values if isinstance(value, str)]
    cases = [t[name] for t in tables if isinstance(t, dict) for name in names if name in t]
    for case in (values, *cases):
        parts = case if isinstance(case, (list, tuple)) else (case,)
        # The product's own functions name mps too, and run on any device.
        functions = [
            x
            for x in parts
            if isinstance(x, types.FunctionType) and x.__module__ == module["__name__"]
        ]
        if "mps" in map(str, parts) or any(_names(f, "mps") for f in functions):
            return APPLE_GPU
    return APPLE_GPU if _names(item.function, "mps") else None


def split(items: Iterable[Any], device: str) -> tuple[list[Any], list[Any]]:
    """(those that run on the device, those that do not)"""
    can = {SIMULATED: (SIMULATED, APPLE_GPU, None), APPLE_GPU: (APPLE_GPU, None), CPU: (None,)}
    kept: list[Any] = []
    left: list[Any] = []
    for item in items:
        (kept if needs(item) in can[device] else left).append(item)
    return kept, left


def quick(items: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """For the loop of work: the files of `_QUICK`, and kernel cases spread over all of them."""
    items = list(items)
    of_kernels = [item for item in items if item.path.name.startswith("test_kernels")]
    chosen = {id(item) for item in of_kernels[:: max(1, len(of_kernels) // _KERNEL_CASES)]}
    chosen |= {id(item) for item in items if _matches(item.path.name, _QUICK)}
    return [x for x in items if id(x) in chosen], [x for x in items if id(x) not in chosen]


def _imports_simulator(file: Path) -> bool:
    """Whether a module imports the simulator when it is loaded, itself or through one beside it."""
    found = []
    for statement in ast.parse(file.read_text()).body:
        if isinstance(statement, ast.Import):
            found += [alias.name for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            found.append(statement.module or "")
    beside = [file.with_name(f"{name}.py") for name in found]
    return any(name.partition(".")[0] == "simulator" for name in found) or any(
        _imports_simulator(other) for other in beside if other.exists() and other != file
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(Path(name).match(pattern) for pattern in patterns)


def _names(function: Any, word: str) -> bool:
    """Whether the code of a test, or of functions of its module that it calls, names a thing.

    A string counts too: a test may run a program in another process.
    """
    seen: set[types.CodeType] = set()

    def in_text(value: object) -> bool:
        if isinstance(value, (tuple, frozenset, list, set)):
            return any(map(in_text, value))
        if not isinstance(value, str):
            return False
        return value == word or f"import {word}" in value or f'"{word}"' in value

    def in_code(code: types.CodeType, module: Mapping[str, object]) -> bool:
        if code in seen:
            return False
        seen.add(code)
        if word in code.co_names:
            return True
        for constant in code.co_consts:
            inner = isinstance(constant, types.CodeType) and in_code(constant, module)
            if inner or in_text(constant):
                return True
        for name in code.co_names:
            value = module.get(name)
            if in_text(value):
                return True
            ours = isinstance(value, types.FunctionType) and value.__module__ == module["__name__"]
            if ours and in_code(value.__code__, module):
                return True
        return False

    function = (
        getattr(function, "hypothesis", None) and function.hypothesis.inner_test
    ) or function
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return in_code(function.__code__, function.__globals__)
