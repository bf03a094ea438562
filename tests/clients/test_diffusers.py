"""Unchanged models of diffusers with F.scaled_dot_product_attention taken over."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers_models import MODELS
from sdpa_calls import on_metal
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only
from weights import stir

import orchard_ops

pytestmark = pytest.mark.usefixtures("fresh_stats")
_SAMPLED = {
    "checkpoint": ("UNet, padded text", "Qwen-Image, padded text", "Flux"),
    "autocast": ("Qwen-Image, padded text", "Flux"),
    "aot_eager": ("Flux",),
    "inductor": (),
}
"""What `make test` trains besides every model in eager mode; `make clients` trains all."""


def made(name: str) -> nn.Module:
    torch.manual_seed(11)
    return stir(MODELS[name].make(), 0.02)


def step(
    module: nn.Module,
    inputs: dict[str, Any],
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Any:
    """The output of a training step and the gradients of the parameters."""
    call = module if backend is None else torch.compile(module, backend=backend)
    device = next(module.parameters()).device.type
    casts = nullcontext() if dtype is None else torch.autocast(device, dtype=dtype)
    with casts:
        out = call(**inputs, return_dict=False)[0]
    out.float().square().mean().backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return out.detach().cpu().float(), {name: x.cpu() for name, x in grads.items()}


def to_mps(inputs: dict[str, Any]) -> dict[str, Any]:
    return tree_map_only(Tensor, lambda x: x.to("mps"), inputs)


def agree(found: Any, wanted: Any, tolerance: float) -> None:
    out, grads = found
    expected, expected_grads = wanted
    assert grads.keys() == expected_grads.keys() and len(grads) > 10
    largest = max(x.abs().max().item() for x in expected_grads.values())
    torch.testing.assert_close(
        out, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item()
    )
    for name, x in grads.items():
        torch.testing.assert_close(
            x, expected_grads[name], rtol=tolerance, atol=tolerance * largest, msg=name
        )


def ways() -> list:
    def marks(name: str, way: str) -> Any:
        return () if way == "eager" or name in _SAMPLED[way] else pytest.mark.slow

    return [
        pytest.param(name, way, marks=marks(name, way))
        for way in ("eager", *_SAMPLED)
        for name in MODELS
    ]


@pytest.mark.parametrize(("name", "way"), ways())
def test_a_training_step(name: str, way: str):
    module, inputs = made(name).train(), MODELS[name].inputs()
    dtype = torch.bfloat16 if way == "autocast" else None
    there = made(name).train().to("mps")
    if way == "checkpoint":
        there.enable_gradient_checkpointing()
    with sdpa_kernel(SDPBackend.MATH):
        wanted = step(module, inputs)
        if dtype is not None:
            # Without us, as far off as with us: the rest of the model computes in bfloat16 too.
            stock = step(made(name).train().to("mps"), to_mps(inputs), dtype)
            agree(stock, wanted, 0.1)
    torch.compiler.reset()
    backend = way if way in ("aot_eager", "inductor") else None
    with orchard_ops.sdpa():
        found = step(there, to_mps(inputs), dtype, backend)
    agree(found, wanted, 1e-3 if dtype is None else 0.1)
    attentions = MODELS[name].attentions
    stats = orchard_ops.stats()
    assert stats.metal["flash_attn_bwd"] == attentions
    assert stats.reference == {} and stats.left_to_pytorch == {}
    if way != "checkpoint":  # which repeats the forward of what it checkpoints
        on_metal(attentions, attentions)
    elif name != "VAE":
        assert attentions < stats.metal["flash_attn_fwd"] <= 2 * attentions


@pytest.mark.parametrize("name", MODELS)
def test_a_forward(name: str):
    module, inputs = made(name).eval(), MODELS[name].inputs()
    with torch.inference_mode():
        with sdpa_kernel(SDPBackend.MATH):
            expected = module(**inputs, return_dict=False)[0]
        module = module.to("mps")
        with orchard_ops.sdpa():
            out = module(**to_mps(inputs), return_dict=False)[0]
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-3, atol=1e-4)
    on_metal(MODELS[name].attentions, 0)


def test_padding_of_text_reaches_no_result():
    """Whatever stands in the padding, the result is the same, which a lost mask would not give."""
    module, inputs = (
        made("Qwen-Image, padded text").to("mps"),
        to_mps(MODELS["Qwen-Image, padded text"].inputs()),
    )
    other = dict(inputs)
    hidden = inputs["encoder_hidden_states"].clone()
    hidden[~inputs["encoder_hidden_states_mask"]] = 7.0
    other["encoder_hidden_states"] = hidden
    with orchard_ops.sdpa(), torch.no_grad():
        out, same = (module(**x, return_dict=False)[0].cpu() for x in (inputs, other))
    torch.testing.assert_close(out, same)
    on_metal(4, 0)


def test_backends_of_diffusers():
    """Its list of backends is closed; "native" is F.sdpa, and "_native_math" is PyTorch's own."""
    module, inputs = made("Flux").to("mps"), to_mps(MODELS["Flux"].inputs())
    with pytest.raises(ValueError, match="orchard"):
        module.set_attention_backend("orchard")
    outs = []
    with orchard_ops.sdpa(), torch.no_grad():
        for backend, forwards in (("native", 2), ("_native_flash", 2), ("_native_math", 0)):
            orchard_ops.reset_stats()
            module.set_attention_backend(backend)
            outs.append(module(**inputs, return_dict=False)[0].cpu())
            assert orchard_ops.stats().metal["flash_attn_fwd"] == forwards
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-3, atol=1e-4)
    module.reset_attention_backend()
