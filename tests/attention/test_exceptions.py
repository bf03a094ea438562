"""What a fallback on mps raises or warns of keeps its type and points at the caller's line."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch

import orchard_ops
from orchard_ops import reference
from orchard_ops.scoring import Scoring

WAYS = {
    "function": lambda q: orchard_ops.flash_attn(q, q, q),
    "functional op": lambda q: torch.ops.orchard.flash_attn_fwd(q, q, q, *Scoring()),
    "overload": lambda q: torch.ops.orchard.flash_attn_fwd.default(q, q, q, *Scoring()),
}
TOO_WIDE = (1, 1, 5, 264)  # for the kernels


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("inference", (False, True))
@pytest.mark.parametrize("error", (KeyboardInterrupt, ValueError, TypeError, MemoryError))
def test_the_type_is_kept(
    way: str,
    inference: bool,
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
    quiet_fallback: None,
):
    def fail(*_: object) -> None:
        raise error("told by the reference")

    monkeypatch.setattr(reference, "forward", fail)
    with torch.inference_mode(inference):
        q = torch.randn(TOO_WIDE, device="mps")
        with pytest.raises(error, match="told by the reference"):
            WAYS[way](q)


@pytest.mark.parametrize("way", WAYS)
def test_the_warning_points_at_the_callers_line(way: str, fresh_stats: None):
    q = torch.randn(TOO_WIDE, device="mps")
    with pytest.warns(orchard_ops.OrchardFallbackWarning) as caught:
        WAYS[way](q)
    assert [Path(w.filename).name for w in caught] == ["test_exceptions.py"]


def test_reasons_do_not_grow_with_values(fresh_stats: None):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in range(20):
            q = torch.randn(1, 1, 5, 257 + n, device="mps")
            orchard_ops.flash_attn(q, q, q)
    assert len(caught) == len(orchard_ops.stats().reference) == 1


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )


def test_a_second_import_takes_up_the_first():
    done = run_python("""
        import importlib, sys, orchard_ops as first
        importlib.reload(first)
        for name in [n for n in sys.modules if n.startswith("orchard_ops")]:
            del sys.modules[name]
        import orchard_ops as second
        print(second.flash_attn is first.flash_attn, second.stats is first.stats)
    """)
    assert done.stdout == "True True\n", done.stderr


def test_a_second_copy_is_refused_by_name(tmp_path: Path):
    package = Path(orchard_ops.__file__).parent
    done = run_python(f"""
        import shutil, sys, orchard_ops
        shutil.copytree({str(package)!r}, {str(tmp_path / "orchard_ops")!r})
        for name in [n for n in sys.modules if n.startswith("orchard_ops")]:
            del sys.modules[name]
        sys.path.insert(0, {str(tmp_path)!r})
        try:
            import orchard_ops
        except ImportError as error:
            print(error)
    """)
    assert str(tmp_path / "orchard_ops") in done.stdout, done.stderr
    assert str(package) in done.stdout
