"""The plans of attention whose scores are functions, as native/flex_plan.cpp makes them of ordinary
plans, from Python and without torch's mps device. tests/proof/test_nvidia_flex.py compares the two.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from benchmarks import planner
from benchmarks.planner import Kernel, MaskPlace, Params, Place, Plan

MOST_CAPTURES, CAPTURE_DIMS, FIRST_CAPTURE = 8, 4, 23  # shaders/flex_params.h
MAP_BLOCK = 32  # ORCHARD_MAP_BLOCK
_MAP_RUN = 8  # ORCHARD_MAP_RUN
_MAX_LENGTH = 1 << 28
_SIMDGROUPS = 4
_FORMING = ("attention_forward", "attention_backward_dkv", "attention_backward_dkv_pairs",
            "attention_backward_dq")  # fmt: skip
_MASKED, _MAP, _PLAIN = (
    "Score<false, false, Mask<uchar, false>>",
    "Mask<uchar, false>",
    "PlainScore",
)


class CaptureShape(ctypes.Structure):
    _fields_ = [
        ("sizes", ctypes.c_int32 * CAPTURE_DIMS),
        ("strides", ctypes.c_int32 * CAPTURE_DIMS),
    ]


class BlockStateParams(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "head", "row")),
        *(
            (name, ctypes.c_int32)
            for name in ("block_q", "block_kv", "rows", "cols", "given", "whole")
        ),
    ]


class FlexParams(ctypes.Structure):
    """FlexParams of shaders/flex_params.h"""

    _fields_ = [
        ("attention", Params),
        ("captures", CaptureShape * MOST_CAPTURES),
        ("states", BlockStateParams),
    ]


@dataclass(frozen=True)
class Mods:
    """The functions of a call as Metal text, and what they read."""

    score: str = ""
    mask: str = ""
    captures: tuple[Tensor, ...] = ()
    states: Tensor | None = None  # uint8 (1 or B, 1 or Hq, blocks of queries, blocks of keys)
    block_q: int = 128
    block_kv: int = 128

    @property
    def has_map(self) -> bool:
        return self.states is not None or bool(self.mask)

    def names(self, argument: str) -> bool:
        """Whether what mask_mod says may differ by this index."""
        return bool(self.mask) and len(re.findall(rf"\b{argument}\b", self.mask)) != 1

    def params(self, of_plan: Params) -> FlexParams:
        params = FlexParams(attention=of_plan)
        for shape, x in zip(params.captures, self.captures):
            rest = CAPTURE_DIMS - x.dim()
            shape.sizes[:] = (*x.shape, *(1,) * rest)
            shape.strides[:] = (*x.stride(), *(0,) * rest)
        own = params.states
        own.whole = 1
        if self.states is not None:
            batches, heads, own.rows, own.cols = self.states.shape
            own.block_q, own.block_kv = (min(n, _MAX_LENGTH) for n in (self.block_q, self.block_kv))
            own.row = own.cols
            own.head = own.rows * own.cols * (heads > 1)
            own.batch = own.rows * own.cols * heads * (batches > 1)
            own.given = 1
            own.whole = own.block_q % MAP_BLOCK == own.block_kv % MAP_BLOCK == 0
        return params


class FlexPlanner:
    """Plans for tensors, through a library of build.py."""

    def __init__(self, library: Path):
        self.library = library
        self._planner = planner.Planner(library)
        self.buffers = {**self._planner.buffers()}
        for n in range(MOST_CAPTURES):
            self.buffers[f"capture{n}"] = FIRST_CAPTURE + n
        """The index of each kernel argument."""

    def plan(
        self,
        mods: Mods,
        scale: float,
        scratch_bytes: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        dout: Tensor | None = None,
    ) -> Plan:
        """Of a forward, or with dout of a backward."""
        given = {"q": q, "k": k, "v": v, "out": out, "dout": dout}
        layouts = {name: _place(x) for name, x in given.items() if x is not None}
        mask = None
        if mods.has_map:
            shared = [mods.states is None or mods.states.shape[d] == 1 for d in (0, 1)]
            batches = 1 if shared[0] and not mods.names("b") else q.shape[0]
            heads = 1 if shared[1] and not mods.names("h") else q.shape[1]
            sizes = (batches, 1, heads, q.shape[2], k.shape[2])
            mask = MaskPlace(sizes, (1,) * 5, 1, 1, planner.DTYPES.index("bool"))
        dtype = planner.DTYPES.index(str(q.dtype).removeprefix("torch."))
        plan = self._planner.plan(
            layouts, dtype, dout is not None, mask=mask, scale=scale, scratch_bytes=scratch_bytes
        )
        if plan.refusal:
            raise ValueError(f"the plan refuses: {plan.refusal} ({plan.detail})")
        if not mods.has_map and not mods.score:
            return plan
        plan = replace(plan, kernels=[with_mods(kernel, mods) for kernel in plan.kernels])
        return with_map_divided(plan)


def with_mods(kernel: Kernel, mods: Mods) -> Kernel:
    """What an ordinary kernel becomes."""
    text = "\n".join((mods.score, mods.mask, str(int(mods.has_map))))
    name = f"{_hash(text) >> 16:012x}"
    mask_mod = "MaskMod" if mods.mask else "NoMaskMod"
    if kernel.family == "attention_mask_map":
        family = "attention_flex_map"
        call = f"{family}<{mask_mod}, {_SIMDGROUPS}>"
        instantiation = (
            f'{mods.mask}\ntemplate [[host_name("{family}_{name}")]] [[kernel]] '
            f"decltype({call}) {call};\n"
        )
        return replace(kernel, family=family, name=f"{family}_{name}", instantiation=instantiation)
    if kernel.family not in _FORMING:
        return kernel
    own = f"{kernel.name.replace('_mask_bool', '') if mods.has_map else kernel.name}_flex_{name}"
    score = "FlexScore<{}, {}, {}>".format(
        "ScoreMod" if mods.score else "NoScoreMod", mask_mod, _MAP if mods.has_map else "NoMask"
    )
    ordinary = _MASKED if mods.has_map else _PLAIN
    line = kernel.instantiation.replace(kernel.name, own).replace(ordinary, score)
    if line.count(score) != 2:
        raise ValueError(f"{kernel.name}: its type is not named twice: {kernel.instantiation}")
    instantiation = f"{mods.score}\n{mods.mask}\n{line}"
    return replace(kernel, family=f"{kernel.family}_flex", name=own, instantiation=instantiation)


def with_map_divided(plan: Plan) -> Plan:
    """The map's kernel with its own threadgroups: a simdgroup takes _MAP_RUN blocks of a row."""
    rows, cols = (-(-n // MAP_BLOCK) for n in (plan.params.q_len, plan.params.kv_len))
    groups = rows * -(-cols // (_SIMDGROUPS * _MAP_RUN))
    kernels, launches = list(plan.kernels), list(plan.launches)
    for n, launch in enumerate(launches):
        kernel = kernels[launch.kernel]
        if kernel.family == "attention_flex_map":
            own = (kernel.groups[0], groups)
            tile = (
                f"blocks of {MAP_BLOCK} queries and keys of the mask; {own[0]} x {own[1]} "
                f"threadgroups of {kernel.threads} threads"
            )
            kernels[launch.kernel] = replace(kernel, groups=own, tile=tile)
            launches[n] = replace(launch, groups=own)
    return replace(plan, kernels=kernels, launches=launches)


def _hash(text: str) -> int:
    """FNV-1a"""
    found = 0xCBF29CE484222325
    for byte in text.encode():
        found = (found ^ byte) * 0x100000001B3 % 2**64
    return found


def _place(x: Tensor) -> Place:
    return (tuple(x.shape), x.stride(), int(x.storage_offset()))
