"""Runs the plan and the kernels of one copy of shaders/ and native/, without the native library.

`Sources` is such a copy: the repository's own, or a mutated one. The plan is native/plan behind
benchmarks/planner, kernels go to the Metal engine as the text that would be embedded. Tensors lie
between guard zones of NaN bytes, and gaps between their rows hold NaN as well.
"""

from __future__ import annotations

import hashlib
import importlib.util
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from attention_cases import SEED
from simulator import engine
from torch import Tensor

from benchmarks.planner import BUFFERS as BUFFERS
from benchmarks.planner import CACHE_BUFFERS, CachePlan, Params, Place, Planner, compile_planner
from benchmarks.planner import MaskPlace as MaskPlace

ROOT = Path(__file__).resolve().parents[3]
FORWARD, DELTA, DKV, DKV_PAIRS, DQ, DQ_FROM_DS = FAMILIES = (
    "attention_forward", "attention_backward_delta", "attention_backward_dkv",
    "attention_backward_dkv_pairs",
    "attention_backward_dq", "attention_backward_dq_from_ds",
)  # fmt: skip
(
    MASK_MAP, DSINKS, DMASK, DMASK_FROM_DS, DMASK_ROWS, DMASK_SUM, DMASK_SUM_KEYS, DKV_SUMS,
    FORWARD_MERGE,
) = OTHER_FAMILIES = (
    "attention_mask_map", "attention_backward_dsinks", "attention_backward_dmask",
    "attention_backward_dmask_from_ds", "attention_backward_dmask_rows",
    "attention_backward_dmask_sum", "attention_backward_dmask_sum_keys",
    "attention_backward_dkv_sums", "attention_forward_merge",
)  # fmt: skip
APPEND, DECODE, DECODE_MERGE = CACHE_FAMILIES = (
    "attention_append", "attention_decode", "attention_decode_merge",
)  # fmt: skip
DTYPE_NUMBERS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
BOOL = 3  # of a mask
MAP_BLOCK = 32  # ORCHARD_MAP_BLOCK of params.h
MAP_RUN = 8  # ORCHARD_MAP_RUN of flex_params.h
GUARD_BYTES = 4096
OBJECTS = ROOT / "build" / "mutation" / "objects"  # of the repository's plan


# ---- tensors


class Guarded:
    """A tensor in the middle of NaN: in front, behind, and in the gaps of its strides."""

    def __init__(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype,
                 offset: int = 0):  # fmt: skip
        bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
        guard = GUARD_BYTES // dtype.itemsize
        self.extent = sum((n - 1) * s for n, s in zip(shape, strides)) + 1
        storage = torch.full((2 * guard + offset + self.extent,), -1, dtype=bits)
        place = (tuple(shape), tuple(strides), guard + offset)
        self.bits = storage.as_strided(*place)
        self.tensor = storage.view(dtype).as_strided(*place)
        self.offset = offset
        self._storage = storage

    @classmethod
    def like(cls, x: Tensor, layout: str) -> Guarded:
        """x copied into one of the LAYOUTS."""
        self = cls(x.shape, *_strides_and_dtype(x, layout))
        self.tensor.copy_(x)
        return self

    def buffer(self, writable: bool) -> engine.Buffer:
        return engine.Buffer(
            self.tensor.data_ptr(), self.extent * self.tensor.element_size(), writable
        )

    def assert_untouched(self, name: str, before: Tensor | None) -> None:
        """All bytes as `before`; without it, all bytes outside of the tensor are still NaN's."""
        if before is not None:
            assert torch.equal(self._storage, before), f"{name} was written"
            return
        rest = self._storage.clone()
        rest.as_strided(self.bits.shape, self.bits.stride(), self.bits.storage_offset()).fill_(-1)
        assert bool((rest == -1).all()), f"{name} was written outside of its elements"

    def snapshot(self) -> Tensor:
        return self._storage.clone()


LAYOUTS = ("dense", "padded", "blhd", "columns", "odd", "rows_odd")


def _strides_and_dtype(x: Tensor, layout: str) -> tuple[tuple[int, ...], torch.dtype, int]:
    _, h, n, d = x.shape
    chunk = 16 // x.element_size()
    wide = -(-d // chunk) * chunk + chunk  # rows with a gap of at least a chunk, aligned
    strides, offset = {
        "dense": ((h * n * d, n * d, d, 1), 0),
        "padded": ((h * (n + 2) * wide + chunk, (n + 2) * wide, wide, 1), chunk),
        "blhd": ((h * n * wide, wide, h * wide, 1), 0),
        "columns": ((h * n * d + 5, n * d, 1, n), 0),
        "odd": ((h * n * wide, n * wide, wide, 1), 1),
        "rows_odd": ((h * n * (wide + 1), n * (wide + 1), wide + 1, 1), 0),
    }[layout]
    return strides, x.dtype, offset


# ---- sources


@dataclass
class Sources:
    """A folder that holds shaders/ and native/. Its plan is compiled unless one is given."""

    root: Path = ROOT
    plan_of: Sources | None = None
    #: A digest of all that a killer has been given so far: plans, and the code of kernels.
    observed: str = field(default="", init=False)

    def observe(self, *facts: object) -> None:
        self.observed = hashlib.sha256(repr((self.observed, facts)).encode()).hexdigest()[:16]

    def text(self, family: str) -> str:
        """The family's Metal text as native/embed_shaders.py makes it."""
        if family in self._embed.FLEX_FAMILIES:
            return self._embed.flatten_flex(self._embed.FLEX_FAMILIES[family]) + "\n"
        headers = {**self._embed.FAMILIES, **self._embed.CACHE_FAMILIES}
        return self._embed.flatten(headers[family]) + "\n"

    @cached_property
    def _embed(self) -> ModuleType:
        """native/embed_shaders.py of this copy."""
        path = self.root / "native" / "embed_shaders.py"
        spec = importlib.util.spec_from_file_location("embed_shaders", path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def compile_plan(self) -> Sources:
        """Does now what the first use of the plan would do."""
        assert self._planner is not None
        return self

    @cached_property
    def _planner(self) -> Planner:
        if self.plan_of is not None:
            return self.plan_of._planner
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "plan.so")
            try:
                compile_planner(output, self.root, "-O0", "-w", objects=OBJECTS)
            except subprocess.CalledProcessError as error:
                raise engine.CompileError(error.stderr) from None
            return Planner(output)

    @cached_property
    def buffers(self) -> dict[str, int]:
        return self._planner.buffers() | CACHE_BUFFERS

    def head_dims(self) -> tuple[int, ...]:
        dims = self._planner.head_dims()
        self.observe(dims)
        return dims

    def strides_in_order_of(self, like: Sequence[int], sizes: Sequence[int]) -> list[int]:
        strides = self._planner.strides_in_order_of(like, sizes)
        self.observe(strides)
        return strides

    def ds_divisions(self, request: Request) -> list[tuple[int, ...]]:
        layouts, dtype, _ = request.problem
        found = self._planner.ds_divisions(layouts, dtype, **request.fields)
        self.observe(found)
        return found

    def time_of_backward(
        self, request: Request, stored: bool, at_once: tuple[int, int], parts: int
    ) -> float:
        layouts, dtype, _ = request.problem
        time = self._planner.time_of_backward(
            layouts, dtype, stored, at_once, parts, **request.fields
        )
        self.observe(time)
        return time

    def decode(
        self, layouts: dict[str, Place], dtype: int, cache: dict[str, int], **fields: float
    ) -> CachePlan:
        return self._observed(self._planner.decode(layouts, dtype, cache, **fields))

    def forward_as_decode(
        self, layouts: dict[str, Place], dtype: int, **fields: Any
    ) -> CachePlan | None:
        plan = self._planner.forward_as_decode(layouts, dtype, **fields)
        if plan is None:
            self.observe(plan)
            return None
        return self._observed(plan)

    def append(self, added: Place, into: Place, dtype: int, cache: dict[str, int]) -> CachePlan:
        return self._observed(self._planner.append(added, into, dtype, cache))

    def _observed(self, plan: CachePlan) -> CachePlan:
        facts = vars(plan) | {"params": bytes(plan.params)}
        self.observe(facts, self.buffers)
        return plan

    def plan(self, request: Request) -> tuple[dict, Params]:
        """The plan as dictionaries and lists, and its params."""
        plan = self._planner.plan(*request.problem, **request.fields)
        facts = {
            "refusal": plan.refusal, "detail": plan.detail, "advice": plan.advice,
            "kernels": [vars(kernel) | {"groups": list(kernel.groups)} for kernel in plan.kernels],
            "launches": [
                [x.kernel, *x.groups, x.first_head, x.key_begin, x.key_end]
                for x in plan.launches
            ],
            "scratch_bytes": 4 * plan.ds_elements,
            "dkv_part_elements": plan.dkv_part_elements,
            "map_elements": plan.map_elements, "hull_elements": plan.hull_elements,
            "dmask_part_elements": plan.dmask_part_elements,
            "forward_part_elements": plan.forward_part_elements,
        }  # fmt: skip
        self.observe(facts, bytes(plan.params), self.buffers)
        return facts, plan.params


class Request(NamedTuple):
    """What `Sources.plan` is asked for."""

    problem: tuple[dict[str, Place], int, bool]
    fields: dict[str, Any]


def request(layouts: dict[str, Place], dtype: int, backward: bool = False,
            **fields: object) -> Request:  # fmt: skip
    """A request for Sources.plan; layouts are (sizes, strides, offset) of q, k, v, out and dout."""
    return Request((layouts, dtype, backward), fields)


def place(x: Guarded) -> tuple[Sequence[int], Sequence[int], int]:
    return x.tensor.shape, x.tensor.stride(), x.offset


# ---- launches


def with_seed(params: Params, **fields: object) -> bytes:
    """What the host adds to the plan's params before a launch."""
    params.dropout_seed[:] = struct.unpack("<2I", struct.pack("<Q", SEED))
    for name, value in fields.items():
        if isinstance(value, tuple):
            getattr(params, name)[:] = value
        else:
            setattr(params, name, value)
    return bytes(params)


def launch(
    library: engine.Library, kernel: dict, numbers: dict[str, int], params: bytes,
    inputs: dict[str, Guarded], outputs: dict[str, Guarded], **options: Any,
) -> engine.Counters:  # fmt: skip
    """One dispatch; fails if anything but the outputs' elements was written."""
    before = {name: x.snapshot() for name, x in inputs.items()}
    block = torch.frombuffer(bytearray(params), dtype=torch.uint8).clone()  # 64-byte aligned
    buffers = {numbers["params"]: engine.Buffer(block.data_ptr(), len(params), False)}
    for name, x in inputs.items():
        buffers[numbers[name]] = x.buffer(False)
    for name, x in outputs.items():
        buffers[numbers[name]] = x.buffer(True)
    groups, threads = kernel["groups"], kernel["threads"]
    grid = (groups[0] * threads, groups[1], 1)
    counters = library.launch(kernel["name"], grid, (threads, 1, 1), buffers, **options)
    for name, x in inputs.items():
        x.assert_untouched(name, before[name])
    for name, x in outputs.items():
        x.assert_untouched(name, None)
    return counters
