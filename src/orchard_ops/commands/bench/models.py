"""Attention in known models: heads, width, mask and length, each by the model's public config.

A case is what one layer asks for. What SDPA has no argument for, and so cannot be measured beside
it, is left out and said in `LEAVES_OUT`.
"""

from __future__ import annotations

from .problem import Problem

_FULL = "full"
_CAUSAL = "causal"

_ROWS = (  # name, query heads, key/value heads, head_dim, mask, length
    ("gpt2", 12, 12, 64, _CAUSAL, 1024),
    ("smollm2-135m", 9, 3, 64, _CAUSAL, 2048),
    ("llama-3.2-1b", 32, 8, 64, _CAUSAL, 4096),
    ("llama-3.1-8b", 32, 8, 128, _CAUSAL, 4096),
    ("qwen2.5-7b", 28, 4, 128, _CAUSAL, 4096),
    ("phi-3-mini", 32, 32, 96, _CAUSAL, 4096),
    ("gemma-2-2b", 8, 4, 256, _CAUSAL, 4096),
    ("bert-base", 12, 12, 64, _FULL, 512),
    ("vit-b16", 12, 12, 64, _FULL, 197),  # 14 x 14 patches of a picture of 224, and the class
    ("sdxl-1024", 10, 10, 64, _FULL, 4096),  # its latent of 128 x 128, halved once
    ("sdxl-1024-inner", 20, 20, 64, _FULL, 1024),  # halved twice
    ("whisper-small", 12, 12, 64, _FULL, 1500),  # the encoder: 30 seconds
)

MODELS = {row[0]: Problem(*row[:5], length=row[5]) for row in _ROWS}

LEAVES_OUT = {
    "gemma-2-2b": "its softcap of 50, and windows of 4096 in every second layer",
    "phi-3-mini": "its window of 2047",
    "bert-base": "padding",
}
