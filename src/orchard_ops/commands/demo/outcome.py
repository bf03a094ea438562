"""What one demo run found, whether that is a pass, and the same as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...calls import Stats
from .. import machine
from ..place import Place
from .data import Corpus
from .model import ModelConfig
from .training import TOLERANCE, Comparison, TrainingConfig


@dataclass(frozen=True)
class Outcome:
    """One run, whole or stopped before its end."""

    place: Place
    model: ModelConfig
    training: TrainingConfig
    corpus: Corpus
    comparison: Comparison
    calls: Stats
    """Calls of the op in this run, held-out loss and sample included."""
    kernels: tuple[str, ...]
    """Metal kernels of one training call, forward then backward; empty on the reference."""
    prompt: str
    sample: str
    figure: Path
    seconds: float

    @property
    def tokens_per_step(self) -> int:
        return self.training.batch_size * self.model.context_length

    def failures(self) -> list[str]:
        """Why the run is not a pass, one sentence each; empty if it is."""
        comparison, failures = self.comparison, []
        step = comparison.first_disagreement()
        if step is not None:
            first = comparison.relative_differences[step - 1]
            worst, worst_step = comparison.largest_difference()
            failures.append(
                f"the losses differ by {first:.1e} at step {step}, more than {TOLERANCE:.0e} "
                f"(at most {worst:.1e}, at step {worst_step})"
            )
        done, steps = comparison.num_steps, self.training.steps
        if done < steps:  # the figures of an unfinished run say nothing
            return [*failures, f"stopped after step {done} of {steps}"]
        if not comparison.held_out_relative_difference <= TOLERANCE:
            failures.append(
                f"the held-out losses differ by {comparison.held_out_relative_difference:.1e}, "
                f"more than {TOLERANCE:.0e}"
            )
        if self.place.device.type == "mps":
            failures += self._calls_not_on_metal()
        return failures

    def _calls_not_on_metal(self) -> list[str]:
        failures = []
        if self.calls.fallbacks:
            reasons = "; ".join(self.calls.reference)
            failures.append(
                f"{self.calls.fallbacks} calls on mps fell back to the reference: {reasons}"
            )
        expected = self.model.num_layers * self.training.steps
        ran = self.calls.metal["flash_attn_bwd"]
        if ran != expected:
            failures.append(
                f"{ran} backward calls ran as Metal kernels; {expected} were expected "
                f"({self.model.num_layers} layers, {self.training.steps} steps)"
            )
        return failures

    def as_json(self) -> dict[str, Any]:
        """Every figure of the run. A loss that is not finite becomes null."""
        comparison, failures = self.comparison, self.failures()
        device_run, cpu_run = comparison.device_run, comparison.cpu_run
        worst, worst_step = comparison.largest_difference()
        tokens = self.tokens_per_step
        return {
            "passed": not failures,
            "failures": failures,
            "config": {
                "model": asdict(self.model),
                "training": asdict(self.training),
                "tolerance": TOLERANCE,
                "text_files": self.corpus.num_files,
                "text_sha256": self.corpus.sha256,
            },
            "environment": machine.describe(self.place),
            "losses": {
                "device": [_finite(loss) for loss in device_run.losses],
                "cpu": [_finite(loss) for loss in cpu_run.losses],
            },
            "relative_differences": [_finite(d) for d in comparison.relative_differences],
            "max_relative_difference": {"value": _finite(worst), "step": worst_step},
            "held_out_loss": {
                "device": _finite(comparison.device_held_out),
                "cpu": _finite(comparison.cpu_held_out),
                "relative_difference": _finite(comparison.held_out_relative_difference),
            },
            "tokens_per_second": {
                "device": device_run.tokens_per_second(tokens),
                "cpu": cpu_run.tokens_per_second(tokens),
            },
            "kernels": {"calls": self.calls.metal, "names": list(self.kernels)},
            "reference_calls": self.calls.reference,
            "fallbacks": self.calls.fallbacks,
            "figure": str(self.figure),
            "prompt": self.prompt,
            "sample": self.sample,
            "seconds": self.seconds,
        }


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
