"""transformers' own attn_implementation="flex_attention" on mps, with FlexAttention taken over."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.integrations.flex_attention import WrappedFlexAttention
from weights import stir

import orchard_ops

pytestmark = pytest.mark.usefixtures("fresh_stats")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
MODELS = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES)),
    "mistral, a window": (hf.MistralForCausalLM, hf.MistralConfig(**SIZES, sliding_window=6)),
    "gemma2, a window and softcap": (
        hf.Gemma2ForCausalLM,
        hf.Gemma2Config(
            **SIZES, sliding_window=6, attn_logit_softcapping=5.0, query_pre_attn_scalar=16
        ),
    ),
}


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    """transformers compiles flex_attention once in a process."""
    torch._dynamo.reset()
    WrappedFlexAttention._is_flex_compiled = False
    yield
    torch._dynamo.reset()
    WrappedFlexAttention._is_flex_compiled = False


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """The model with its own attention on the CPU, and with FlexAttention on mps."""
    kind, config = MODELS[name]
    torch.manual_seed(0)
    model = kind(copy.deepcopy(config))
    stir(model)
    flex = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    flex.set_attn_implementation("flex_attention")
    return model, flex.to("mps")


def batch(padded: bool) -> dict[str, Tensor]:
    tokens = torch.randint(1, 64, (2, 21))
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, :8] = 0
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("name", MODELS)
def test_a_training_step(name: str, padded: bool):
    model, flex = pair(name)
    given = batch(padded)
    moved = {key: x.to("mps") for key, x in given.items()}
    shown = given["attention_mask"].bool()
    # What is predicted from padding differs: queries that see no key are 0, or a mean of all keys.
    after_padding = torch.nn.functional.pad(~shown, (1, 0))[:, :-1]
    labels = given["input_ids"].masked_fill(~shown | after_padding, -100)
    right = model(**given, labels=labels)
    right.loss.backward()
    with orchard_ops.flex():
        actual = flex(**moved, labels=labels.to("mps"))
        actual.loss.backward()
    torch.testing.assert_close(
        actual.logits.cpu()[shown], right.logits[shown], rtol=2e-4, atol=2e-4
    )
    grads = dict(flex.named_parameters())
    for parameter, x in model.named_parameters():
        scale = x.grad.abs().max().item()
        torch.testing.assert_close(
            grads[parameter].grad.cpu(),
            x.grad,
            rtol=1e-3,
            atol=1e-4 * max(scale, 1e-2),
            msg=lambda text, parameter=parameter: f"{parameter}: {text}",
        )
    assert orchard_ops.stats().reference == {}
    assert sum(orchard_ops.stats().metal.values()) == 2 * 2


def test_evaluation_without_gradients():
    model, flex = pair("gemma2, a window and softcap")
    model.eval(), flex.eval()
    given = batch(False)
    with torch.no_grad(), orchard_ops.flex():
        right = model(**given).logits
        actual = flex(**{key: x.to("mps") for key, x in given.items()}).logits
    torch.testing.assert_close(actual.cpu(), right, rtol=2e-4, atol=2e-4)
    assert sum(orchard_ops.stats().metal.values()) == 2
