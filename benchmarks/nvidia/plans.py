"""The plans of native/plan for tensors, through the library that build.py makes of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import planner
from benchmarks.planner import Params

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


ScoreFunctions = Callable[[Tensor, int, int], tuple[Tensor, Tensor | None]]
"""Of scaled products (B, Hq, rows, S) and the rows' first and end: scores, and derivatives."""


MULTIPROCESSORS = 132
"""Of an H100 and an H200: what plans take for the cores of the GPU where they are timed."""


@dataclass(frozen=True)
class Scoring:
    """What decides the scores besides the operands; as in orchard::flash_attn_fwd."""

    scale: float
    dropout_p: float = 0.0
    dropout_seed: int = 0
    window_left: int = -1
    window_right: int = -1
    diagonal: int = 0
    scratch_bytes: int = 256 << 20  # for dS; 0 is the low-memory mode
    stores_ds: bool = False  # wherever a buffer for it fits, also where that should take longer
    gpu_cores: int = 8
    tiles: str = ""  # instead of the plan's: "family=tile,..."
    softcap: float = 0.0
    mask_grad: bool = False
    mask: Tensor | None = None  # (B, Hq, L, S), of size 1 where it is the same for all
    alibi_slopes: Tensor | None = None  # (B, Hq)
    sinks: Tensor | None = None
    key_ranges: Tensor | None = None  # int32 (1 or B, 1 or Hq, L, 4), dense
    functions: ScoreFunctions | None = None  # for the reference alone

    @property
    def plain(self) -> bool:
        """As Scoring.plain of the package."""
        tensors = (self.mask, self.alibi_slopes, self.sinks)
        return self.softcap == 0.0 and all(x is None for x in tensors)

    def fields(self) -> dict[str, Any]:
        """What orchard::Problem has of it."""
        numbers = ("scale", "dropout_p", "window_left", "window_right", "diagonal")
        found: dict[str, Any] = {name: getattr(self, name) for name in numbers}
        found |= {name: getattr(self, name) for name in ("scratch_bytes", "gpu_cores")}
        found |= {name: getattr(self, name) for name in ("stores_ds", "tiles", "softcap")}
        found |= {"mask_grad": self.mask_grad, "has_sinks": self.sinks is not None}
        if self.alibi_slopes is not None:
            batch, head = self.alibi_slopes.stride()
            found |= {"has_alibi": True, "alibi_batch": batch, "alibi_head": head}
        if self.key_ranges is not None:
            batch, head = (
                stride if size > 1 else 0
                for size, stride in zip(self.key_ranges.shape, self.key_ranges.stride()[:2])
            )
            found |= {"has_key_ranges": True, "ranges_batch": batch, "ranges_head": head}
        if self.mask is not None:
            (b, *sizes), (batch, *strides) = self.mask.shape, self.mask.stride()
            dtype = planner.DTYPES.index(str(self.mask.dtype).removeprefix("torch."))
            found["mask"] = planner.MaskPlace(
                (b, 1, *sizes), (batch, 0, *strides), int(self.mask.storage_offset()), 1, dtype
            )
        return found


@dataclass(frozen=True)
class Kernel:
    """A kernel of the plan in one of its launches"""

    family: str
    name: str
    instantiation: str
    groups: tuple[int, int]
    threads: int
    launch: planner.Launch

    def set(self, params: Params) -> None:
        """What the launch sets in the params."""
        self.launch.set(params)


@dataclass(frozen=True)
class Plan:
    """Kernels in the order of their launches"""

    kernels: list[Kernel]
    params: Params
    ds_elements: int
    map_elements: int = 0
    dmask_part_elements: int = 0
    hull_elements: int = 0
    dkv_part_elements: int = 0
    forward_part_elements: int = 0


class Planner:
    def __init__(self, library: Path):
        self._planner = planner.Planner(library)
        short = {"query": "q", "key": "k", "value": "v"}
        self.buffers = {short.get(n, n): index for n, index in self._planner.buffers().items()}
        """The index of each kernel argument."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scoring: Scoring) -> Plan:
        return self._plan((q, k, v, out), scoring)

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, scoring: Scoring
    ) -> Plan:
        return self._plan((q, k, v, out, dout), scoring)

    def _plan(self, tensors: Sequence[Tensor], scoring: Scoring) -> Plan:
        names = ("q", "k", "v", "out", "dout")[: len(tensors)]
        layouts = {
            name: (tuple(x.shape), x.stride(), int(x.storage_offset()))
            for name, x in zip(names, tensors)
        }
        dtype = planner.DTYPES.index(str(tensors[0].dtype).removeprefix("torch."))
        plan = self._planner.plan(layouts, dtype, "dout" in names, **scoring.fields())
        if plan.refusal:
            raise ValueError(f"the plan refuses: {plan.refusal} ({plan.detail})")
        kernels = []
        for launch in plan.launches:
            kernel = plan.kernels[launch.kernel]
            kernels.append(
                Kernel(
                    kernel.family,
                    kernel.name,
                    kernel.instantiation,
                    launch.groups,
                    kernel.threads,
                    launch,
                )
            )
        return Plan(
            kernels,
            plan.params,
            plan.ds_elements,
            plan.map_elements,
            plan.dmask_part_elements,
            plan.hull_elements,
            plan.dkv_part_elements,
            plan.forward_part_elements,
        )


def set_strides(params: Params, name: str, x: Tensor) -> None:
    getattr(params, name)[:] = x.stride()


def every_variant(planner: Planner) -> dict[str, Kernel]:
    """Every kernel that the plan can name, by name."""
    variants = {}
    for dtype in _DTYPES:
        for head_dim in range(1, 257):
            for alignment in (8, 1):
                # Rows of whole 16-byte chunks, or rows that are not.
                row = -(-head_dim // alignment) * alignment + (alignment == 1)
                x = torch.empty_strided(
                    (1, 1, 1, head_dim), (row, row, row, 1), dtype=dtype, device="meta"
                )
                keys = x.expand(1, 1, 512, head_dim)  # more than one threadgroup has
                for dropout_p, scratch_bytes in itertools.product((0.0, 0.5), (0, 1 << 20)):
                    scoring = Scoring(
                        1.0, dropout_p, scratch_bytes=scratch_bytes, stores_ds=scratch_bytes > 0
                    )
                    forward = planner.forward(x, x, x, x, scoring).kernels
                    forward += planner.forward(x, keys, keys, x, scoring).kernels
                    backward = planner.backward(x, x, x, x, x, scoring).kernels
                    variants |= {kernel.name: kernel for kernel in [*forward, *backward]}
    return variants
