"""A checkpoint on disk, and a batch: what the reader of docs/transformers.md has."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

device = "mps" if torch.backends.mps.is_available() else "cpu"
name = tempfile.mkdtemp()
LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
).save_pretrained(name)

ids = torch.randint(3, 64, (2, 24), device=device)
mask = torch.ones_like(ids)
mask[0, :5] = 0
documents = [{"input_ids": list(range(3, 3 + length))} for length in (5, 9, 14)]
