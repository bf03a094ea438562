"""What the native plan says about a call, as Python values."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import native
from .namespace import OPS


class Kernel(NamedTuple):
    """One kernel variant that a call would run."""

    family: str
    name: str
    instantiation: str
    """The line of Metal that makes the variant."""
    tile: str
    """Tile and grid in words."""
    tile_name: str
    """The tile as it stands in `name`, and for the forward in ORCHARD_TILES."""
    alternatives: tuple[str, ...]
    """Tiles that ORCHARD_TILES may name here."""


class Plan(NamedTuple):
    """Which kernels a forward and its backward would run, or why Metal cannot run the call."""

    refusal: str
    """The reason why Metal cannot run the call, or an empty text. It does not depend on the values
    of the call."""
    detail: str
    """The values of this call that the refusal is about; may be empty."""
    advice: str
    kernels: tuple[Kernel, ...]
    launches: tuple[tuple[int, ...], ...]
    """The launches in order, each as its kernel, threadgroups in x and y, first query head,
    first key and end of keys."""
    scratch_bytes: int

    @property
    def why_not(self) -> str:
        """The refusal with its detail; empty if the call runs."""
        return f"{self.refusal} ({self.detail})" if self.detail else self.refusal


_NUMBERS_OF_LAUNCH = 6
WIDEST_HEAD_DIM = 256
"""No kernel takes wider heads. A test compares it with the library, which may be missing."""


def head_dims() -> tuple[int, ...]:
    """The widths that kernels are made in; empty without the native library."""
    return () if native.why_not() else tuple(OPS.kernel_head_dims())


def plan(*arguments: Any) -> Plan:
    """The native plan for the arguments of ``orchard::flash_attn_fwd``. Runs nothing."""
    return _read(OPS.flash_attn_plan(*arguments))


def decode_plan(*arguments: Any) -> Plan:
    """The same for those of ``orchard::flash_attn_decode``."""
    return _read(OPS.flash_attn_decode_plan(*arguments))


def append_plan(*arguments: Any) -> Plan:
    """The same for those of ``orchard::flash_attn_append``."""
    return _read(OPS.flash_attn_append_plan(*arguments))


def flex_plan(*arguments: Any) -> Plan:
    """The same for those of ``orchard::flex_attn_fwd``."""
    return _read(OPS.flex_attn_plan(*arguments))


def _read(results: Any) -> Plan:
    refusal, detail, advice, *columns, alternatives, launches, scratch_bytes = results
    kernels = tuple(
        Kernel._make((*texts, tuple(names.split(",")) if names else ()))
        for *texts, names in zip(*columns, alternatives, strict=True)
    )
    rows = tuple(
        tuple(launches[n : n + _NUMBERS_OF_LAUNCH])
        for n in range(0, len(launches), _NUMBERS_OF_LAUNCH)
    )
    return Plan(refusal, detail, advice, kernels, rows, scratch_bytes)
