"""``python -m orchard_ops demo``: a small GPT trained through the op and, beside it, through SDPA.

The two models share weights, batches and dropout masks, so their losses must agree at every step.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ...calls import reset_stats, stats
from ...explain import explain
from .. import endings
from ..console import Console
from ..endings import CannotRun, writable, write
from ..place import find_place
from .attention import orchard_attention, sdpa_math_attention
from .data import load_corpus
from .model import GPT, Attention, ModelConfig, generate
from .outcome import Outcome
from .training import Comparison, TrainingConfig, train_twins

_PROMPT = "\tdef __init__(self"


def run(
    args: argparse.Namespace,
    model: ModelConfig | None = None,
    training: TrainingConfig | None = None,
    attention: Attention = orchard_attention,
) -> int:
    """Trains, compares, reports.

    Args:
        args: steps, device, output, json, sample_bytes, seed, as ``__main__`` parses them.
        model, training: other sizes than the demo's; args.steps and args.seed hold in any case.
        attention: of the model under test.

    Returns:
        The exit status: `endings.RIGHT`; `endings.WRONG` if losses differ or calls fell back.

    Raises:
        CannotRun: no such device, no text, or nothing can be written.
    """
    from . import report  # it needs matplotlib

    start = time.perf_counter()
    console = Console()
    try:
        place = find_place(args.device)
        corpus = load_corpus()
    except (ValueError, FileNotFoundError) as error:
        raise CannotRun(str(error)) from error
    figure = writable(Path(args.output) / "loss.png")
    file = None if args.json is None else writable(Path(args.json))
    model = model or ModelConfig()
    training = replace(training or TrainingConfig(), steps=args.steps, seed=args.seed)
    num_parameters = sum(p.numel() for p in GPT(model, attention).parameters())
    recorder = _KernelNames(attention)
    so_far: Comparison | None = None

    def keep(comparison: Comparison, sample: bytes = b"") -> Outcome:
        outcome = Outcome(
            place,
            model,
            training,
            corpus,
            comparison,
            stats(),
            recorder.kernels,
            _printable(_PROMPT.encode()),
            _printable(sample),
            figure,
            time.perf_counter() - start,
        )
        report.save_figure(comparison, place, figure)
        if file is not None:
            write(file, json.dumps(outcome.as_json(), indent=2, allow_nan=False) + "\n")
        return outcome

    report.print_header(console, place, model, training, corpus, num_parameters)
    reset_stats()
    try:
        with report.progress(console, str(place.device), training.steps) as show:

            def on_step(comparison: Comparison) -> None:
                nonlocal so_far
                so_far = comparison
                show(comparison)

            comparison = train_twins(
                model, training, corpus, place.device, recorder, sdpa_math_attention, on_step
            )
        sample = b""
        if math.isfinite(comparison.device_held_out):
            sample = generate(
                comparison.device_run.model, _PROMPT.encode(), args.sample_bytes, seed=args.seed
            )
    except BaseException as error:
        if so_far is not None:
            keep(so_far)
            done = f"{so_far.num_steps} of {training.steps} steps"
            error.add_note(f"{done} are in {figure if file is None else f'{figure} and {file}'}")
        raise
    outcome = keep(comparison, sample)
    report.print_outcome(console, outcome)
    return endings.WRONG if outcome.failures() else endings.RIGHT


class _KernelNames:
    """An attention function that asks `explain` about its first call."""

    def __init__(self, attention: Attention):
        self.attention = attention
        self.kernels: tuple[str, ...] = ()
        self._asked = False

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
        if not self._asked:
            self._asked = True
            self.kernels = explain(
                query, key, value, None, dropout_p, is_causal=True, enable_gqa=True
            ).kernels
        return self.attention(query, key, value, dropout_p)


def _printable(text: bytes) -> str:
    """Bytes as text for a terminal: an untrained model may write control characters."""
    decoded = text.decode(errors="replace").expandtabs(4)
    return "".join(
        c if c == "\n" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in decoded
    )
