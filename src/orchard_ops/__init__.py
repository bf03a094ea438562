"""Exact attention for PyTorch on Apple GPUs: forward and backward, in memory linear in the lengths.

Importing registers the ops ``torch.ops.orchard.*`` and, where the native library is present, their
Metal kernels.
"""

from . import _native, _vmap  # noqa: F401  (_vmap registers the batching rules)
from ._calls import OrchardFallbackWarning, Stats, reset_stats, stats
from ._version import __version__
from .attention import flash_attn
from .dropout import dropout_mask
from .explain import Explanation, explain

_native.load()

__all__ = [
    "Explanation",
    "OrchardFallbackWarning",
    "Stats",
    "__version__",
    "dropout_mask",
    "explain",
    "flash_attn",
    "reset_stats",
    "stats",
]
