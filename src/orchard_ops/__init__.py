"""Exact attention for PyTorch on Apple GPUs: forward and backward, in memory linear in the lengths.

Importing registers the ops ``torch.ops.orchard.*`` and, where the native library is present, their
Metal kernels.
"""

from . import one_copy

one_copy.take_up()

from . import native, ops  # noqa: E402
from ._version import __version__  # noqa: E402
from .attention import flash_attn  # noqa: E402
from .calls import OrchardFallbackWarning, Stats, reset_stats, stats  # noqa: E402
from .dropout import dropout_mask  # noqa: E402
from .explain import Explanation, explain, explain_call  # noqa: E402
from .flash_attention import (  # noqa: E402
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from .flex import flex, flex_attention  # noqa: E402
from .key_ranges import KeyRanges  # noqa: E402
from .kv_cache import flash_attn_with_kvcache  # noqa: E402
from .merge import merge_attentions  # noqa: E402
from .report import Report, ReportedCall, report  # noqa: E402
from .varlen import flash_attn_varlen  # noqa: E402


def register_transformers() -> None:
    """Makes `attn_implementation="orchard"` known to transformers 5: see docs/transformers.md.

    Raises:
        ImportError: transformers is not installed, or is older.
    """
    from .integrations import transformers as door

    door.register()


if native.why_not() is not None:
    native.load(ops.schema.INTERFACE)

from . import takeover  # noqa: E402
from .takeover import disable, enable, sdpa  # noqa: E402

takeover.switch.register_with_pytorch()
one_copy.remember()

__all__ = [
    "Explanation",
    "KeyRanges",
    "OrchardFallbackWarning",
    "Report",
    "ReportedCall",
    "Stats",
    "__version__",
    "disable",
    "dropout_mask",
    "enable",
    "explain",
    "explain_call",
    "flash_attn",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "flex",
    "flex_attention",
    "merge_attentions",
    "register_transformers",
    "report",
    "reset_stats",
    "sdpa",
    "stats",
]
