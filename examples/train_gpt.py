"""A GPT on bytes of its own source, with attention by `orchard_ops.flash_attn`."""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import orchard_ops


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int, num_kv_heads: int):
        super().__init__()
        self.heads = (num_heads, num_kv_heads, num_kv_heads)
        head_dim = width // num_heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, sum(self.heads) * head_dim)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm(x)).unflatten(-1, (sum(self.heads), -1)).transpose(1, 2)
        q, k, v = heads.split(self.heads, dim=1)  # (B, heads, L, head_dim), read where they lie
        dropout_p = 0.1 if self.training else 0.0
        out = orchard_ops.flash_attn(q, k, v, None, dropout_p, is_causal=True, enable_gqa=True)
        x = x + self.proj(out.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class GPT(nn.Module):
    def __init__(self, length: int, width: int = 256, num_layers: int = 2):
        super().__init__()
        self.tokens = nn.Embedding(256, width)
        self.positions = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.Sequential(*(Block(width, 4, 2) for _ in range(num_layers)))
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.tokens(tokens) + self.positions))


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args(arguments)

    device = "mps" if torch.backends.mps.is_available() else "cpu"
    text = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).long()
    model = GPT(args.length).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(args.steps):
        starts = torch.randint(len(text) - args.length, (4, 1))
        batch = text[starts + torch.arange(args.length + 1)].to(device)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.3f}")
    print(orchard_ops.stats())
    return losses


if __name__ == "__main__":
    main()
