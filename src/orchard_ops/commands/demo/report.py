"""What the demo shows: header, progress, table, verdict, and the figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from matplotlib.figure import Figure
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..console import Console
from ..place import Place
from ..progress import progress_bar
from .data import Corpus
from .model import ModelConfig
from .outcome import Outcome
from .training import TOLERANCE, Comparison, TrainingConfig

_LINES_WITHOUT_TERMINAL = 10
"""Progress lines where the output is a file or a log, in which a bar cannot move."""

OnStep = Callable[[Comparison], None]


def print_header(
    console: Console,
    place: Place,
    model: ModelConfig,
    training: TrainingConfig,
    corpus: Corpus,
    num_parameters: int,
) -> None:
    """What runs where, before anything runs."""
    tokens = training.batch_size * model.context_length
    console.print(Text(f"{place.device}: {place.description}", style="bold"))
    console.print(
        f"{place.device} trains through torch.ops.orchard.flash_attn, its twin on the cpu through "
        "SDPA's math path: same weights, batches and dropout masks",
        highlight=False,
    )
    console.print(
        f"GPT of {num_parameters:,} parameters: {model.num_layers} layers, {model.num_heads} query "
        f"and {model.num_kv_heads} key/value heads of {model.head_dim}, attention dropout "
        f"{model.dropout_p}; {training.steps} steps of {tokens:,} bytes out of the "
        f"{len(corpus.train):,} of {corpus.num_files} standard library modules",
        highlight=False,
    )


@contextmanager
def progress(console: Console, device_name: str, steps: int) -> Iterator[OnStep]:
    """A progress bar with both losses; yields the function to call after every step."""

    def losses(comparison: Comparison) -> str:
        device_loss, cpu_loss = comparison.device_run.losses[-1], comparison.cpu_run.losses[-1]
        return f"loss {device_name} {device_loss:.4f}, twin {cpu_loss:.4f}"

    def print_line(comparison: Comparison) -> None:
        done = comparison.num_steps
        if done % max(1, steps // _LINES_WITHOUT_TERMINAL) == 0 or done == steps:
            console.print(f"step {done}/{steps}: {losses(comparison)}", highlight=False)

    if not console.is_terminal:
        yield print_line
        return
    with progress_bar(console) as bar:
        task = bar.add_task("loss ...", total=steps)

        def advance(comparison: Comparison) -> None:
            bar.update(task, completed=comparison.num_steps, description=losses(comparison))

        yield advance


def print_outcome(console: Console, outcome: Outcome) -> None:
    """Sample, table and verdict."""
    console.print(
        Panel(
            Text.assemble((outcome.prompt, "bold"), outcome.sample),
            title=f"sampled on {outcome.place.device}, prompt in bold",
            title_align="left",
        )
    )
    console.print(_table(outcome))
    failures = outcome.failures()
    for failure in failures:
        console.print(Text(f"FAILED: {failure}", style="bold red"))
    if not failures:
        console.print(
            Text(
                f"PASSED: the losses agree to {TOLERANCE:.0e} at each of the "
                f"{outcome.training.steps} steps",
                style="bold green",
            )
        )


def _table(outcome: Outcome) -> Table:
    comparison, calls = outcome.comparison, outcome.calls
    device_run, cpu_run = comparison.device_run, comparison.cpu_run
    worst, step = comparison.largest_difference()
    tokens = outcome.tokens_per_step
    device_speed = f"{device_run.tokens_per_second(tokens):,.0f}"
    if outcome.place.kind == "simulated":
        device_speed += " (simulated)"
    table = Table()
    table.add_column(no_wrap=True)
    table.add_column(f"{outcome.place.device} (op)", overflow="fold")  # kernel names are long
    table.add_column("cpu (SDPA math)")
    table.add_row("first train loss", f"{device_run.losses[0]:.6f}", f"{cpu_run.losses[0]:.6f}")
    table.add_row("last train loss", f"{device_run.losses[-1]:.6f}", f"{cpu_run.losses[-1]:.6f}")
    table.add_row(
        "held-out loss", f"{comparison.device_held_out:.6f}", f"{comparison.cpu_held_out:.6f}"
    )
    table.add_row("tokens/s", device_speed, f"{cpu_run.tokens_per_second(tokens):,.0f}")
    table.add_section()
    table.add_row("steps", str(outcome.training.steps), "")
    table.add_row("max relative difference", f"{worst:.1e} at step {step}", "")
    for op, count in calls.metal.items():
        table.add_row(f"Metal: {op}", f"{count} calls", "")
    for kernel in outcome.kernels:
        table.add_row("kernel of training", kernel, "")
    for reason, ops in calls.reference.items():
        for op, count in ops.items():
            table.add_row(f"reference: {op}", f"{count} calls", "")
        table.add_row("because", reason, "")
    table.add_row("fallbacks on mps", str(calls.fallbacks), "")
    table.add_row("time", f"{outcome.seconds:.0f} s", "")
    table.add_row("figure", str(outcome.figure), "")
    return table


def save_figure(comparison: Comparison, place: Place, path: Path) -> None:
    """A PNG of both loss curves over the relative difference between them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = range(1, len(comparison.device_run.losses) + 1)
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, difference = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    device_label = f"{place.device}: torch.ops.orchard.flash_attn"
    losses.plot(steps, comparison.device_run.losses, label=device_label, linewidth=2.5, alpha=0.5)
    losses.plot(
        steps, comparison.cpu_run.losses, "k--", label="cpu: SDPA, math path", linewidth=0.8
    )
    losses.set_ylabel("training loss (nats per byte)")
    kinds = {"apple_gpu": place.description, "simulated": "simulated mps", "cpu": "reference, cpu"}
    losses.set_title(f"same weights, batches and dropout masks ({kinds[place.kind]})")
    losses.legend()
    # A difference of exactly 0 has no place on a logarithmic axis.
    visible = [d if d > 0 else math.nan for d in comparison.relative_differences]
    top = max([TOLERANCE, *(d for d in visible if math.isfinite(d))])
    difference.set_yscale("log")
    difference.set_ylim(1e-9, 10 * top)
    difference.plot(steps, visible, ".", markersize=3)
    difference.axhline(TOLERANCE, color="red", linewidth=0.8, label="tolerance")
    difference.set_ylabel("|difference| / loss")
    difference.set_xlabel("step")
    difference.legend()
    figure.savefig(path, dpi=120)
