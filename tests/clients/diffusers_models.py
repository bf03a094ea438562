"""Models of diffusers, tiny and with random weights, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor, nn

Inputs = dict[str, Any]


class Model(NamedTuple):
    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    attentions: int
    """Calls of F.scaled_dot_product_attention in a forward."""


def text_mask(length: int) -> Tensor:
    """True for text, False for padding, in a batch of two."""
    return torch.arange(length) < torch.tensor((length, length - 4))[:, None]


def unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def unet_inputs() -> Inputs:
    return {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor((3, 700)),
        "encoder_hidden_states": torch.randn(2, 11, 24),
    }


def vae() -> nn.Module:
    return diffusers.AutoencoderKL(block_out_channels=(16,), norm_num_groups=8, sample_size=8)


def dit() -> nn.Module:
    module = diffusers.DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    )
    for part in module.modules():
        if hasattr(part, "dropout_prob"):
            part.dropout_prob = 0.0  # training would drop class labels by chance
    return module


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    )


def flux_inputs() -> Inputs:
    return {
        "hidden_states": torch.randn(2, 16, 16),
        "encoder_hidden_states": torch.randn(2, 9, 24),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor((0.3, 0.7)),
        "img_ids": torch.randint(4, (16, 3)).float(),
        "txt_ids": torch.zeros(9, 3),
    }


def wan() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


def qwen_image() -> nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )


def qwen_image_inputs() -> Inputs:
    return {
        "hidden_states": torch.randn(2, 16, 16),
        "encoder_hidden_states": torch.randn(2, 9, 24),
        "encoder_hidden_states_mask": text_mask(9),
        "timestep": torch.tensor((0.3, 0.7)),
        "img_shapes": [[(1, 4, 4)]] * 2,
    }


def pixart() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        sample_size=8,
        norm_num_groups=4,
        cross_attention_dim=32,
        caption_channels=24,
        use_additional_conditions=False,
    )


def pixart_inputs() -> Inputs:
    return {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 11, 24),
        "timestep": torch.tensor((3, 700)),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


MODELS: dict[str, Model] = {
    "UNet": Model(unet, unet_inputs, 8),
    "UNet, padded text": Model(
        unet, lambda: unet_inputs() | {"encoder_attention_mask": text_mask(11)}, 8
    ),
    "VAE": Model(vae, lambda: {"sample": torch.randn(2, 3, 8, 8)}, 2),
    "DiT": Model(
        dit,
        lambda: {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "timestep": torch.tensor((3, 700)),
            "class_labels": torch.tensor((1, 7)),
        },
        2,
    ),
    "SD3": Model(
        sd3,
        lambda: {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "encoder_hidden_states": torch.randn(2, 9, 24),
            "pooled_projections": torch.randn(2, 16),
            "timestep": torch.tensor((3, 700)),
        },
        3,
    ),
    "Flux": Model(flux, flux_inputs, 2),
    "Wan": Model(
        wan,
        lambda: {
            "hidden_states": torch.randn(2, 4, 3, 4, 4),
            "timestep": torch.tensor((3, 700)),
            "encoder_hidden_states": torch.randn(2, 9, 24),
        },
        4,
    ),
    "Qwen-Image, padded text": Model(qwen_image, qwen_image_inputs, 2),
    "PixArt": Model(pixart, pixart_inputs, 4),
    "PixArt, padded text": Model(
        pixart, lambda: pixart_inputs() | {"encoder_attention_mask": text_mask(11)}, 4
    ),
}
