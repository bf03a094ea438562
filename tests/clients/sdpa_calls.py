"""Calls of F.scaled_dot_product_attention, ways to make them, and PyTorch's own results on the CPU.

Of every call that runs in one of these ways the tests ask that it ran as Metal kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as imported_before
from torch.utils.checkpoint import checkpoint

import orchard_ops
from orchard_ops.dropout import dropout_mask, rescale

B, H, L, S, D = 2, 4, 13, 21, 16


class Call(NamedTuple):
    """A call's operands and arguments; `bias` makes a mask that may require grad."""

    query: tuple[int, ...] = (B, H, L, D)
    key: tuple[int, ...] = (B, H, S, D)
    value: tuple[int, ...] | None = None
    mask: Callable[[], Tensor] | None = None
    bias: tuple[int, ...] | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of the CPU that gradients are compared of."""
        shapes = {
            "query": self.query,
            "key": self.key,
            "value": self.value or self.key,
            "attn_mask": self.bias,
        }
        return {name: torch.randn(shape) for name, shape in shapes.items() if shape is not None}

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "dropout_p": self.dropout_p,
            "is_causal": self.is_causal,
            "scale": self.scale,
            "enable_gqa": self.enable_gqa,
        }
        if self.mask is not None:
            options["attn_mask"] = self.mask()
        return options


def left_padding() -> Tensor:
    lengths = torch.tensor((S, S - 7))[:, None, None, None]
    return torch.arange(S).expand(B, 1, 1, S) >= S - lengths


def padding_without_any_key() -> Tensor:
    mask = left_padding()
    mask[1] = False
    return mask


def band() -> Tensor:
    return (torch.arange(L)[:, None] - torch.arange(S)).abs() < 5


def least_float() -> Tensor:
    """What transformers makes of a padding mask."""
    return torch.where(left_padding(), 0.0, torch.finfo(torch.float32).min).expand(B, 1, L, S)


CALLS: dict[str, Call] = {
    "plain": Call(),
    "causal": Call(is_causal=True),
    "causal, fewer keys": Call(key=(B, H, L - 4, D), is_causal=True),
    "bool mask of padding": Call(mask=left_padding),
    "a row without keys": Call(mask=padding_without_any_key),
    "bool mask of one matrix": Call(mask=band),
    "bool mask expanded": Call(mask=lambda: band().expand(B, H, L, S)),
    "float mask, least float": Call(mask=least_float),
    "bias per head": Call(bias=(1, H, L, S)),
    "bias of the keys": Call(bias=(B, 1, 1, S)),
    "bias of two dimensions": Call(bias=(L, S)),
    "gqa": Call(key=(B, 2, S, D), enable_gqa=True),
    "gqa, one key head": Call(key=(B, 1, S, D), is_causal=True, enable_gqa=True),
    "scale": Call(scale=0.3),
    "dropout": Call(dropout_p=0.25),
    "all at once": Call(
        key=(B, 2, S, D), bias=(B, 1, L, S), dropout_p=0.5, scale=0.5, enable_gqa=True
    ),
    "value head_dim of its own": Call(value=(B, H, S, 24)),
    "queries of one batch": Call(query=(1, H, L, D), key=(3, H, S, D)),
    "queries without a batch": Call(query=(H, L, D), key=(3, H, S, D)),
    "one head": Call(query=(L, D), key=(S, D), is_causal=True),
    "three dimensions": Call(query=(H, L, D), key=(H, S, D), mask=band),
    "five dimensions": Call(query=(2, 3, H, L, D), key=(2, 3, H, S, D), bias=(1, 3, 1, L, S)),
}


def by_pytorch(tensors: dict[str, Tensor], options: dict[str, Any], seed: int) -> Tensor:
    """PyTorch's mathematics on the CPU; dropout as the op draws it after `torch.manual_seed`."""
    if options["dropout_p"] == 0.0:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(**tensors, **options)
    torch.manual_seed(seed)
    drawn = torch.randint(2**63 - 1, (), dtype=torch.int64)
    rest = {name: x for name, x in options.items() if name not in ("dropout_p", "attn_mask")}
    mask = tensors.get("attn_mask", options.get("attn_mask"))
    shape = (B, H, L, S)
    keep = dropout_mask(drawn, options["dropout_p"], shape)
    return torch.ops.aten._scaled_dot_product_attention_math(
        tensors["query"],
        tensors["key"],
        tensors["value"],
        mask,
        1.0 - 1.0 / rescale(options["dropout_p"]),
        rest.pop("is_causal"),
        keep,
        **rest,
    )[0]


# ---- ways to call it ----------------------------------------------------------------------------

Attention = Callable[..., Tensor]


def plainly(**arguments: Any) -> Tensor:
    return F.scaled_dot_product_attention(**arguments)


def by_aten(**arguments: Any) -> Tensor:
    return torch.ops.aten.scaled_dot_product_attention(
        arguments.pop("query"), arguments.pop("key"), arguments.pop("value"), **arguments
    )


def checkpointed(use_reentrant: bool) -> Attention:
    def attention(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
        mask = arguments.pop("attn_mask", None)
        function = lambda q, k, v, m: plainly(query=q, key=k, value=v, attn_mask=m, **arguments)  # noqa: E731
        return checkpoint(function, query, key, value, mask, use_reentrant=use_reentrant)

    return attention


def compiled(backend: str, dynamic: bool | None = None) -> Attention:
    torch.compiler.reset()
    return torch.compile(plainly, backend=backend, fullgraph=True, dynamic=dynamic)


WAYS: dict[str, Callable[[], Attention]] = {
    "eager": lambda: plainly,
    "imported before": lambda: imported_before,
    "torch.ops.aten": lambda: by_aten,
    "checkpoint": lambda: checkpointed(use_reentrant=False),
    "checkpoint, reentrant": lambda: checkpointed(use_reentrant=True),
    "aot_eager": lambda: compiled("aot_eager"),
    "aot_eager, dynamic": lambda: compiled("aot_eager", dynamic=True),
    "inductor": lambda: compiled("inductor"),
}
FORWARDS_OF_ONE_CALL = {"checkpoint": 2, "checkpoint, reentrant": 2}


def on_metal(forwards: int, backwards: int) -> None:
    """That so many calls ran as Metal kernels since the last reset, and none elsewhere."""
    stats = orchard_ops.stats()
    assert stats.metal == {"flash_attn_fwd": forwards, "flash_attn_bwd": backwards}
    assert stats.reference == {} and stats.left_to_pytorch == {}


def left_to_pytorch() -> dict[str, int]:
    stats = orchard_ops.stats()
    assert stats.metal == {"flash_attn_fwd": 0, "flash_attn_bwd": 0} and stats.reference == {}
    return stats.left_to_pytorch


# ---- small calls ---------------------------------------------------------------------------------


def operands(head_dim: int = 16, **options: object) -> list[Tensor]:
    return [torch.randn(2, 2, 9, head_dim, **options).to("mps").requires_grad_() for _ in range(3)]


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.detach().cpu(), wanted.detach().cpu(), rtol=1e-4, atol=1e-5)
