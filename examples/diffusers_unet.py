"""Denoising steps of a conditional UNet of diffusers, its attention through ours.

The UNet is a tiny one with random weights, so that nothing is downloaded; with a checkpoint it is
`UNet2DConditionModel.from_pretrained(name, subfolder="unet")`. Nothing in the model changes:
diffusers calls `F.scaled_dot_product_attention`.
"""

import argparse

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel

import orchard_ops


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=32, help="of the latent image")
    args = parser.parse_args(arguments)

    device = "mps" if torch.backends.mps.is_available() else "cpu"
    unet = UNet2DConditionModel(
        sample_size=args.size,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=8,
    ).to(device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    scheduler = DDPMScheduler(num_train_timesteps=100)
    latents = torch.randn(2, 4, args.size, args.size, device=device)
    prompt = torch.randn(2, 16, 64, device=device)  # what a text encoder would say
    noise = torch.randn_like(latents)
    timesteps = torch.tensor([10, 60], device=device)
    losses = []
    with orchard_ops.sdpa():
        for step in range(args.steps):
            noisy = scheduler.add_noise(latents, noise, timesteps)
            predicted = unet(noisy, timesteps, encoder_hidden_states=prompt).sample
            loss = F.mse_loss(predicted, noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            print(f"step {step}: loss {losses[-1]:.4f}")
    print(orchard_ops.stats())
    return losses


if __name__ == "__main__":
    main()
