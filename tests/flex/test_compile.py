"""`orchard_ops.flex_attention` under torch.compile: one graph, ordinary ops, any length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from flex_calls import CASES, assert_same, expected, operands, run
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor.utils import fresh_cache
from torch.fx import GraphModule
from torch.nn.attention import flex_attention as pytorch
from torch.nn.attention.flex_attention import create_block_mask

import orchard_ops

pytestmark = pytest.mark.usefixtures("fresh_stats")


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    with fresh_cache():
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("device", ("cpu", "mps"))
@pytest.mark.parametrize("name", CASES)
def test_one_graph_gives_the_results_of_pytorch(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
):
    case = CASES[name]
    captured, given = case.captured(), operands(case)
    right = expected(monkeypatch, case, given, captured)
    torch._dynamo.reset()
    function = torch.compile(orchard_ops.flex_attention, fullgraph=True, backend="aot_eager")
    actual = run(function, case, given, captured, device, torch.float32)
    assert_same(actual, right, torch.float32)
    if device != "cpu":
        assert sum(orchard_ops.stats().metal.values()) == 2
        assert orchard_ops.stats().reference == {}


def test_inductor_runs_what_surrounds_it(monkeypatch: pytest.MonkeyPatch):
    case = CASES["slopes"]
    captured, given = case.captured(), operands(case)
    right = expected(monkeypatch, case, given, captured)

    def surrounded(query: Tensor, *rest: Any, **options: Any) -> Any:
        out, aux = orchard_ops.flex_attention(query * 2.0 * 0.5, *rest, **options)
        return (out + 1.0) - 1.0, aux

    torch._dynamo.reset()
    function = torch.compile(surrounded, fullgraph=True)
    actual = run(function, case, given, captured, "mps", torch.float32)
    assert_same(actual, right, torch.float32)


def test_only_ordinary_ops_are_left_for_the_compiler():
    graphs: list[GraphModule] = []

    def record(graph: GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    def backend(graph: GraphModule, inputs: list[Any]) -> Any:
        return aot_module_simplified(graph, inputs, fw_compiler=record, bw_compiler=record)

    q = torch.randn(1, 2, 20, 8).to("mps").requires_grad_()
    function = torch.compile(
        lambda q: orchard_ops.flex_attention(q, q, q, lambda score, *_: 2.0 * score),
        fullgraph=True,
        backend=backend,
    )
    function(q).sum().backward()
    forward, backward = ([str(n.target) for n in g.graph.nodes] for g in graphs)
    assert sum("flex_attn_fwd" in name for name in forward) == 1
    assert sum("flex_attn_bwd" in name for name in backward) == 1
    assert not any("flex_attention" in name for name in (*forward, *backward))


def test_one_compilation_serves_every_length():
    counter = CompileCounterWithBackend("aot_eager")

    def call(q: Tensor, document: Tensor, mask: Any) -> Tensor:
        return orchard_ops.flex_attention(
            q, q, q, lambda score, b, h, i, j: score + 0.1 * document[j], mask
        )

    function = torch.compile(call, fullgraph=True, backend=counter)
    for length in (12, 20, 36, 44):
        q = torch.randn(1, 2, length, 8).to("mps").requires_grad_()
        document = (torch.arange(length) // 7).to("mps")
        mask = create_block_mask(
            lambda b, h, i, j, document=document: document[i] >= document[j],
            None, None, length, length, device="mps", BLOCK_SIZE=8,
        )  # fmt: skip
        outs = [f(q, document, mask) for f in (function, call)]
        torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
        grads = [torch.autograd.grad(out.sin().sum(), q) for out in outs]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 2


def test_a_number_that_the_compiler_has_not_fixed():
    """It reaches the mod as a tensor."""
    counter = CompileCounterWithBackend("aot_eager")

    def call(q: Tensor, window: int) -> Tensor:
        return orchard_ops.flex_attention(
            q, q, q, lambda score, b, h, i, j: torch.where(i - j < window, score, -30.0)
        )

    q = torch.randn(1, 2, 20, 8).to("mps")
    function = torch.compile(call, fullgraph=True, backend=counter)
    for window in (3, 5, 9, 11):
        out = function(q, window)
        torch.testing.assert_close(out, call(q, window), rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 2


class _Annealed(torch.nn.Module):
    """A model with a number of Python that changes from step to step."""

    def __init__(self) -> None:
        super().__init__()
        self.cap = 1.5

    def forward(self, q: Tensor) -> Tensor:
        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            capped = self.cap * torch.tanh(score / self.cap) + (i - j) * 0.5
            return torch.where(i - j < 3, capped, -self.cap)

        return orchard_ops.flex_attention(q, q, q, score_mod)


@pytest.mark.parametrize(("device", "dtype"), (("mps", torch.float32), ("cpu", torch.float64)))
def test_a_float_of_a_model_that_changes_between_steps(device: str, dtype: torch.dtype):
    """torch.compile makes a tensor of such a number, and lets the mod read its value."""
    counter = CompileCounterWithBackend("aot_eager")
    model = _Annealed()
    function = torch.compile(model, fullgraph=True, backend=counter)
    q = torch.randn(1, 2, 20, 8).to(device, dtype).requires_grad_()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for model.cap in (1.5, 2.1, 3.3, 4.7, 5.1, 6.9):
        outs = function(q), model(q)
        torch.testing.assert_close(*outs, rtol=tolerance, atol=tolerance)
        grads = [torch.autograd.grad(out.sin().sum(), q)[0] for out in outs]
        torch.testing.assert_close(*grads, rtol=tolerance, atol=tolerance)
    assert counter.frame_count <= 3


def test_what_a_mod_cannot_do_with_a_number_that_changes_is_said():
    def call(q: Tensor, model: _Annealed) -> Tensor:
        return orchard_ops.flex_attention(
            q, q, q, lambda score, b, h, i, j: score * round(model.cap)
        )

    model, q = _Annealed(), torch.randn(1, 2, 20, 8).to("mps")
    function = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(function(q, model), call(q, model), rtol=1e-5, atol=1e-5)
    model.cap = 2.5
    with pytest.raises(Exception, match="compute with the number before the mod is made"):
        function(q, model)


def test_a_table_that_is_trained():
    q = torch.randn(1, 2, 20, 8).to("mps")
    table = torch.randn(2, 39).to("mps").requires_grad_()

    def call(q: Tensor) -> Tensor:
        return orchard_ops.flex_attention(
            q, q, q, lambda score, b, h, i, j: score + table[h, i - j + 19]
        )

    function = torch.compile(call, fullgraph=True, backend="aot_eager")
    compiled, eager = (torch.autograd.grad(f(q).sin().sum(), table) for f in (function, call))
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    assert orchard_ops.stats().metal["flash_attn_bwd"] == 2
    assert orchard_ops.stats().reference == {}


def test_a_captured_tensor_that_is_trained(quiet_fallback: None):
    q = torch.randn(1, 2, 20, 8).to("mps")
    gain = torch.tensor([0.5, 2.0]).to("mps").requires_grad_()

    def call(q: Tensor) -> Tensor:
        return orchard_ops.flex_attention(q, q, q, lambda score, b, h, i, j: score * gain[h])

    function = torch.compile(call, fullgraph=True, backend="aot_eager")
    compiled, eager = (torch.autograd.grad(f(q).sin().sum(), gain) for f in (function, call))
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


def test_under_inference_mode():
    q = torch.randn(1, 2, 20, 8).to("mps")

    def call(q: Tensor) -> Tensor:
        return orchard_ops.flex_attention(q, q, q, lambda score, *_: 2.0 * score)

    function = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        torch.testing.assert_close(function(q), call(q), rtol=1e-5, atol=1e-5)
    assert orchard_ops.stats().metal["flex_attn_fwd"] == 2


def test_the_graph_that_dynamo_makes_has_one_operator_for_a_call():
    backend = EagerAndRecordGraphs()
    q = torch.randn(1, 2, 20, 8).to("mps")
    torch.compile(
        lambda q: orchard_ops.flex_attention(q, q, q, lambda score, *_: 2.0 * score),
        fullgraph=True,
        backend=backend,
    )(q)
    (graph,) = backend.graphs
    names = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
    assert names[0] == "orchard_flex_attention" and "getitem" in names[1]
    assert orchard_ops.stats().metal["flex_attn_fwd"] == 1


def test_a_table_written_in_a_mod_is_named():
    q = torch.randn(1, 2, 20, 8).to("mps")

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(q: torch.Tensor) -> torch.Tensor:
        table = [0.5, 2.0]
        return orchard_ops.flex_attention(
            q, q, q, lambda s, b, h, *_: torch.tanh(s) * torch.tensor(table, device="mps")[h]
        )

    with pytest.raises(Exception, match=r"writes a table down.*outside of the function"):
        compiled(q)


def test_a_refusal_of_compiled_code_names_the_remedy(monkeypatch: pytest.MonkeyPatch):
    """Eager code asks before it calls the kernels; a graph has them."""
    q = torch.randn(1, 2, 20, 8).to("mps")
    function = torch.compile(
        lambda q: orchard_ops.flex_attention(q, q, q, lambda score, *_: 2.0 * score),
        fullgraph=True,
        backend="aot_eager",
    )
    function(q)
    monkeypatch.setenv("ORCHARD_DISABLE_METAL", "1")
    with pytest.raises(
        RuntimeError,
        match=r"(?s)flex_attn_fwd: .*ORCHARD_DISABLE_METAL is set.*: outside of torch\.compile",
    ):
        function(q)


class _Model(torch.nn.Module):
    """Two layers that call PyTorch's function."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 48) for _ in range(2))
        self.slopes = torch.nn.Buffer(torch.tensor([0.5, 0.25]))

    def score_mod(self, score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + self.slopes[h] * (j - i)

    def forward(self, x: Tensor, mask: Any) -> Tensor:
        for layer in self.layers:
            q, k, v = layer(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            out = pytorch.flex_attention(q, k, v, self.score_mod, mask)
            x = x + out.transpose(1, 2).flatten(-2)
        return x


def test_a_whole_model_is_compiled_within_a_block():
    torch.manual_seed(0)
    model = _Model().to("mps")
    x = torch.randn(2, 20, 16).to("mps")
    mask = create_block_mask(
        lambda b, h, i, j: (i - j).abs() % 3 < 2, None, None, 20, 20, device="mps", BLOCK_SIZE=8
    )

    def trained(function: Any) -> list[Tensor]:
        model.zero_grad()
        with orchard_ops.flex():
            out = function(x, mask)
            out.sin().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in model.parameters())]

    eager = trained(model)
    assert orchard_ops.stats().metal["flex_attn_bwd"] == 2
    compiled = trained(torch.compile(model, fullgraph=True, backend="aot_eager"))
    for a, b in zip(compiled, eager):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert orchard_ops.stats().metal["flex_attn_bwd"] == 4
    assert orchard_ops.stats().reference == {}


def test_export():
    """The exported program has the op, and its text."""
    model = _Model().to("mps").eval()
    x = torch.randn(2, 20, 16).to("mps")
    mask = create_block_mask(
        lambda b, h, i, j: (i - j).abs() % 3 < 2, None, None, 20, 20, device="mps", BLOCK_SIZE=8
    )

    class Bound(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x, mask)

    with torch.no_grad(), orchard_ops.flex():
        right = model(x, mask)
        program = torch.export.export(Bound(), (x,), strict=True)
        again = program.module()(x)
    torch.testing.assert_close(again, right, rtol=1e-5, atol=1e-5)
    names = [str(n.target) for n in program.graph.nodes]
    assert sum("flex_attn_fwd" in name for name in names) == 2
