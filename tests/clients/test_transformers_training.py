"""Finetuning as people do it: LoRA by PEFT, and Trainer with flattened batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from families import FAMILIES
from torch import Tensor, nn

import orchard_ops

DEVICE = "mps"
orchard_ops.register_transformers()


def with_lora(implementation: str, device: str) -> nn.Module:
    model = FAMILIES["qwen2"].make(implementation)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    model = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return model.to(device).train()


@pytest.mark.usefixtures("fresh_stats")
def test_lora_trains_on_metal():
    """The base model needs no gradient, its adapters do; one row is padded."""
    mask = torch.ones((2, 40), dtype=torch.int64)
    mask[0, 25:] = 0
    inputs = FAMILIES["qwen2"].inputs() | {"attention_mask": mask}
    grads = []
    for implementation, device in (("eager", "cpu"), ("orchard", DEVICE)):
        model = with_lora(implementation, device)
        out = model(**{k: x.to(device) for k, x in inputs.items()}, use_cache=False).logits
        (out * mask[..., None].to(device)).square().mean().backward()
        grads.append({n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None})
    expected, found = grads
    assert expected.keys() == found.keys() and all("lora" in name for name in found)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-5 * x.abs().max().item())
    assert orchard_ops.stats().fallbacks == 0 and orchard_ops.stats().metal["flash_attn_bwd"] == 2


class Documents(torch.utils.data.Dataset):
    """Twelve documents of different lengths."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, n: int) -> dict[str, Any]:
        ids = torch.randint(3, 64, (5 + 3 * n,), generator=torch.Generator().manual_seed(n))
        return {"input_ids": ids.tolist(), "labels": ids.tolist()}


def losses(implementation: str, folder: Path, **collator: Any) -> list[float]:
    model = FAMILIES["llama"].make(implementation)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=4,
            num_train_epochs=1,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            use_cpu=implementation == "eager",
            activation_checkpointing=True,
            save_strategy="no",
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=Documents(),
        data_collator=transformers.DataCollatorWithFlattening(**collator),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.usefixtures("fresh_stats")
@pytest.mark.parametrize("flash", (False, True), ids=("position_ids", "cu_seq_lens"))
def test_trainer_trains_on_flattened_batches(flash: bool, tmp_path: Path):
    """The curve of eager attention, which packs by position_ids."""
    expected = losses("eager", tmp_path, return_position_ids=True)
    options = {"return_flash_attn_kwargs": flash, "return_position_ids": True}
    found = losses("orchard", tmp_path, **options)
    assert len(set(found)) == 3
    assert found == pytest.approx(expected, rel=2e-4)
    assert orchard_ops.stats().fallbacks == 0 and orchard_ops.stats().metal["flash_attn_bwd"] == 6


def test_gradients_reach_a_learned_bias_and_sinks():
    """T5's position bias and the sinks of gpt-oss are parameters of the model."""
    for family, name in (("t5", "relative_attention_bias"), ("gpt_oss", "sinks")):
        model = FAMILIES[family].make("orchard").to(DEVICE)
        inputs: dict[str, Tensor] = FAMILIES[family].inputs()
        model(**{k: x.to(DEVICE) for k, x in inputs.items()}).logits.square().mean().backward()
        found = [p.grad for n, p in model.named_parameters() if name in n]
        assert found and all(grad is not None and bool(grad.abs().sum() > 0) for grad in found)


@pytest.mark.parametrize("compiled", (False, True), ids=("eager mode", "compiled"))
def test_labels_behind_padding_on_the_left_are_learned_as_with_sdpa(compiled: bool):
    """The row of the last padding token predicts the first real one, and counts in the loss."""
    inputs = FAMILIES["llama"].inputs()
    mask = torch.ones((2, 40), dtype=torch.int64)
    mask[0, :9], mask[1, 33:] = 0, 0
    inputs |= {"attention_mask": mask, "labels": inputs["input_ids"].masked_fill(mask == 0, -100)}
    results = []
    for implementation, device in (("sdpa", "cpu"), ("orchard", DEVICE)):
        model = FAMILIES["llama"].make(implementation).to(device).train()
        model.gradient_checkpointing_enable()
        torch._dynamo.reset()
        run = torch.compile(model, backend="aot_eager") if compiled and device != "cpu" else model
        loss = run(**{k: x.to(device) for k, x in inputs.items()}, use_cache=False).loss
        loss.backward()
        results.append([loss.detach().cpu(), *(p.grad.cpu() for p in model.parameters())])
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
