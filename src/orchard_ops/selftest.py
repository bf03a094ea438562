"""``python -m orchard_ops selftest``: is this machine's attention right?

Runs every kernel variant forward and backward, and compares with float64 on the CPU by the rule of
`orchard_ops.testing`. Writes a report file to attach to an issue.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from . import native
from ._variables import environment_variables
from .calls import reset_stats, stats
from .place import environment, find_place
from .testing import assert_attention_close, math_attention

HEAD_DIMS = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""One head dim per kernel width of ``native/plan/tiles.cpp``."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_STORING_HEAD_DIM = 64  # from here on a backward stores dS
_SEED = 20_240_229
_DIAGONAL = -7  # the first rows see no key


@dataclass(frozen=True)
class Problem:
    """Sizes, and the MiB that the backward may store dS in."""

    name: str
    scratch_mb: int
    batch: int
    num_heads: int
    num_kv_heads: int
    q_len: int
    kv_len: int


# Whole, ragged and skipped tiles, and two query heads for a key/value head.
_RAGGED = Problem("", 64, 2, 2, 1, 77, 101)
_LOW_MEMORY = replace(_RAGGED, name="low memory", scratch_mb=0)
# dS of one head fits, but not of two; of one, 3200 keys fit.
_IN_TURNS = (
    Problem("heads in turn", 1, 1, 2, 2, 384, 512),
    Problem("keys in turn", 1, 1, 1, 1, 77, 3400),
)


@dataclass(frozen=True)
class Variant:
    """What is compiled or launched in its own way."""

    dtype: torch.dtype
    head_dim: int
    chunks: bool
    dropout_p: float
    problem: Problem = _RAGGED

    def __str__(self) -> str:
        loads = "chunks" if self.chunks else "elements"
        name = str(self.dtype).removeprefix("torch.")
        dropout = " dropout" if self.dropout_p else ""
        return f"{name} D{self.head_dim} {loads}{dropout} {self.problem.name}".rstrip()


@dataclass
class Outcome:
    """One variant's verdict."""

    variant: str
    passed: bool
    message: str
    seconds: float


@dataclass
class Report:
    """The report file."""

    environment: dict
    native_library: str
    metal_calls: dict[str, int]
    fallbacks: dict[str, dict[str, int]]
    seconds: float
    verdict: str
    outcomes: list[Outcome] = field(default_factory=list)


def variants(quick: bool) -> Iterator[Variant]:
    """All of them, or a few per dtype."""
    for dtype in DTYPES:
        if dtype == torch.float32 or not quick:
            yield from (Variant(dtype, 64, True, 0.1, problem) for problem in _IN_TURNS)
        for head_dim in (64,) if quick else HEAD_DIMS:
            for chunks in (True,) if quick else (True, False):
                for dropout_p in (0.1,) if quick else (0.0, 0.1):
                    yield Variant(dtype, head_dim, chunks, dropout_p)
                    if head_dim >= _STORING_HEAD_DIM:
                        yield Variant(dtype, head_dim, chunks, dropout_p, _LOW_MEMORY)


def _operands(variant: Variant) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, dout on the CPU."""
    generator = torch.Generator().manual_seed(0)
    problem = variant.problem
    rows, keys = (problem.num_heads, problem.q_len), (problem.num_kv_heads, problem.kv_len)
    shapes = [(problem.batch, *of, variant.head_dim) for of in (rows, keys, keys, rows)]
    q, k, v, do = (torch.randn(s, generator=generator).to(variant.dtype) for s in shapes)
    return q, k, v, do


def _place(x: Tensor, chunks: bool, device: torch.device) -> Tensor:
    """On the device; without `chunks` one element off, so that no row is 16-byte aligned."""
    if chunks:
        return x.to(device)
    flat = torch.empty(x.numel() + 1, dtype=x.dtype, device=device)
    flat[1:] = x.to(device).reshape(-1)
    return flat[1:].view(x.shape)


def check(variant: Variant, device: torch.device, impl: str) -> Outcome:
    """Runs one variant twice (results must be bitwise equal) and applies the tolerance rule."""
    started = time.perf_counter()
    operands = _operands(variant)
    ref, eager = (
        math_attention(
            *operands,
            dtype=dtype,
            dropout_p=variant.dropout_p,
            dropout_seed=_SEED,
            window_right=0,
            diagonal=_DIAGONAL,
        )
        for dtype in (torch.float64, variant.dtype)
    )
    q, k, v, do = (_place(x, variant.chunks, device) for x in operands)
    scoring = (
        None, None, None, torch.tensor(_SEED), variant.dropout_p, variant.head_dim**-0.5,
        -1, 0, _DIAGONAL, 0.0,
    )  # fmt: skip

    def run() -> list[Tensor]:
        ops = torch.ops.orchard
        out, lse = ops.flash_attn_fwd(q, k, v, *scoring, impl)
        grads = ops.flash_attn_bwd(do, None, q, k, v, out, lse, *scoring, False, impl)
        return [x.cpu() for x in (out, lse, *grads[:3])]

    try:
        scratch_mb = str(variant.problem.scratch_mb)
        with environment_variables(ORCHARD_BACKWARD_SCRATCH_MB=scratch_mb):
            first, second = run(), run()
        assert_attention_close(first, ref, eager)
        if not all(torch.equal(a, b) for a, b in zip(first, second)):
            raise AssertionError("two runs differ")
    except (AssertionError, RuntimeError) as error:
        return Outcome(str(variant), False, str(error), time.perf_counter() - started)
    return Outcome(str(variant), True, "", time.perf_counter() - started)


def run(args: argparse.Namespace) -> int:
    """The command. Exit status 0: every variant is right; 1: one is not; 2: no such device."""
    console = Console()
    try:
        place = find_place(args.device)
    except ValueError as error:
        console.print(str(error))
        return 2
    console.print(f"{place.device}: {place.description}", highlight=False)
    impl = "auto" if place.kind == "cpu" else "metal"
    reset_stats()
    started = time.perf_counter()
    outcomes = []
    with Progress(console=console) as progress:
        for variant in progress.track(list(variants(args.quick)), description="kernel variants"):
            outcomes.append(check(variant, place.device, impl))
            if not outcomes[-1].passed:
                console.print(f"[red]FAILED[/red] {variant}: {outcomes[-1].message}")
    failed = [o for o in outcomes if not o.passed]
    counted = stats()
    verdict = (
        f"{len(failed)} of {len(outcomes)} variants are wrong"
        if failed
        else f"all {len(outcomes)} variants agree with float64, forward and backward"
    )
    report = Report(
        environment=environment(place) | {"date": datetime.now(UTC).isoformat(timespec="seconds")},
        native_library=native.why_not() or "loaded",
        metal_calls=counted.metal,
        fallbacks=counted.reference,
        seconds=round(time.perf_counter() - started, 1),
        verdict=verdict,
        outcomes=outcomes,
    )
    Path(args.report).write_text(json.dumps(asdict(report), indent=1) + "\n")
    table = Table(show_header=False)
    for name, value in (
        ("verdict", f"[red]{verdict}[/red]" if failed else f"[green]{verdict}[/green]"),
        ("device", place.description),
        ("native library", report.native_library),
        ("Metal calls", ", ".join(f"{n} {op}" for op, n in counted.metal.items())),
        ("time", f"{report.seconds} s"),
        ("report", f"{args.report} (attach it to an issue)"),
    ):
        table.add_row(name, value)
    console.print(table)
    return 1 if failed else 0
