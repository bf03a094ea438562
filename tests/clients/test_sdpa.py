"""F.scaled_dot_product_attention taken over: PyTorch's own results, by Metal kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from representative import product
from sdpa_calls import CALLS, FORWARDS_OF_ONE_CALL, WAYS, by_pytorch, on_metal
from torch import Tensor, nn

import orchard_ops

pytestmark = pytest.mark.usefixtures("fresh_stats")
SEED = 5
_SAMPLED = ("all at once", "bool mask of padding", "causal")
"""Calls that `make test` compiles; the others are compiled by `make clients`."""


def to_mps(x: Any) -> Any:
    return x.to("mps") if isinstance(x, Tensor) else x


def problem(name: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor], dict]:
    """(tensors, options) on the CPU and on mps; the tensors require grad."""
    tensors, options = CALLS[name].tensors(), CALLS[name].options()
    there = {name: x.to("mps").requires_grad_() for name, x in tensors.items()}
    here = {name: x.requires_grad_() for name, x in tensors.items()}
    return here, options, there, {name: to_mps(x) for name, x in options.items()}


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found.cpu().float(), wanted, rtol=10 * tolerance, atol=tolerance)


def cells() -> list:
    def slow(way: str, name: str) -> bool:
        return way in ("aot_eager, dynamic", "inductor", "aot_eager") and name not in _SAMPLED

    return [
        pytest.param(way, name, marks=pytest.mark.slow if slow(way, name) else ())
        for way in WAYS
        for name in CALLS
    ]


@pytest.mark.parametrize(("way", "name"), cells())
def test_out_and_gradients(way: str, name: str):
    here, options, there, options_there = problem(name)
    expected = by_pytorch(here, options, SEED)
    dout = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, list(here.values()), dout)
    with orchard_ops.sdpa():
        attention = WAYS[way]()
        torch.manual_seed(SEED)
        out = attention(**there, **options_there)
        out.backward(dout.to("mps"))
    close(out, expected)
    for x, y in zip(there.values(), wanted, strict=True):
        close(x.grad, y)
    on_metal(FORWARDS_OF_ONE_CALL.get(way, 1), 1)


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
@pytest.mark.parametrize("name", CALLS)
def test_without_gradients(name: str, mode: type[AbstractContextManager]):
    here, options, there, options_there = problem(name)
    with mode():
        there = {name: x.detach().clone() for name, x in there.items()}
        torch.manual_seed(SEED)
        with orchard_ops.sdpa():
            out = F.scaled_dot_product_attention(**there, **options_there)
    close(out, by_pytorch(here, options, SEED).detach())
    on_metal(1, 0)


@pytest.mark.parametrize(
    "name, dtype", product(tuple(CALLS), (torch.float16, torch.bfloat16)), ids=str
)
def test_autocast(name: str, dtype: torch.dtype):
    here, options, there, options_there = problem(name)

    def rounded(x: Any) -> Any:
        floats = isinstance(x, Tensor) and x.is_floating_point()
        return x.to(dtype).float() if floats else x

    expected = by_pytorch(
        {name: rounded(x) for name, x in here.items()},
        {name: rounded(x) for name, x in options.items()},
        SEED,
    )
    dout = rounded(torch.randn_like(expected))
    wanted = torch.autograd.grad(expected, list(here.values()), dout)
    torch.manual_seed(SEED)
    with orchard_ops.sdpa(), torch.autocast("mps", dtype=dtype):
        out = F.scaled_dot_product_attention(**there, **options_there)
    assert out.dtype == dtype
    grads = torch.autograd.grad(out, list(there.values()), dout.to("mps", dtype))
    tolerance = 16 * torch.finfo(dtype).eps
    close(out, expected, tolerance)
    for x, y in zip(grads, wanted, strict=True):
        close(x, y, tolerance)
    on_metal(1, 1)


def test_dynamic_lengths_compile_once():
    compilations = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal compilations
        compilations += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch.compiler.reset()
    attention = torch.compile(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        backend=backend,
        fullgraph=True,
        dynamic=True,
    )
    with orchard_ops.sdpa():
        for length in (20, 33, 47):
            q, k, v = (torch.randn(2, 2, length, 16) for _ in range(3))
            leaves = [x.to("mps").requires_grad_() for x in (q, k, v)]
            out = attention(*leaves)
            close(out.detach(), F.scaled_dot_product_attention(q, k, v, is_causal=True))
            out.sum().backward()
            assert all(x.grad is not None for x in leaves)
    assert compilations == 1
    on_metal(3, 3)


# ---- torch.func ---------------------------------------------------------------------------------


WITHOUT_DROPOUT = [name for name, call in CALLS.items() if call.dropout_p == 0.0]


@pytest.mark.parametrize("name", WITHOUT_DROPOUT)
def test_func_grad(name: str):
    here, options, there, options_there = problem(name)
    expected = by_pytorch(here, options, SEED).square().sum()
    wanted = torch.autograd.grad(expected, list(here.values()))

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return F.scaled_dot_product_attention(**tensors, **options_there).square().sum()

    with orchard_ops.sdpa():
        found = torch.func.grad(loss)({name: x.detach() for name, x in there.items()})
    for x, y in zip(found.values(), wanted, strict=True):
        close(x, y, 1e-4)
    on_metal(1, 1)


@pytest.mark.parametrize("name", WITHOUT_DROPOUT)
def test_vmap(name: str):
    call, samples = CALLS[name], 3
    options = call.options()
    several = [call.tensors() for _ in range(samples)]
    expected = torch.stack([by_pytorch(tensors, options, SEED) for tensors in several])
    stacked = {name: torch.stack([x[name] for x in several]).to("mps") for name in several[0]}
    options = {name: to_mps(x) for name, x in options.items()}
    with orchard_ops.sdpa():
        out = torch.vmap(lambda x: F.scaled_dot_product_attention(**x, **options))(stacked)
    close(out, expected)
    on_metal(1, 0)


def test_vmap_draws_dropout_for_each_sample():
    q, k, v = (torch.randn(3, 2, 2, 40, 16, device="mps") for _ in range(3))

    def attention(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k[0], v[0], dropout_p=0.5)

    with orchard_ops.sdpa():
        out = torch.vmap(attention, randomness="different")(q[:1].expand(3, -1, -1, -1, -1)).cpu()
    assert not torch.equal(out[0], out[1])
    on_metal(1, 0)


def test_vmap_over_gradients():
    q, k, v = (torch.randn(3, 2, 2, 9, 16) for _ in range(3))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).square().sum()

    def gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v)

    wanted = [torch.stack(x) for x in zip(*(gradients(*sample) for sample in zip(q, k, v)))]
    with orchard_ops.sdpa():
        found = torch.vmap(gradients)(q.to("mps"), k.to("mps"), v.to("mps"))
    for x, y in zip(found, wanted):
        close(x, y, 1e-4)
    on_metal(1, 1)


# ---- PyTorch's modules --------------------------------------------------------------------------

WIDTH, HEADS, LENGTH = 32, 4, 11


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor, **masks: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False, **masks)[0]


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 48, 0.0, batch_first=True)

    def forward(self, x: Tensor, **masks: Tensor) -> Tensor:
        return self.layer(x, x.flip(1), **masks)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Transformer(WIDTH, HEADS, 1, 1, 48, 0.0, batch_first=True)

    def forward(self, x: Tensor, **masks: Tensor) -> Tensor:
        return self.layers(x, x.flip(1), **masks)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def padded() -> Tensor:
    """True is padding, as these modules have it."""
    return torch.arange(LENGTH).expand(2, LENGTH) >= torch.tensor((LENGTH, LENGTH - 4))[:, None]


def later() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)


MODULES: dict[str, tuple[Any, dict[str, Any], int]] = {  # the class, its masks, its attentions
    "MultiheadAttention": (SelfAttention, {}, 1),
    "MultiheadAttention, padding": (SelfAttention, {"key_padding_mask": padded}, 1),
    "MultiheadAttention, causal": (SelfAttention, {"attn_mask": later}, 1),
    "TransformerEncoder": (encoder, {}, 2),
    "TransformerEncoder, padding": (encoder, {"src_key_padding_mask": padded}, 2),
    "TransformerEncoder, causal": (encoder, {"mask": later}, 2),
    "TransformerDecoderLayer, both": (
        Decoder,
        {"tgt_mask": later, "memory_key_padding_mask": padded},
        2,
    ),
    "Transformer": (Transformer, {"tgt_mask": later}, 3),
}


@pytest.mark.simulated
@pytest.mark.parametrize("name", ("MultiheadAttention", "MultiheadAttention, padding"))
def test_memory_of_a_training_step_follows_the_length(name: str):
    """PyTorch's own path keeps the weights of all pairs, and takes four times as much."""
    import simulator

    def peak(length: int) -> int:
        module = SelfAttention().to("mps")
        x = torch.randn(1, length, WIDTH, device="mps")
        masks = {}
        if "padding" in name:
            masks["key_padding_mask"] = torch.arange(length, device="mps")[None] >= length - 9
        module(x, **masks).square().mean().backward()  # what stays: gradients of the parameters
        module.zero_grad(set_to_none=False)
        simulator.reset_peak()
        before = simulator.memory().allocated
        module(x, **masks).square().mean().backward()
        return simulator.memory().peak - before

    with orchard_ops.sdpa():
        ours = peak(1024) / peak(512)
    stock = peak(1024) / peak(512)
    assert 1.9 < ours < 2.1 and stock > 3.0


@pytest.mark.parametrize(
    "backend", (None, "aot_eager", pytest.param("inductor", marks=pytest.mark.slow))
)
@pytest.mark.parametrize("name", MODULES)
def test_training_a_module(name: str, backend: str | None):
    make, masks, attentions = MODULES[name]
    module = make()
    x = torch.randn(2, LENGTH, WIDTH)
    expected = module(x, **{mask: function() for mask, function in masks.items()})
    expected.square().sum().backward()
    wanted = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.zero_grad()
    module = module.to("mps")
    there = {mask: function().to("mps") for mask, function in masks.items()}
    torch.compiler.reset()
    call = module if backend is None else torch.compile(module, backend=backend)
    with orchard_ops.sdpa():
        out = call(x.to("mps"), **there)
        out.square().sum().backward()
    close(out.detach(), expected.detach())
    for key, parameter in module.named_parameters():
        close(parameter.grad, wanted[key], 1e-4)
    on_metal(attentions, attentions)


@pytest.mark.parametrize("name", MODULES)
def test_evaluating_a_module(name: str):
    """nn.TransformerEncoder has a fast path in evaluation, which mps does not take."""
    make, masks, attentions = MODULES[name]
    module = make().eval()
    x = torch.randn(2, LENGTH, WIDTH)
    with torch.no_grad():
        # The CPU's fast path fills padded rows with zeros; with gradients it is not taken.
        with torch.enable_grad():
            expected = module(x, **{mask: function() for mask, function in masks.items()})
        module = module.to("mps")
        with orchard_ops.sdpa():
            there = {mask: function().to("mps") for mask, function in masks.items()}
            out = module(x.to("mps"), **there)
    close(out, expected.detach())
    on_metal(attentions, 0)
