"""Calls as models make them, and where each would run on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..explain import explain
from ..key_ranges import KeyRanges

_LENGTH = 128


@dataclass(frozen=True)
class Answer:
    """What `explain` says of one call."""

    call: str
    path: str
    reason: str
    advice: str
    kernels: tuple[str, ...]

    @property
    def why(self) -> str:
        """Why it is not on Metal, with what would change that."""
        if self.path == "metal":
            return ""
        return "; ".join(filter(None, (self.reason, self.advice)))


def answers(device: torch.device) -> list[Answer]:
    """Asks about each call; runs none."""
    return [_answer(words, call) for words, call in _calls(device)]


def _answer(words: str, call: Callable[[], dict[str, Any]]) -> Answer:
    try:
        found = explain(**call())
    except RuntimeError as error:  # such as a malformed variable
        return Answer(words, "raises", str(error).split("\n")[0], "", ())
    return Answer(words, found.path, found.reason, found.advice, found.kernels)


def _calls(device: torch.device) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    def operands(
        head_dim: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        num_kv_heads: int = 8,
        q_len: int = _LENGTH,
    ) -> dict[str, Any]:
        def tensor(heads: int, length: int) -> Tensor:
            return torch.empty(1, heads, length, head_dim, dtype=dtype, device=device)

        return {
            "query": tensor(8, q_len),
            "key": tensor(num_kv_heads, _LENGTH),
            "value": tensor(num_kv_heads, _LENGTH),
        }

    def causal(dtype: torch.dtype) -> dict[str, Any]:
        return operands(dtype=dtype) | {"is_causal": True}

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        yield f"{name}, head_dim 64, causal, training", partial(causal, dtype)
    for head_dim in (80, 128, 256, 320):
        yield f"bfloat16, head_dim {head_dim}", partial(operands, head_dim)
    yield "grouped heads, 8/2", lambda: operands(num_kv_heads=2) | {"enable_gqa": True}
    yield "dropout 0.1", lambda: operands() | {"dropout_p": 0.1}
    yield "window of 32 keys", lambda: operands() | {"window_left": 31, "window_right": 0}
    yield "softcap 50", lambda: operands() | {"softcap": 50.0}

    def mask(dtype: torch.dtype) -> Tensor:
        return torch.ones(_LENGTH, _LENGTH, dtype=dtype, device=device)

    yield "bool mask", lambda: operands() | {"attn_mask": mask(torch.bool)}
    yield (
        "additive mask with a gradient",
        lambda: operands() | {"attn_mask": mask(torch.bfloat16).requires_grad_()},
    )

    def packed() -> dict[str, Any]:
        ends = torch.tensor([0, 50, _LENGTH], dtype=torch.int32, device=device)
        ranges = KeyRanges.from_cu_seqlens(ends, q_len=_LENGTH)
        return operands() | {"key_ranges": ranges, "is_causal": True}

    yield "packed documents (KeyRanges)", packed
    yield "one query (decoding)", lambda: operands(q_len=1)
