"""An attention call in words: what `report` lists and what the log says of a fallback."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from .cache import CacheCall
from .scoring import NO_BACKWARD, Scoring


class Description(NamedTuple):
    """The problem of a call of a functional op, without its numbers. Equal calls are equal."""

    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    dtype: str
    device: str
    arguments: str
    """The scoring arguments that are not the defaults, such as "causal, dropout_p 0.1"."""

    def __str__(self) -> str:
        words = f"query {self.query}, key {self.key}"
        if self.value != self.key:
            words += f", value {self.value}"
        words += f", {self.dtype} on {self.device}"
        return f"{words}, {self.arguments}" if self.arguments else words


def describe(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Description:
    """Reads shapes, dtype, device and scoring arguments, and waits for nothing."""
    return Description(
        _shape(query),
        _shape(key),
        _shape(value),
        str(query.dtype).removeprefix("torch."),
        query.device.type,
        ", ".join(_arguments(query, scoring)),
    )


def describe_cache(call: CacheCall) -> Description:
    """The same of attention to a cache: what says where its keys are is among the arguments."""
    words = [f"added {call.added}"] if call.added else []
    for name in ("cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table"):
        numbers = getattr(call, name)
        words += [] if numbers is None else [_tensor(name, numbers)]
    described = describe(call.query, call.key, call.value, call.scoring)
    known = [described.arguments] if described.arguments else []
    return described._replace(arguments=", ".join((*known, *words)))


def describe_flex(
    query: Tensor, key: Tensor, value: Tensor, score_mod: bool, mask_mod: bool, scale: float
) -> Description:
    """The same of a call of `flex_attention`: whether it has mods."""
    described = describe(query, key, value, Scoring(scale=scale))
    words = [described.arguments] if described.arguments else []
    words += ["score_mod"] * score_mod + ["mask_mod"] * mask_mod
    return described._replace(arguments=", ".join(("flex_attention", *words)))


def describe_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Description:
    """The same of a call of F.scaled_dot_product_attention."""
    words = ["causal"] if is_causal else []
    words += [f"dropout_p {_number(dropout_p)}"] if dropout_p else []
    words += [] if scale is None else [f"scale {_number(scale)}"]
    words += [] if attn_mask is None else [_tensor("attn_mask", attn_mask)]
    shapes = _shape(query), _shape(key), _shape(value)
    dtype = str(query.dtype).removeprefix("torch.")
    return Description(*shapes, dtype, query.device.type, ", ".join(words))


def _shape(x: Tensor) -> tuple[int, ...]:
    """A length that a compiler has not fixed is left to it: a name takes its place."""
    if x.is_nested:
        return ()
    return tuple(n if type(n) is int else str(n) for n in x.shape)  # type: ignore[misc]


def _tensor(name: str, x: Tensor) -> str:
    return f"{name} {_shape(x)} {str(x.dtype).removeprefix('torch.')}"


def _arguments(query: Tensor, scoring: Scoring) -> list[str]:
    words = []
    given = {
        name: value
        for name, value in scoring._asdict().items()
        if value is not None and value != Scoring._field_defaults[name]
        if not isinstance(value, Tensor)
    }
    if given.get("key_span") == NO_BACKWARD:
        del given["key_span"]  # not the caller's
    if (given.get("window_left"), given.get("window_right")) == (None, 0):
        del given["window_right"]
        words.append("causal")
    usual = 1.0 / math.sqrt(query.shape[-1]) if query.shape[-1] else 1.0
    scale = given.pop("scale", 1.0)
    if not math.isclose(scale, usual, rel_tol=1e-6):
        given["scale"] = scale
    words += [f"{name} {_number(value)}" for name, value in given.items()]
    for name, value in scoring._asdict().items():
        if isinstance(value, Tensor) and name != "dropout_seed":
            words.append(_tensor(name, value))
    return words


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
