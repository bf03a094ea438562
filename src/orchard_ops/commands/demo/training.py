"""Two runs in lockstep: same model, weights, batches and dropout masks; two attentions."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .data import Corpus, batches
from .model import GPT, Attention, ModelConfig

TOLERANCE = 1e-3
"""Largest relative difference of the two losses at any step."""


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. The learning rate warms up linearly and falls along a cosine to a tenth."""

    steps: int = 300
    batch_size: int = 12
    learning_rate: float = 4e-3
    warmup_steps: int = 20
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    held_out_batches: int = 4
    seed: int = 0

    def learning_rate_at(self, step: int) -> float:
        """step counts from 0."""
        warmup = min(self.warmup_steps, self.steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


@dataclass
class Run:
    """One of the two models, its optimizer, and what it has done."""

    model: GPT
    optimizer: torch.optim.Optimizer
    device: torch.device
    losses: list[float] = field(default_factory=list)
    """Training loss of each step, in nats per byte."""
    step_seconds: list[float] = field(default_factory=list)

    def step(self, tokens: Tensor, targets: Tensor, learning_rate: float, max_norm: float) -> None:
        """One update on tokens, targets (B, L) int64."""
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad()
        loss = self.model.loss(tokens.to(self.device), targets.to(self.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm, foreach=False)
        self.optimizer.step()
        self.losses.append(loss.item())
        _synchronize(self.device)
        self.step_seconds.append(time.perf_counter() - start)

    @torch.no_grad()
    def held_out_loss(self, excerpts: list[tuple[Tensor, Tensor]]) -> float:
        """Mean loss without dropout over (tokens, targets) pairs, each (B, L) int64."""
        self.model.eval()
        losses = [
            self.model.loss(tokens.to(self.device), targets.to(self.device)).item()
            for tokens, targets in excerpts
        ]
        self.model.train()
        return statistics.fmean(losses)

    def tokens_per_second(self, tokens_per_step: int) -> float:
        """The rate at the median step, since the first one compiles kernels."""
        return tokens_per_step / statistics.median(self.step_seconds)


@dataclass(frozen=True)
class Comparison:
    """Both runs after training."""

    device_run: Run
    """The model on the device under test, through the op."""
    cpu_run: Run
    """Its twin on the cpu."""
    device_held_out: float
    cpu_held_out: float

    @property
    def relative_differences(self) -> list[float]:
        """|a - b| / |b| of the two losses, for each step."""
        pairs = zip(self.device_run.losses, self.cpu_run.losses, strict=True)
        return [_relative_difference(a, b) for a, b in pairs]

    @property
    def held_out_relative_difference(self) -> float:
        return _relative_difference(self.device_held_out, self.cpu_held_out)

    @property
    def num_steps(self) -> int:
        """Steps that both runs have done."""
        return min(len(self.device_run.losses), len(self.cpu_run.losses))

    @contextmanager
    def in_whole_steps(self) -> Iterator[None]:
        """Takes back a step that only one of the runs has done when the block ends."""
        try:
            yield
        finally:
            for run in (self.device_run, self.cpu_run):
                del run.losses[self.num_steps :], run.step_seconds[self.num_steps :]

    def largest_difference(self) -> tuple[float, int]:
        """The largest relative difference and its step (from 1). nan counts as the largest."""
        differences = self.relative_differences
        worst = max(
            range(len(differences)),
            key=lambda i: math.inf if math.isnan(differences[i]) else differences[i],
        )
        return differences[worst], worst + 1

    def first_disagreement(self, tolerance: float = TOLERANCE) -> int | None:
        """The first step (from 1) at which the losses differ by more than the tolerance."""
        for step, difference in enumerate(self.relative_differences, start=1):
            if not difference <= tolerance:  # also true of nan
                return step
        return None


def _relative_difference(a: float, b: float) -> float:
    return abs(a - b) / abs(b) if b else abs(a - b)


def _synchronize(device: torch.device) -> None:
    """Waits for the device, so that a step on mps is timed to the end of its optimizer."""
    if device.type == "mps":
        torch.mps.synchronize()


def _new_run(
    config: ModelConfig,
    training: TrainingConfig,
    attention: Attention,
    device: torch.device,
) -> Run:
    """A run at its start: the seed alone decides the weights, which are drawn on the cpu."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        model = GPT(config, attention).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=training.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=training.weight_decay,
        foreach=False,  # one implementation on every device
    )
    return Run(model, optimizer, device)


def _take(source: Iterator[tuple[Tensor, Tensor]], count: int) -> list[tuple[Tensor, Tensor]]:
    return [next(source) for _ in range(count)]


def train_twins(
    config: ModelConfig,
    training: TrainingConfig,
    corpus: Corpus,
    device: torch.device,
    attention: Attention,
    twin_attention: Attention,
    on_step: Callable[[Comparison], None] | None = None,
) -> Comparison:
    """Trains a model on the device through `attention` and its twin on the cpu, step by step.

    Args:
        config, training: the model and how to train it.
        corpus: the text.
        device: of the first model; the twin is always on the cpu.
        attention: the first model's attention function.
        twin_attention: the twin's. Both must take the same draws from torch's cpu generator.
        on_step: called after every step with the comparison so far, whose runs grow and whose
            held-out losses are nan until the end. An exception leaves it with whole steps.

    Raises:
        RuntimeError: the attention functions drew different random numbers, so that their dropout
            masks cannot have been the same.
    """
    device_run = _new_run(config, training, attention, device)
    cpu_run = _new_run(config, training, twin_attention, torch.device("cpu"))
    train = batches(corpus.train, training.batch_size, config.context_length, training.seed)
    held_out = _take(
        batches(corpus.held_out, training.batch_size, config.context_length, training.seed),
        training.held_out_batches,
    )
    so_far = Comparison(device_run, cpu_run, math.nan, math.nan)
    with torch.random.fork_rng(devices=[]), so_far.in_whole_steps():
        torch.manual_seed(training.seed)
        for step in range(training.steps):
            tokens, targets = next(train)
            rate, max_norm = training.learning_rate_at(step), training.max_grad_norm
            before = torch.get_rng_state()
            device_run.step(tokens, targets, rate, max_norm)
            after = torch.get_rng_state()
            # From the state that the first model started from: same seeds, same masks.
            torch.set_rng_state(before)
            cpu_run.step(tokens, targets, rate, max_norm)
            if not torch.equal(torch.get_rng_state(), after):
                raise RuntimeError(
                    f"step {step + 1}: the two attention functions drew different random numbers "
                    "from torch's cpu generator, so their dropout masks differ"
                )
            if on_step is not None:
                on_step(so_far)
        return Comparison(
            device_run,
            cpu_run,
            device_run.held_out_loss(held_out),
            cpu_run.held_out_loss(held_out),
        )
