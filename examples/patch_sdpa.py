"""A model that knows nothing of this package: PyTorch's encoder, with its attention through ours.

`with orchard_ops.sdpa()` takes over `F.scaled_dot_product_attention`, whoever calls it.
"""

import argparse

import torch
from torch import nn

import orchard_ops


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args(arguments)

    device = "mps" if torch.backends.mps.is_available() else "cpu"
    layer = nn.TransformerEncoderLayer(256, 4, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = torch.randn(2, args.length, 256, device=device)
    target = x.cumsum(1) / torch.arange(1, args.length + 1, device=device)[:, None]  # causal means
    causal = nn.Transformer.generate_square_subsequent_mask(args.length, device=device)
    losses = []
    with orchard_ops.sdpa():
        for step in range(args.steps):
            loss = (model(x, mask=causal, is_causal=True) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            print(f"step {step}: loss {losses[-1]:.4f}")
    print(orchard_ops.stats())
    return losses


if __name__ == "__main__":
    main()
