"""Exact attention for PyTorch on Apple GPUs: forward and backward, in memory linear in the lengths.

Importing registers the ops ``torch.ops.orchard.*`` and, where the native library is present, their
Metal kernels.
"""

from . import _native
from ._calls import OrchardFallbackWarning, Stats, reset_stats, stats
from .attention import flash_attn
from .dropout import dropout_mask
from .explain import Explanation, explain

_native.load()

__version__ = "0.1.0"
__all__ = [
    "Explanation",
    "OrchardFallbackWarning",
    "Stats",
    "dropout_mask",
    "explain",
    "flash_attn",
    "reset_stats",
    "stats",
]
