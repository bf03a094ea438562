"""The plan of native/plan from Python, without torch and without the native library.

Here too the plan decides which variant runs, on which grid, with which parameters. It serves
kernels that run elsewhere (benchmarks/nvidia) and plans that are changed on purpose
(tests/proof/mutation).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import mirror

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "native"))
from build import PLAN_SOURCES  # noqa: E402

_PROBLEM = mirror.Header(ROOT / "native" / "plan" / "problem.h")
_PARAMS = mirror.Header(ROOT / "shaders" / "params.h")
DTYPES = ("float16", "bfloat16", "float32", "bool")
"""In the order of orchard::DType."""
Params = _PARAMS.type("AttentionParams")
"""AttentionParams of shaders/params.h."""
_CACHE = mirror.Header(ROOT / "shaders" / "decode_params.h", _PARAMS)
DecodeParams = _CACHE.type("DecodeParams")
"""DecodeParams of shaders/decode_params.h."""
_Layout = _PROBLEM.type("Layout")
_MaskLayout = _PROBLEM.type("MaskLayout")
_Problem = _PROBLEM.type("Problem")
_FIELDS = [name for name, _ in Params._fields_]
_ENUMERATORS = _PARAMS.enumerators("AttentionBuffer")


def _buffer(enumerator: str) -> str:
    name = enumerator.removeprefix("kBuffer")
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name)[1:]


BUFFERS = tuple(_buffer(name) for name in _ENUMERATORS)
"""What [[buffer(n)]] holds, as in AttentionBuffer: kBufferRowStats is row_stats."""
CACHE_BUFFERS = {_buffer(name): number for name, number in _CACHE.numbers("CacheBuffer").items()}
"""The same of CacheBuffer in shaders/decode_params.h."""

Place = tuple[Sequence[int], Sequence[int], int]
"""Sizes, strides and offset of a tensor (B, H, length, head_dim), in elements."""


@dataclass(frozen=True)
class MaskPlace:
    """orchard::MaskLayout: of (outer, inner, Hq, L, S), in elements, with the mask's dtype."""

    sizes: Sequence[int]
    strides: Sequence[int]
    offset: int
    inner: int
    dtype: int


@dataclass(frozen=True)
class Kernel:
    """orchard::KernelPlan"""

    family: str
    name: str
    instantiation: str
    tile: str
    tile_name: str
    alternatives: list[str]
    groups: tuple[int, int]
    threads: int
    role: int


@dataclass(frozen=True)
class Launch:
    """orchard::KernelLaunch"""

    kernel: int
    groups: tuple[int, int]
    first_head: int
    key_begin: int
    key_end: int

    def set(self, params: ctypes.Structure) -> None:
        """As orchard::KernelLaunch::set."""
        params.first_head = self.first_head
        params.key_begin, params.key_end = self.key_begin, self.key_end


@dataclass(frozen=True)
class Plan:
    """orchard::Plan"""

    refusal: str
    detail: str
    advice: str
    kernels: list[Kernel]
    launches: list[Launch]
    params: ctypes.Structure
    ds_elements: int
    map_elements: int
    dmask_part_elements: int
    hull_elements: int
    dkv_part_elements: int
    forward_part_elements: int


@dataclass(frozen=True)
class CachePlan:
    """orchard::DecodePlan"""

    refusal: str
    detail: str
    advice: str
    kernels: list[Kernel]
    params: ctypes.Structure
    part_rows: int


def compile_planner(
    library: Path, root: Path = ROOT, *flags: str, objects: Path | None = None
) -> None:
    """Compiles the plan of one copy of native/ and shaders/.

    Args:
        objects: A folder of compiled files. Those of the same text are linked as they are; the
            repository's own are added to it.

    Raises:
        subprocess.CalledProcessError: it does not compile; stderr says why.
    """
    offsets = ",".join(f"offsetof(AttentionParams,{name})" for name in _FIELDS)
    command = [
        os.environ.get("CXX", "c++"),
        "-std=c++17",
        "-fPIC",
        *flags,
        f"-I{root}",
        f"-DORCHARD_BUFFERS={','.join(_ENUMERATORS)}",
        f"-DORCHARD_OFFSETS={offsets}",
    ]
    sources = [
        Path(__file__).with_name("bridge.cpp"),
        *(root / source.relative_to(ROOT) for source in PLAN_SOURCES),
    ]
    if objects is None:
        _run([*command, "-shared", *sources, "-o", library])
        return
    headers = [
        *sorted((root / "shaders").glob("*params.h")),
        *sorted((root / "native").rglob("*.h")),
    ]
    shared = b"".join(path.read_bytes() for path in headers)
    with tempfile.TemporaryDirectory() as folder:
        linked = []
        for source in sources:
            name = hashlib.sha256(source.read_bytes() + shared).hexdigest()[:32] + ".o"
            if not (objects / name).exists():
                _run([*command, "-c", source, "-o", f"{folder}/{name}"])
                if root == ROOT:
                    objects.mkdir(parents=True, exist_ok=True)
                    shutil.move(f"{folder}/{name}", objects / name)
            kept = objects / name
            linked.append(kept if kept.exists() else Path(folder, name))
        _run([*command, "-shared", *linked, "-o", library])


def _run(command: Sequence[str | Path]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


class Planner:
    """A library of `compile_planner`."""

    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))
        for name in (
            "new_problem", "plan", "params", "plan_decode", "plan_forward_as_decode", "plan_append",
            "decode_params",
        ):  # fmt: skip
            self._function(name).restype = ctypes.c_void_p
        for name in (
            "bytes_before_tiles",
            "bytes_of_layout",
            "bytes_of_mask_layout",
            "num_kernels",
            "num_launches",
            "head_dims",
            "bytes_of_decode_params",
            "ds_divisions",
        ):
            self._function(name).restype = ctypes.c_uint64
        for name in (
            "ds_elements", "map_elements", "dmask_part_elements", "hull_elements",
            "dkv_part_elements", "part_rows", "forward_part_elements",
        ):  # fmt: skip
            self._function(name).restype = ctypes.c_int64
        self._function("time_of_backward").restype = ctypes.c_double
        self._check_mirrors()

    def _function(self, name: str) -> ctypes._CFuncPtr:  # type: ignore[name-defined]
        return getattr(self._library, f"bridge_{name}")

    def _check_mirrors(self) -> None:
        offsets = (ctypes.c_uint64 * (len(_FIELDS) + 1))()
        self._library.bridge_offsets(offsets)
        mirrored = [getattr(Params, name).offset for name in _FIELDS]
        if list(offsets) != [*mirrored, ctypes.sizeof(Params)]:
            raise RuntimeError("planner: its AttentionParams is not that of shaders/params.h")
        bytes_of = [
            self._function(name)()
            for name in ("bytes_before_tiles", "bytes_of_layout", "bytes_of_mask_layout")
        ]
        if bytes_of != [ctypes.sizeof(x) for x in (_Problem, _Layout, _MaskLayout)]:
            raise RuntimeError("planner: its Problem is not that of native/plan/problem.h")
        if self._function("bytes_of_decode_params")() != ctypes.sizeof(DecodeParams):
            raise RuntimeError("planner: its DecodeParams is not that of shaders/decode_params.h")

    def plan(
        self,
        layouts: Mapping[str, Place],
        dtype: int,
        backward: bool = False,
        tiles: str | bytes = "",
        mask: MaskPlace | None = None,
        **fields: float,
    ) -> Plan:
        """The plan of a forward or a backward.

        Args:
            layouts: of q, k, v, out and, for a backward, dout.
            dtype: a number of orchard::DType.
            mask: where attn_mask lies, if there is one.
            fields: the other fields of orchard::Problem; those left out have its defaults.
        """
        with self._problem(layouts, dtype, tiles, mask, fields) as address:
            out = ctypes.byref(_layout(layouts["out"]))
            dout = ctypes.byref(_layout(layouts["dout"])) if backward else None
            answer = ctypes.c_void_p(self._library.bridge_plan(address, out, dout))
        try:
            return self._read(answer)
        finally:
            self._library.bridge_delete_plan(answer)

    def time_of_backward(
        self,
        layouts: Mapping[str, Place],
        dtype: int,
        stored: bool,
        at_once: tuple[int, int],
        parts: int,
        **fields: float,
    ) -> float:
        """What dk, dv and dq take by the plan's estimate.

        Args:
            stored: whether dS is, rather than computed twice.
            at_once: query heads and keys of a launch.
            parts: of a group's query heads.
        """
        numbers = map(ctypes.c_int64, (*at_once, parts))
        with self._problem(layouts, dtype, "", None, fields) as address:
            return self._library.bridge_time_of_backward(address, stored, *numbers)

    def ds_divisions(
        self, layouts: Mapping[str, Place], dtype: int, **fields: float
    ) -> list[tuple[int, ...]]:
        """orchard::ds_divisions, each in the order of DsDivision's fields."""
        capacity = 256
        numbers = (ctypes.c_int64 * (7 * capacity))()
        with self._problem(layouts, dtype, "", None, fields) as address:
            count = self._library.bridge_ds_divisions(address, numbers, ctypes.c_uint64(capacity))
        assert count <= capacity
        return [tuple(numbers[7 * n : 7 * n + 7]) for n in range(count)]

    @contextmanager
    def _problem(
        self,
        layouts: Mapping[str, Place],
        dtype: int,
        tiles: str | bytes,
        mask: MaskPlace | None,
        fields: Mapping[str, float],
    ) -> Iterator[ctypes.c_void_p]:
        """The address of an orchard::Problem."""
        address = ctypes.c_void_p(self._library.bridge_new_problem())
        try:
            problem = _Problem.from_address(address.value or 0)
            problem.dtype = dtype
            for name in ("q", "k", "v"):
                setattr(problem, name, _layout(layouts[name]))
            if mask is not None:
                fields = {"has_mask": True, "mask_dtype": mask.dtype, **fields}
                problem.mask = _mask_layout(mask)
            for name, value in fields.items():
                if not hasattr(problem, name):
                    raise AttributeError(f"orchard::Problem has no {name}")
                setattr(problem, name, value)
            tiles = tiles.encode() if isinstance(tiles, str) else tiles
            self._library.bridge_set_tiles(address, tiles)
            yield address
        finally:
            self._library.bridge_delete_problem(address)

    def decode(
        self, layouts: Mapping[str, Place], dtype: int, cache: Mapping[str, int], **fields: float
    ) -> CachePlan:
        """The plan of attention to a cache.

        Args:
            layouts: of q, k, v and out.
            cache: paged, pages, page_size, entries, added, table_row, has_lengths, has_starts and
                has_entries, 0 unless given.
            fields: the other fields of orchard::Problem, as `plan` has them.
        """
        numbers = _numbers(cache, _OF_CACHE)
        with self._problem(layouts, dtype, "", None, fields) as address:
            out = ctypes.byref(_layout(layouts["out"]))
            answer = ctypes.c_void_p(self._library.bridge_plan_decode(address, numbers, out))
        try:
            return self._read_cache_plan(answer)
        finally:
            self._library.bridge_delete_plan(answer)

    def forward_as_decode(
        self,
        layouts: Mapping[str, Place],
        dtype: int,
        tiles: str | bytes = "",
        mask: MaskPlace | None = None,
        **fields: float,
    ) -> CachePlan | None:
        """The plan of a forward that no backward follows, where it runs on the decode kernel.

        Args:
            layouts, dtype, tiles, mask, fields: as `plan` has them.
        """
        with self._problem(layouts, dtype, tiles, mask, fields) as address:
            if not self._library.bridge_prefers_decode(address):
                return None
            out = ctypes.byref(_layout(layouts["out"]))
            answer = ctypes.c_void_p(self._library.bridge_plan_forward_as_decode(address, out))
        try:
            return self._read_cache_plan(answer)
        finally:
            self._library.bridge_delete_plan(answer)

    def append(self, added: Place, into: Place, dtype: int, cache: Mapping[str, int]) -> CachePlan:
        """The plan of filling a cache.

        Args:
            cache: paged, pages, offset, table_row, has_lengths and has_entries, 0 unless given.
        """
        numbers = _numbers(cache, _OF_APPEND)
        places = (ctypes.byref(_layout(added)), ctypes.byref(_layout(into)))
        answer = ctypes.c_void_p(self._library.bridge_plan_append(dtype, *places, numbers))
        try:
            return self._read_cache_plan(answer)
        finally:
            self._library.bridge_delete_plan(answer)

    def _read_cache_plan(self, answer: ctypes.c_void_p) -> CachePlan:
        texts = (ctypes.c_char_p * 3)()
        self._library.bridge_texts(answer, texts)
        params = DecodeParams.from_buffer_copy(
            ctypes.string_at(
                self._library.bridge_decode_params(answer), ctypes.sizeof(DecodeParams)
            )
        )
        return CachePlan(
            *(text.decode() for text in texts),
            [self._kernel(answer, n) for n in range(self._library.bridge_num_kernels(answer))],
            params,
            self._library.bridge_part_rows(answer),
        )

    def _read(self, answer: ctypes.c_void_p) -> Plan:
        texts = (ctypes.c_char_p * 3)()
        self._library.bridge_texts(answer, texts)
        params = Params.from_buffer_copy(
            ctypes.string_at(self._library.bridge_params(answer), ctypes.sizeof(Params))
        )
        return Plan(
            *(text.decode() for text in texts),
            [self._kernel(answer, n) for n in range(self._library.bridge_num_kernels(answer))],
            [self._launch(answer, n) for n in range(self._library.bridge_num_launches(answer))],
            params,
            self._library.bridge_ds_elements(answer),
            self._library.bridge_map_elements(answer),
            self._library.bridge_dmask_part_elements(answer),
            self._library.bridge_hull_elements(answer),
            self._library.bridge_dkv_part_elements(answer),
            self._library.bridge_forward_part_elements(answer),
        )

    def _kernel(self, answer: ctypes.c_void_p, n: int) -> Kernel:
        texts, numbers = (ctypes.c_char_p * 6)(), (ctypes.c_uint64 * 4)()
        self._library.bridge_kernel(answer, ctypes.c_uint64(n), texts, numbers)
        *words, alternatives = (text.decode() for text in texts)
        x, y, threads, role = numbers
        listed = alternatives.split(",") if alternatives else []
        return Kernel(*words, listed, (x, y), threads, role)

    def _launch(self, answer: ctypes.c_void_p, n: int) -> Launch:
        numbers = (ctypes.c_int64 * 6)()
        self._library.bridge_launch(answer, ctypes.c_uint64(n), numbers)
        kernel, x, y, *rest = numbers
        return Launch(kernel, (x, y), *rest)

    def strides_in_order_of(self, like: Sequence[int], sizes: Sequence[int]) -> list[int]:
        strides = (ctypes.c_int64 * 4)()
        self._library.bridge_strides_in_order_of(
            (ctypes.c_int64 * 4)(*like), (ctypes.c_int64 * 4)(*sizes), strides
        )
        return list(strides)

    def head_dims(self) -> tuple[int, ...]:
        """The widths that kernels are made in."""
        head_dims = (ctypes.c_int64 * 256)()
        return tuple(head_dims[: self._library.bridge_head_dims(head_dims, ctypes.c_uint64(256))])

    def buffers(self) -> dict[str, int]:
        """The index of each of the BUFFERS."""
        numbers = (ctypes.c_int64 * len(BUFFERS))()
        self._library.bridge_buffers(numbers)
        return dict(zip(BUFFERS, numbers))


_OF_CACHE = (
    "paged", "pages", "page_size", "entries", "added", "table_row", "has_lengths", "has_starts",
    "has_entries",
)  # fmt: skip
_OF_APPEND = ("paged", "pages", "offset", "table_row", "has_lengths", "has_entries")


def _numbers(given: Mapping[str, int], names: Sequence[str]) -> ctypes.Array:
    assert given.keys() <= set(names), given.keys() - set(names)
    return (ctypes.c_int64 * len(names))(*(int(given.get(name, 0)) for name in names))


def _mask_layout(mask: MaskPlace) -> ctypes.Structure:
    five = ctypes.c_int64 * 5
    return _MaskLayout(five(*mask.sizes), five(*mask.strides), mask.offset, mask.inner)


def _layout(place: Place) -> ctypes.Structure:
    sizes, strides, offset = place
    return _Layout((ctypes.c_int64 * 4)(*sizes), (ctypes.c_int64 * 4)(*strides), offset)
