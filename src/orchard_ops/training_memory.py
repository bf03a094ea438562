"""The memory of attention in a training step, as formulas: ours, and that of PyTorch's math path.

A step runs the forward of every layer, keeping what each backward will read, and then the backwards
in turn. Its peak is the moment within the first backward (or within the last forward) at which most
is held. Each term below is one tensor; tests/attention/test_training_memory.py compares the sums
with what the allocator of the simulated device gives out, byte for byte.

* Ours: `native/attention.cpp` allocates out and row_stats in the forward, and sums of its parts
  where it divides keys; delta, dq, dk, dv and the scratch in the backward.
* PyTorch's: `F.scaled_dot_product_attention` runs its math path on mps where an input requires grad
  (`_scaled_dot_product_attention_math`, aten/src/ATen/native/transformers/attention.cpp in torch
  2.13). It computes in float32, scales copies of query and key, repeats key and value for grouped
  heads, and keeps the softmax for the backward. What MPSGraph takes by itself is not counted.
  Below a length of twice head_dim another moment is the peak, which is not counted either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import environment, gpu

_FLOAT32 = 4
_FAR = 1 << 30
"""No length is as large."""
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}
_NOT_STORING_HEAD_DIM = 48
"""Up to this head_dim no backward stores dS."""
_KEY_CHUNK = 64
"""ORCHARD_KEY_CHUNK, keys."""
_PART_QUERIES = 256
_PART_KEYS, _MOST_PARTS, _GROUPS_OF_CORE = 256, 32, 4
"""Of a divided forward, as in native/plan/forward_parts.cpp."""


def scratch_budget_mb(machine: gpu.Gpu | None = None) -> int:
    """ORCHARD_BACKWARD_SCRATCH_MB, or its default.

    Args:
        machine: The GPU whose default it is, unless that of this machine.

    Raises:
        RuntimeError: the variable is no whole number of MiB.
    """
    said = environment.scratch_mb()
    return (machine or gpu.here()).scratch_mb if said is None else said


def score_matrix_bytes(batch: int, num_heads: int, q_len: int, kv_len: int) -> int:
    """The softmax of all scores, (B, Hq, L, S) in float32: what the math path keeps for each
    backward, whatever the dtype of the operands. With dropout it keeps more, which is not counted.
    """
    return _FLOAT32 * batch * num_heads * q_len * kv_len


@dataclass(frozen=True)
class AttentionLayer:
    """Self-attention without dropout: q is (B, Hq, L, D), k and v are (B, Hkv, L, D)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    batch: int = 1
    is_causal: bool = True

    # ---- sizes ----------------------------------------------------------------------------------

    def _of_query(self, length: int, itemsize: int) -> int:
        return self.batch * self.num_heads * length * self.head_dim * itemsize

    def _of_key(self, length: int) -> int:
        return self.batch * self.num_kv_heads * length * self.head_dim * ITEMSIZE[self.dtype]

    def _of_rows(self, length: int, itemsize: int) -> int:
        return self.batch * self.num_heads * length * itemsize

    @property
    def _grouped(self) -> bool:
        return self.num_heads != self.num_kv_heads

    @property
    def _half(self) -> bool:
        return self.dtype != "float32"

    def inputs(self, length: int) -> dict[str, int]:
        """What the backward of any attention needs again, and stock keeps too."""
        key = self._of_key(length)
        return {"q": self._of_query(length, ITEMSIZE[self.dtype]), "k": key, "v": key}

    # ---- ours -----------------------------------------------------------------------------------

    def kept(self, length: int) -> dict[str, int]:
        """What our forward keeps for the backward, beside the inputs."""
        return {
            "out": self._of_query(length, ITEMSIZE[self.dtype]),
            "row_stats": 2 * self._of_rows(length, _FLOAT32),
        }

    def forward_parts(self, length: int, gpu_cores: int) -> int:
        """Sums in float32 of each row and part, D + 2 of them, while a forward runs that has few
        threadgroups and divides the keys between more (native/plan/forward_parts.cpp)."""
        rows = 64 if self.head_dim <= 32 else 32  # of a threadgroup
        groups = self.batch * self.num_heads * -(-length // rows)
        nearest = (2 * _GROUPS_OF_CORE * gpu_cores + groups) // (2 * groups)
        parts = min(nearest, length // _PART_KEYS, _MOST_PARTS)
        return parts * self._of_rows(length, _FLOAT32) * (self.head_dim + 2) if parts > 1 else 0

    def backward(self, length: int) -> dict[str, int]:
        """What our backward holds, beside the inputs, what was kept, and the scratch."""
        return {
            "delta": self._of_rows(length, _FLOAT32),
            "dq": self._of_query(length, ITEMSIZE[self.dtype]),
            "dk": self._of_key(length),
            "dv": self._of_key(length),
        }

    def most_scratch(self, length: int, budget_mb: int) -> int:
        """No backward takes more scratch: dS of all heads in float32, and sums of dk and dv, as far
        as an eighth of the budget allows, or those of one part; together no more than the
        budget."""
        budget, scores = budget_mb << 20, 0
        if self.head_dim > _NOT_STORING_HEAD_DIM:
            scores = self.batch * self.num_heads * self._stored_scores(length) * _FLOAT32
        sums = max(budget // 8, length * 2 * self.head_dim * _FLOAT32)
        return min(scores + min(self._most_sums(length), sums), budget)

    def _stored_scores(self, length: int) -> int:
        """Elements of a head's dS, in tiles of 8 x 8. Under a causal mask half of them are stored,
        in rows that fill whole chunks of keys (native/plan/dscore_scratch.cpp)."""
        whole = -(-length // 8) * 8
        folded = -(-length // (2 * _KEY_CHUNK)) * _KEY_CHUNK * (whole + 8)
        return min(folded, whole * whole) if self.is_causal else whole * whole

    def _most_sums(self, length: int) -> int:
        """Sums of dk and dv in float32 for each part of a group of query heads, where these are
        divided (native/plan/dkv_parts.h): equal parts of at least so many queries."""
        group = self.num_heads // self.num_kv_heads
        most = group * length // _PART_QUERIES
        parts = max((n for n in range(2, group + 1) if group % n == 0 and n <= most), default=0)
        keys = self.batch * self.num_kv_heads * length
        return parts * keys * 2 * self.head_dim * _FLOAT32

    # ---- PyTorch's ------------------------------------------------------------------------------

    def stock_kept(self, length: int) -> dict[str, int]:
        """What the math path keeps for the backward, beside the inputs."""
        copy = self._of_query(length, _FLOAT32)
        return {
            "out": self._of_query(length, ITEMSIZE[self.dtype]),
            "softmax": score_matrix_bytes(self.batch, self.num_heads, length, length),
            "scaled q": copy,
            "scaled k": copy,
            "v in float32, or repeated": copy if self._half or self._grouped else 0,
        }

    def stock_forward(self, length: int) -> dict[str, int]:
        """What the math path holds within the softmax, beside the inputs."""
        scores = score_matrix_bytes(self.batch, self.num_heads, length, length)
        copy = self._of_query(length, _FLOAT32)
        key = self._of_key(length) // ITEMSIZE[self.dtype] * _FLOAT32
        return {
            "scores": scores,
            "softmax": scores,
            "whether a score is -inf": scores // _FLOAT32,
            "whether a row is": self._of_rows(length, 1),
            "causal mask": _FLOAT32 * length * length if self.is_causal else 0,
            "scaled q": copy,
            "scaled k": copy,
            "q, k and v in float32": copy + 2 * key if self._half else 0,
            "repeated k and v": 2 * copy if self._grouped else 0,
            "the number 0": _FLOAT32,
        }

    def stock_backward(self, length: int) -> dict[str, int]:
        """What the math path holds within the softmax's backward, beside the inputs."""
        scores = score_matrix_bytes(self.batch, self.num_heads, length, length)
        copy = self._of_query(length, _FLOAT32)
        return {
            "out": self._of_query(length, ITEMSIZE[self.dtype]),
            "softmax": scores,
            "gradient of the softmax": scores,
            "gradient of the scores": scores,
            "scaled q": copy,
            "scaled k": copy,
            "dv in float32": copy,
        }


@dataclass(frozen=True)
class TrainingStep:
    """All attention of a model in one step."""

    layer: AttentionLayer
    num_layers: int
    checkpoint: bool = False
    """Whether a layer's forward runs again before its backward, so that only the input of a layer
    is kept until then (torch.utils.checkpoint)."""

    def _bytes(self, length: int, kept: int, moment: int) -> int:
        inputs = sum(self.layer.inputs(length).values())
        if self.checkpoint:
            hidden = self.layer.inputs(length)["q"]
            return self.num_layers * hidden + inputs + moment
        return self.num_layers * inputs + (self.num_layers - 1) * kept + moment

    def ours(self, length: int, scratch_mb: int | None = None, gpu_cores: int | None = None) -> int:
        """Bytes at the peak, with the most scratch that the budget allows."""
        budget_mb = scratch_budget_mb() if scratch_mb is None else scratch_mb
        cores = gpu.here().cores if gpu_cores is None else gpu_cores
        kept = sum(self.layer.kept(length).values())
        backward = sum(self.layer.backward(length).values())
        backward += self.layer.most_scratch(length, budget_mb)
        moment = kept + max(backward, self.layer.forward_parts(length, cores))
        return self._bytes(length, kept, moment)

    def stock(self, length: int) -> int:
        """Bytes at the peak on PyTorch's math path."""
        kept = sum(self.layer.stock_kept(length).values())
        moments = self.layer.stock_forward(length), self.layer.stock_backward(length)
        return self._bytes(length, kept, max(sum(moment.values()) for moment in moments))

    def longest(self, num_bytes: int, peak: Callable[[int], int], step: int = 64) -> int:
        """The largest multiple of `step` whose peak, of `ours` or `stock`, is within the bytes; 0
        if none is."""
        low, high = 0, 1
        while high <= _FAR and peak(high * step) <= num_bytes:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if peak(middle * step) <= num_bytes else (low, middle)
        return low * step
