"""What the package and its native library must agree on, and how they find out that they do."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import Case

import orchard_ops
from orchard_ops import environment
from orchard_ops.plan import plan
from orchard_ops.scoring import Scoring

LIBRARY = Path(os.environ.get("ORCHARD_NATIVE_LIBRARY", ""))
native = pytest.mark.skipif(sys.platform == "darwin", reason="builds libraries as Linux does")


def interface() -> str:
    function = ctypes.CDLL(str(LIBRARY)).orchard_library_interface
    function.restype = ctypes.c_char_p
    return function().decode()


@native
@pytest.mark.parametrize(
    "op",
    (
        "flash_attn_fwd",
        "flash_attn_bwd",
        "flash_attn_plan",
        "flash_attn_decode",
        "flash_attn_append",
        "flash_attn_decode_plan",
        "flash_attn_append_plan",
        "flex_attn_fwd",
        "flex_attn_bwd",
        "flex_attn_plan",
    ),
)
def test_the_library_states_the_schemas_that_are_registered(op: str):
    """Argument for argument: native/scoring.h has the list that the Python schemas have."""
    schema = str(getattr(torch.ops.orchard, op).default._schema)
    schema = schema.removeprefix("orchard::").replace('="auto"', "")
    assert schema in interface().partition(": ")[2].split("; ")


STATEMENT = (
    'extern "C" const char* orchard_library_interface() { return "orchard_ops interface 1"; }'
)
REGISTER = 'extern "C" const char* orchard_register_ops() { __builtin_trap(); }'
LOADED = """
import warnings, torch
import simulator
simulator.enable()
import orchard_ops
x = torch.ones(1, 1, 2, 16, device="mps")
warnings.simplefilter("ignore", orchard_ops.OrchardFallbackWarning)
orchard_ops.flash_attn(x, x, x)
print(orchard_ops.stats())
"""


@native
@pytest.mark.parametrize(
    ("source", "reason"),
    (
        ("int unrelated = 1;", "is not a native library of orchard_ops"),
        (f"{STATEMENT}\n{REGISTER}", "is of another version of orchard_ops"),
    ),
    ids=("unrelated", "another version"),
)
def test_other_libraries_are_told_apart(source: str, reason: str, tmp_path: Path):
    """Such libraries register nothing, calls run on the reference, and stats() says why."""
    (tmp_path / "other.cpp").write_text(source)
    library = tmp_path / "other.so"
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-shared", "-fPIC", str(tmp_path / "other.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    variables = {"ORCHARD_NATIVE_LIBRARY": str(library), "PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", LOADED],
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert f"other.so {reason}" in result.stdout


@native
def test_a_second_copy_registers_nothing_and_says_so(tmp_path: Path):
    copy = ctypes.CDLL(shutil.copy(LIBRARY, tmp_path / "copy.so"))
    copy.orchard_register_ops.restype = ctypes.c_char_p
    assert b"another copy of it is loaded" in copy.orchard_register_ops(b"orchard")
    test_the_plan_is_typed()


def test_the_plan_is_typed():
    q, k, v, _ = (x.to("mps") for x in Case(40, 200, 64, num_heads=4, num_kv_heads=2).operands())
    result = plan(q, k, v, *Scoring(), "auto")
    assert (result.refusal, result.detail, result.why_not) == ("", "", "")
    families = [kernel.family for kernel in result.kernels]
    assert families[:2] == ["attention_forward", "attention_backward_delta"]
    for kernel in result.kernels:
        assert kernel.name.startswith(f"{kernel.family}_float32_d64_")
        assert f'host_name("{kernel.name}")' in kernel.instantiation
        assert "threadgroups of 128 threads" in kernel.tile and kernel.tile_name in kernel.name
        assert bool(kernel.alternatives) == (kernel.family == "attention_forward")
    assert result.kernels[0].tile_name in result.kernels[0].alternatives
    assert [launch[0] for launch in result.launches] == [0, 1, 2, 3]
    assert result.launches[0] == (0, 4, 2, 0, 0, 200)
    assert result.scratch_bytes == 4 * 10 * 25 * 128


def refusal(*, head_dim: int = 16, diagonal: int = 0) -> orchard_ops.Explanation:
    x = torch.ones(1, 1, 4, head_dim, device="mps")
    return plan(x, x, x, *Scoring(diagonal=diagonal), "auto")


@pytest.mark.parametrize(
    "values",
    ([{"diagonal": 2**28 + 1}, {"diagonal": -(2**29)}], [{"head_dim": 257}, {"head_dim": 300}]),
)
def test_a_reason_is_the_same_for_all_values(values: list[dict]):
    """The refusal is the same for different values, since warnings and stats count by it. The
    detail has the values, and the advice fits them."""
    one, other = (refusal(**value) for value in values)
    assert one.refusal == other.refusal != ""
    assert one.detail != other.detail
    for result, value in ((one, values[0]), (other, values[1])):
        assert result.detail == f"got {abs(next(iter(value.values())))}"
        assert result.advice and "split the heads" not in result.advice


WORDS = ("1", "true", "yes", "on", "0", "false", "no", "off")
WAYS_TO_WRITE = (str, str.upper, str.title, lambda word: f" {word}", lambda word: f"{word}\n")
NO_WORDS = ("2", "-1", "y", "n", "t", "none", "tru", "o n", "01", "1.0")
SPELLINGS = ("", " ", "\t", *(f(word) for f in WAYS_TO_WRITE for word in WORDS), *NO_WORDS)


@pytest.mark.parametrize("text", dict.fromkeys(SPELLINGS), ids=repr)
def test_python_and_native_agree_on_what_is_on(text: str, monkeypatch: pytest.MonkeyPatch):
    """ORCHARD_DISABLE_METAL is read by the native code, and here by the Python rule."""
    monkeypatch.setenv("ORCHARD_DISABLE_METAL", text)
    word = text.strip().lower()
    if word and word not in WORDS:
        message = f"ORCHARD_DISABLE_METAL must be 1, true, .*; got '{text}'"
        for ask in (refusal, lambda: environment.switched_on("ORCHARD_DISABLE_METAL")):
            with pytest.raises(RuntimeError, match=message):
                ask()
        return
    on = word in WORDS[:4]
    assert environment.switched_on("ORCHARD_DISABLE_METAL") == on
    assert refusal().refusal == ("ORCHARD_DISABLE_METAL is set" if on else "")
