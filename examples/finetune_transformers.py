"""A causal language model of transformers, fine-tuned on a padded batch.

The model is a tiny Llama with random weights, so that nothing is downloaded. With a checkpoint it
is `AutoModelForCausalLM.from_pretrained(name, attn_implementation="orchard")`.
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import orchard_ops
import orchard_ops.integrations.transformers  # registers "orchard"


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args(arguments)

    device = "mps" if torch.backends.mps.is_available() else "cpu"
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=args.length,
        attn_implementation="orchard",
    )
    model = LlamaForCausalLM(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    # Two sentences, the second half as long: padded on the right, as a tokenizer does.
    tokens = (torch.arange(args.length) * torch.tensor([[3], [5]])) % 256
    attention_mask = torch.ones_like(tokens)
    attention_mask[1, args.length // 2 :] = 0
    labels = tokens.masked_fill(attention_mask == 0, -100)
    batch = {"input_ids": tokens, "attention_mask": attention_mask, "labels": labels}
    batch = {name: x.to(device) for name, x in batch.items()}
    losses = []
    for step in range(args.steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.3f}")
    print(orchard_ops.stats())
    return losses


if __name__ == "__main__":
    main()
