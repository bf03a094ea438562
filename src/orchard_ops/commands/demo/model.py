"""A byte-level GPT with grouped-query attention whose attention function is an argument.

Attention dropout is the only randomness in training: two models that start from the same weights
and see the same dropout masks compute the same losses, whatever computes their attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Causal: query (B, Hq, L, D), key and value (B, Hkv, L, D), dropout_p -> (B, Hq, L, D)."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model. The width is num_heads * head_dim."""

    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    context_length: int = 128
    dropout_p: float = 0.1
    vocab_size: int = 256
    rope_base: float = 10000.0

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim


def rope_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions, each (context_length, head_dim)."""
    half = torch.arange(config.head_dim // 2, dtype=torch.float32)
    frequency = config.rope_base ** (-2.0 * half / config.head_dim)
    angle = torch.arange(config.context_length, dtype=torch.float32).unsqueeze(1) * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rotary positions to x (B, H, L, D) with tables (L, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class GroupedQueryAttention(nn.Module):
    """Causal self-attention (B, L, width) -> (B, L, width), several query heads per key head."""

    def __init__(self, config: ModelConfig, attention: Attention):
        super().__init__()
        self.config, self.attention = config, attention
        num_heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv = nn.Linear(config.width, num_heads * config.head_dim, bias=False)
        self.proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        config = self.config
        batch, length, _ = x.shape
        # (B, L, heads, D) seen as (B, heads, L, D): the op takes any strides, nothing is copied.
        heads = self.qkv(x).view(batch, length, -1, config.head_dim).transpose(1, 2)
        q, k, v = heads.split((config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = self.attention(q, k, v, config.dropout_p if self.training else 0.0)
        return self.proj(out.transpose(1, 2).reshape(batch, length, config.width))


class Block(nn.Module):
    """Pre-norm transformer block (B, L, width) -> (B, L, width)."""

    def __init__(self, config: ModelConfig, attention: Attention):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, bias=False)
        self.attention = GroupedQueryAttention(config, attention)
        self.mlp_norm = nn.LayerNorm(config.width, bias=False)
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    """Bytes (B, L) int64 -> next-byte logits (B, L, vocab_size); the head is the embedding."""

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: ModelConfig, attention: Attention):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.width, bias=False)
        cos, sin = rope_tables(config)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Draws the weights as GPT-2 does, with smaller ones where a block adds to the residual
        stream, but with larger embeddings.

        A run of a few hundred steps has no time to grow the embeddings from GPT-2's 0.02.
        """
        nn.init.normal_(self.embedding.weight, std=0.05)
        for name, weight in self.blocks.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("proj.weight", "down.weight"))
                depth = 2 * self.config.num_layers if residual else 1
                nn.init.normal_(weight, std=0.02 / depth**0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        cos, sin = self.rope_cos[:length], self.rope_sin[:length]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.linear(self.final_norm(x), self.embedding.weight)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats per byte, a scalar. tokens, targets: (B, L) int64."""
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())


@torch.no_grad()
def generate(
    model: GPT, prompt: bytes, num_bytes: int, *, temperature: float = 0.7, seed: int = 0
) -> bytes:
    """Continues the prompt by num_bytes sampled bytes.

    Every byte runs the model on its whole context. The sampling itself runs on the cpu, so that a
    seed gives the same draws on every device.
    """
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    text = list(prompt)
    for _ in range(num_bytes):
        context = torch.tensor([text[-model.config.context_length :]], device=device)
        logits = model(context)[0, -1].float().cpu()
        weights = torch.softmax(logits / temperature, dim=-1)
        text.append(int(torch.multinomial(weights, 1, generator=generator)))
    model.train(was_training)
    return bytes(text[len(prompt) :])
