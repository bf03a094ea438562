"""A GPT whose attention is our op, compiled by inductor, whose generated Metal runs beside ours."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_cache

import orchard_ops
from orchard_ops.commands.demo.attention import orchard_attention
from orchard_ops.commands.demo.model import GPT, ModelConfig

CONFIG = ModelConfig(num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, context_length=24)


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    """Inductor's cache on the disk would serve calls of an op as an older schema had them."""
    with fresh_cache():
        yield


def losses(compiled: bool, dropout_p: float, steps: int = 5) -> list[float]:
    """Trains on random bytes on mps."""
    torch.manual_seed(0)
    config = ModelConfig(**(CONFIG.__dict__ | {"dropout_p": dropout_p}))
    model = GPT(config, orchard_attention).to("mps")
    tokens = torch.randint(256, (2, 25)).to("mps")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    function = torch.compile(model.loss, fullgraph=True) if compiled else model.loss
    torch.manual_seed(1)  # the dropout seeds
    history = []
    for _ in range(steps):
        loss = function(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


@pytest.mark.parametrize("dropout_p", (0.0, 0.2))
def test_inductor_trains_to_the_eager_losses(dropout_p: float, fresh_stats: None):
    import simulator

    eager = losses(False, dropout_p)
    orchard_ops.reset_stats()
    torch._dynamo.reset()
    # Inductor has a random stream of its own; fallback_random makes it draw the eager seeds.
    with torch._inductor.config.patch(fallback_random=True), simulator.recording() as launches:
        compiled = losses(True, dropout_p)
    torch.testing.assert_close(torch.tensor(compiled), torch.tensor(eager), rtol=1e-4, atol=1e-5)
    assert compiled[-1] < compiled[0]
    calls = 5 * CONFIG.num_layers
    assert orchard_ops.stats().metal == {"flash_attn_fwd": calls, "flash_attn_bwd": calls}
    assert orchard_ops.stats().reference == {}
    kernels = {launch.kernel for launch in launches}
    assert sum(name.startswith("attention_") for name in kernels) == 4
    assert any(name.startswith("generated_kernel") for name in kernels)


def test_one_graph_for_forward_and_evaluation():
    """No graph break and no recompilation over steps of the same shape."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(
        lambda x: orchard_attention(x, x, x, 0.1).sum(), fullgraph=True, backend=counter
    )
    x = torch.randn(1, 2, 20, 16, device="mps", requires_grad=True)
    for _ in range(3):
        function(x).backward()
    assert counter.frame_count == 1
