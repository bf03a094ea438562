"""Attention and its gradient in plain PyTorch: any device, any float dtype, linear memory.

This is what runs where the Metal kernels cannot (CPU tensors, features the kernels refuse, a failed
compile). It walks over blocks of query rows, so no L x S matrix ever exists, looks only at the keys
a block may see, and never expands grouped keys and values. Half precision is computed in float32.

Mathematics: T. Dao, "FlashAttention-2", https://arxiv.org/abs/2307.08691, sections 2 and 3; sinks
as in gpt-oss (one extra logit per head without a value).
"""

from .backward import backward
from .forward import forward

__all__ = ["backward", "forward"]
