"""The one list of the arguments, besides q, k and v, that decide the scores and their weights.

The schemas, the fake kernels, vmap, the reference, the tests and the command line read them by name
from `Scoring`; ``native/scoring.h`` has the same list for C++, and a test compares the two.
"""

import math
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from .key_ranges import check_ranges

NO_BACKWARD = -1
"""A key_span: no backward follows the forward."""
MAX_DIAGONAL = 1 << 40
"""This is far beyond any length, and sums with it are far from overflowing int64."""
_FLOAT32 = torch.finfo(torch.float32)
SymInt = Annotated[int, "SymInt"]
"""An integer that may vary from call to call in one compiled graph."""


class Scoring(NamedTuple):
    """The scoring arguments of ``orchard::flash_attn_fwd``, in the order of its schema.

    The weights of a row are softmax(softcap(scale * q @ k^T) - alibi + attn_mask) over the keys
    that windows and key ranges leave, with the sink as one more logit, and dropout on the weights.
    """

    attn_mask: Tensor | None = None
    """Broadcastable to (B, Hq, L, S); bool: True takes part; floating point: added.

    With five dimensions it is (outer, inner, Hq, L, S), where outer or inner is 1. The batch is
    then seen as (outer, inner), and the mask broadcasts over the dimension that is 1. So a mask
    that repeats within the batch need not be copied."""
    alibi_slopes: Tensor | None = None
    """(Hq) or (B, Hq); -slope * |i + diagonal - j| is added."""
    sinks: Tensor | None = None
    """(Hq): a logit that takes probability and has no value."""
    dropout_seed: Tensor | None = None
    """0-dim int64 on the cpu."""
    dropout_p: float = 0.0
    scale: float = 1.0
    window_left: int = -1
    """Query i sees keys from i + diagonal - window_left on; -1 is open."""
    window_right: int = -1
    """Query i sees keys up to i + diagonal + window_right; -1 is open."""
    diagonal: SymInt = 0
    """The index of the key at which query 0 stands."""
    softcap: float = 0.0
    """c > 0 replaces a score s by c * tanh(s / c)."""
    key_span: int = 0
    """The keys that any 8 queries in a row see lie within so many, by key_ranges and windows; 0 is
    not known. It decides how much memory a backward takes, never a result: queries for which it
    does not hold cost more. NO_BACKWARD lets the forward run on kernels whose numbers a backward
    would have to round again in another way."""
    key_ranges: Tensor | None = None
    """int32 (1 or B, 1 or Hq, L, 4): a query's (begin, end, position, prefix), see `KeyRanges`.

    The position takes the place of i + diagonal in windows and ALiBi."""

    @property
    def plain(self) -> bool:
        """Whether a logit is a scaled dot product and nothing else.

        Windows and dropout do not change a logit.
        """
        return (
            self.attn_mask is None
            and self.alibi_slopes is None
            and self.sinks is None
            and self.softcap == 0.0
        )

    @property
    def unit(self) -> float:
        """The factor that makes the logarithms in ``row_stats`` natural ones.

        Where all logits are plain, the kernels take powers of two, and ``row_stats`` holds
        logarithms to the base 2: the factor is ln(2). Elsewhere they take powers of e: a finite
        mask times log2(e) could overflow, and a large sink would lose digits on its way to powers
        of two and back.
        """
        return math.log(2.0) if self.plain else 1.0

    def mask_batch(self, batch: int) -> tuple[int, ...]:
        """The batch dimensions as the mask counts them: (batch,) or (outer, inner)."""
        mask = self.attn_mask
        if mask is None or mask.dim() != 5:
            return (batch,)
        outer, inner = mask.shape[:2]
        return (batch // inner, inner) if outer == 1 else (outer, batch // outer)

    def check(self, op: str, query: Tensor, key: Tensor) -> None:
        """Raises for arguments that are wrong with 4-D q and k that `check_problem` accepts."""
        self._check_dropout(op)
        if not abs(self.scale) <= _FLOAT32.max:
            raise ValueError(f"{op}: scale must be finite in float32; got {self.scale}")
        if self.softcap != 0.0 and not _FLOAT32.tiny <= self.softcap <= _FLOAT32.max:
            raise ValueError(
                f"{op}: softcap must be 0 (none) or positive and finite in float32; "
                f"got {self.softcap}"
            )
        for name, window in (
            ("window_left", self.window_left),
            ("window_right", self.window_right),
        ):
            if window < -1:
                raise ValueError(f"{op}: {name} must be -1 (open) or at least 0; got {window}")
        if self.key_span < NO_BACKWARD:
            raise ValueError(
                f"{op}: key_span must be 0 (not known) or more, or -1 where no backward follows; "
                f"got {self.key_span}"
            )
        if abs(self.diagonal) > MAX_DIAGONAL:
            raise ValueError(f"{op}: diagonal must be within +-2^40; got {self.diagonal}")
        if self.attn_mask is not None:
            self._check_mask(op, query, key)
        if self.key_ranges is not None:
            self._check_key_ranges(op, query)
        self._check_per_head(op, query)

    def _check_dropout(self, op: str) -> None:
        seed = self.dropout_seed
        if not 0.0 <= self.dropout_p < 1.0:
            raise ValueError(f"{op}: dropout_p must be in [0, 1); got {self.dropout_p}")
        if self.dropout_p == 0.0:
            return
        if seed is None:
            raise ValueError(
                f"{op}: dropout_p above 0 needs a dropout_seed; got dropout_p {self.dropout_p} and "
                "dropout_seed None: pass a 0-dim int64 cpu tensor"
            )
        on_host = seed.device.type in ("cpu", "meta")
        if seed.dim() != 0 or seed.dtype != torch.int64 or not on_host:
            raise ValueError(
                f"{op}: dropout_seed must be a 0-dim int64 cpu tensor; got shape "
                f"{tuple(seed.shape)}, {seed.dtype} on {seed.device}"
            )

    def _check_mask(self, op: str, query: Tensor, key: Tensor) -> None:
        mask = self.attn_mask
        assert mask is not None
        if mask.device != query.device:
            raise ValueError(
                f"{op}: attn_mask must be on query's device {query.device}; got {mask.device}"
            )
        if mask.dtype not in (torch.bool, torch.float32, query.dtype):
            raise TypeError(
                f"{op}: attn_mask must be bool, float32 or query's {query.dtype}; got {mask.dtype}"
            )
        # Each length is compared with the full one before it is compared with 1: torch.export
        # cannot decide whether an unknown length is 1.
        full = (*query.shape[:3], key.shape[2])
        batches, repeats = mask.shape[: mask.dim() - 3], True
        if mask.dim() == 5:
            repeats = 1 in batches and 0 not in batches and full[0] % math.prod(batches) == 0
            batches = torch.Size((1,))
        shape = (*batches, *mask.shape[-3:])
        fits = len(shape) == 4 and all(m == f or m == 1 for m, f in zip(shape, full))
        if not (fits and repeats):
            raise ValueError(
                f"{op}: attn_mask must broadcast to {full}; got shape {tuple(mask.shape)}"
            )

    def _check_key_ranges(self, op: str, query: Tensor) -> None:
        ranges = self.key_ranges
        assert ranges is not None
        check_ranges(op, "key_ranges", ranges)
        if ranges.device != query.device:
            raise ValueError(
                f"{op}: key_ranges must be on query's device {query.device}; got {ranges.device}"
            )
        batch, num_heads, q_len = query.shape[:3]
        if not (
            (ranges.shape[0] == batch or ranges.shape[0] == 1)
            and (ranges.shape[1] == num_heads or ranges.shape[1] == 1)
            and ranges.shape[2] == q_len
        ):
            raise ValueError(
                f"{op}: key_ranges must have shape (1 or {batch}, 1 or {num_heads}, {q_len}, 4): "
                f"batch, heads, queries; got shape {tuple(ranges.shape)}"
            )
        if self.diagonal != 0:
            raise ValueError(
                f"{op}: diagonal must be 0 with key_ranges, whose positions say where queries "
                f"stand; got {self.diagonal}: add it to the positions"
            )

    def _check_per_head(self, op: str, query: Tensor) -> None:
        batch, num_heads = query.shape[:2]
        slopes, sinks = self.alibi_slopes, self.sinks
        # Not `in`: dynamo compares sizes that may vary by identity there.
        if slopes is not None and not (
            tuple(slopes.shape) == (num_heads,) or tuple(slopes.shape) == (batch, num_heads)
        ):
            raise ValueError(
                f"{op}: alibi_slopes must have shape ({num_heads},) or ({batch}, {num_heads}); "
                f"got {tuple(slopes.shape)}"
            )
        if sinks is not None and tuple(sinks.shape) != (num_heads,):
            raise ValueError(
                f"{op}: sinks must have shape ({num_heads},); got {tuple(sinks.shape)}"
            )
        for name, x in (("alibi_slopes", slopes), ("sinks", sinks)):
            if x is not None and x.device != query.device:
                raise ValueError(
                    f"{op}: {name} must be on query's device {query.device}; got {x.device}"
                )
            if x is not None and not x.dtype.is_floating_point:
                raise TypeError(f"{op}: {name} must be a floating point tensor; got {x.dtype}")


_SCHEMA_TYPES = {
    Tensor | None: "Tensor?",
    float: "float",
    int: "int",
    SymInt: "SymInt",
}
_KINDS = {name: _SCHEMA_TYPES[kind] for name, kind in Scoring.__annotations__.items()}

SCHEMA = ", ".join(f"{kind} {name}" for name, kind in _KINDS.items())
"""The arguments as they stand in the schema of every functional op."""
TENSORS = tuple(name for name, kind in _KINDS.items() if kind == "Tensor?")
"""The names of the arguments that may be tensors."""
