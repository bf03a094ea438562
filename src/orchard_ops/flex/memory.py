"""What was found out about tensors, kept for as long as their memory lives and is not written to.

Tensors count by their memory, not as Python's objects: what torch.compile hands to an op need not
be the object that the user has.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

_functorch = torch._C._functorch
_T = TypeVar("_T")
_MOST_KEPT = 16
"""Findings that one memory has at once, such as those of several lengths."""


def versions_of(tensors: Sequence[Tensor]) -> tuple[int, ...] | None:
    """What changes when a tensor is written to; None where nothing tells."""
    if any(not _tells(x) for x in tensors):
        return None
    return tuple(x._version for x in tensors)


def _tells(x: Tensor) -> bool:
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and not x.is_inference()
        and not _functorch.is_functorch_wrapped_tensor(x)
    )


class _Kept(NamedTuple):
    storages: tuple[weakref.ref[Any], ...]
    key: tuple[Any, ...]
    found: Any


class ByMemory(Generic[_T]):
    """A finding for each set of tensors and numbers."""

    def __init__(self) -> None:
        self._kept: weakref.WeakKeyDictionary[Any, list[_Kept]] = weakref.WeakKeyDictionary()

    def __len__(self) -> int:
        """Of how many memories something is known."""
        return len(self._kept)

    def find(
        self, tensors: Sequence[Tensor], numbers: tuple[Any, ...], make: Callable[[], _T]
    ) -> _T | None:
        """The finding, by `make` if there is none yet. None where nothing tells of changes."""
        versions = versions_of(tensors)
        if versions is None:
            return None
        storages = [x.untyped_storage() for x in tensors]
        layouts = tuple((x.storage_offset(), x.shape, x.stride(), x.dtype) for x in tensors)
        key = (numbers, versions, layouts)
        kept = self._kept.setdefault(storages[0], [])
        for one in tuple(kept):
            same = len(one.storages) == len(storages) and one.key == key
            if same and all(own() is x for own, x in zip(one.storages, storages)):
                return one.found
        found = make()
        kept.append(_Kept(tuple(map(weakref.ref, storages)), key, found))
        del kept[:-_MOST_KEPT]
        return found
