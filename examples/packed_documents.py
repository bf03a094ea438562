"""Documents of different lengths, one behind another in a row: no padding, and none sees another.

Which keys a query may see is made once for a batch, in linear memory, and given to every layer.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import orchard_ops
from orchard_ops import KeyRanges


class Layer(nn.Module):
    def __init__(self, width: int = 128, num_heads: int = 2):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())

    def forward(self, x: Tensor, ranges: KeyRanges) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = orchard_ops.flash_attn(q, k, v, is_causal=True, key_ranges=ranges)
        x = x + out.transpose(1, 2).flatten(2)
        return x + self.mlp(x)


def pack(lengths: list[int], row_length: int) -> tuple[Tensor, Tensor]:
    """Documents that count up from a random number, as (tokens, document ids), each (1, L)."""
    tokens = [torch.arange(length) + int(torch.randint(200, ())) for length in lengths]
    ids = [torch.full((length,), number) for number, length in enumerate(lengths)]
    return torch.cat(tokens)[None, :row_length] % 256, torch.cat(ids)[None, :row_length]


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--length", type=int, default=1024)
    args = parser.parse_args(arguments)

    device = "mps" if torch.backends.mps.is_available() else "cpu"
    embedding, head = nn.Embedding(256, 128).to(device), nn.Linear(128, 256).to(device)
    layers = nn.ModuleList(Layer() for _ in range(2)).to(device)
    parameters = [*embedding.parameters(), *layers.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    losses = []
    for step in range(args.steps):
        lengths = torch.randint(5, args.length // 2, (args.length // 5 + 1,)).tolist()
        tokens, ids = (x.to(device) for x in pack(lengths, args.length))
        ranges = KeyRanges.from_document_ids(ids)  # once a batch
        x = embedding(tokens)
        for layer in layers:
            x = layer(x, ranges)
        same = ids[:, 1:] == ids[:, :-1]  # the next token is of the same document
        loss = F.cross_entropy(head(x[:, :-1])[same], tokens[:, 1:][same])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step}: {int(ids.max()) + 1} documents, loss {losses[-1]:.3f}")
    print(orchard_ops.stats())
    return losses


if __name__ == "__main__":
    main()
