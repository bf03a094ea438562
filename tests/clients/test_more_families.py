"""Families that nobody chose: every causal language model of transformers that can be made tiny."""

from __future__ import annotations

import gc

import pytest
import torch
from tiny_configs import make
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import orchard_ops

DEVICE, L = "mps", 40
orchard_ops.register_transformers()
SOME = ("seed_oss", "biogpt", "doge")
"""What `make test` tries; `make clients` tries all."""
PADDINGS = {"none": None, "right": slice(27, None), "left": slice(0, 13)}


def step(model: nn.Module, padding: slice | None, device: str) -> dict[str, Tensor]:
    """The logits of real tokens, and the gradients of a training step."""
    ids = torch.randint(3, 63, (2, L), generator=torch.Generator().manual_seed(1))
    kept = torch.ones((2, L), dtype=torch.int64)
    inputs = {"input_ids": ids}
    if padding is not None:
        kept[0, padding] = 0
        inputs["attention_mask"] = kept
    model.to(device)
    out = model(**{name: x.to(device) for name, x in inputs.items()}, use_cache=False).logits
    out = out * kept[..., None].to(device)
    (out * torch.sin(torch.arange(out.numel(), device=device).view_as(out))).sum().backward()
    grads = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach().cpu(), **grads}


def wrong(family: str) -> str | None:
    """What differs from eager attention, or nothing; None where eager attention cannot be run."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    name = name if isinstance(name, str) else name[0]
    for side, padding in PADDINGS.items():
        try:
            expected = step(make(family, name, "eager"), padding, "cpu")
            again = step(make(family, name, "eager"), padding, "cpu")
        except Exception:
            return None
        if not all(torch.equal(x, again[n]) for n, x in expected.items()):
            return None  # it draws random numbers
        try:
            found = step(make(family, name, "orchard"), padding, DEVICE)
        except Exception as error:
            return f"{side}: {type(error).__name__}: {error}"
        if found.keys() != expected.keys():
            return f"{side}: other gradients"
        largest = max(x.abs().max().item() for n, x in expected.items() if n != "out")
        for n, x in expected.items():
            bound = (2e-5 if n == "out" else 5e-5) * x.abs().max().item()
            bound += 0.0 if n == "out" else 2e-6 * largest
            distance = (found[n] - x).abs().max().item()
            if not distance <= bound:
                return f"{side}: {n} is off by {distance:.1e}, allowed {bound:.1e}"
    return ""


@pytest.mark.parametrize("family", SOME)
def test_a_family_trains_as_with_eager_attention(family: str):
    assert wrong(family) == ""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::orchard_ops.OrchardFallbackWarning")  # heads above 256
def test_every_family_that_can_be_made_tiny_trains_as_with_eager_attention():
    answers = {}
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        answers[family] = wrong(family)
        gc.collect()
    assert {family: x for family, x in answers.items() if x} == {}
    assert sum(x == "" for x in answers.values()) >= 90  # with transformers 5.24
