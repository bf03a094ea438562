"""Training a small GPT-2 on the simulated device gives the losses of the CPU."""

from __future__ import annotations

import sys

import pytest
import simulator
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

if sys.platform != "linux":
    pytest.skip("the simulated device is for Linux", allow_module_level=True)

simulator.enable()

STEPS = 20
VOCABULARY, CONTEXT, WIDTH, HEADS, LAYERS = 97, 32, 48, 4, 2


class Block(nn.Module):
    def __init__(self, dropout: float):
        super().__init__()
        self.norm_attention = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.projection = nn.Linear(WIDTH, WIDTH)
        self.norm_mlp = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        heads = self.qkv(self.norm_attention(x)).view(batch, length, 3, HEADS, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.projection(attended.transpose(1, 2).reshape(x.shape)))
        return x + self.dropout(self.mlp(self.norm_mlp(x)))


class GPT2(nn.Module):
    def __init__(self, dropout: float = 0.0, checkpointed: bool = False):
        super().__init__()
        self.checkpointed = checkpointed
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def train(
    device: str,
    *,
    steps: int = STEPS,
    autocast: torch.dtype | None = None,
    backend: str | None = None,
    fused: bool = False,
    **model_options,
) -> list[float]:
    torch.manual_seed(0)
    model = GPT2(**model_options).to(device)
    forward = torch.compile(model, backend=backend, fullgraph=True) if backend else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=fused)
    generator = torch.Generator().manual_seed(1)
    data = torch.randint(VOCABULARY, (8, CONTEXT + 1), generator=generator).to(device)
    losses = []
    for _ in range(steps):
        with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
            loss = forward(data[:, :-1], data[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def cpu_losses() -> list[float]:
    losses = train("cpu")
    assert losses[-1] < 0.7 * losses[0]
    return losses


def assert_same(losses: list[float], reference: list[float], tolerance: float = 1e-5) -> None:
    worst = max(abs(a - b) for a, b in zip(losses, reference))
    assert worst <= tolerance, (worst, losses, reference)


def test_losses_are_the_cpus(cpu_losses):
    assert_same(train("mps"), cpu_losses)


def test_strict_mode_trains(cpu_losses):
    """Training uses only operators that have an MPS kernel on a Mac."""
    simulator.strict()
    try:
        assert_same(train("mps"), cpu_losses)
    finally:
        simulator.strict(False)


def test_fused_adamw(cpu_losses):
    assert_same(train("mps", fused=True), cpu_losses)


def test_checkpointing(cpu_losses):
    assert_same(train("mps", checkpointed=True), cpu_losses)


def test_aot_eager(cpu_losses):
    torch._dynamo.reset()
    assert_same(train("mps", steps=5, backend="aot_eager"), cpu_losses[:5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(cpu_losses, dtype):
    losses = train("mps", autocast=dtype)
    assert_same(losses, cpu_losses, tolerance=0.05)
    assert losses != cpu_losses


def test_dropout_is_reproducible():
    first = train("mps", steps=5, dropout=0.2)
    assert train("mps", steps=5, dropout=0.2) == first
    assert first != train("mps", steps=5)
