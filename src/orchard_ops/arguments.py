"""From the arguments of `flash_attn` to those of ``orchard::flash_attn_fwd``.

What F.scaled_dot_product_attention accepts is accepted: any batch dimensions that broadcast, 2-D
operands, `CausalBias` masks. The functional pair takes one form: 4-D operands, numbers that are
floats, a drawn seed, and causality as a window that ends at a diagonal.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter

from . import checks
from .key_ranges import KeyRanges
from .ops import seed
from .scoring import Scoring

if TYPE_CHECKING:
    from torch.nn.attention.bias import CausalBias

_OP = "orchard::flash_attn"
_AUTOCAST_DEVICES = frozenset(
    name
    for name in ("cpu", "mps", "cuda", "xpu", "hpu", "mtia", "xla")
    if torch.amp.is_autocast_available(name)
)
"""The question is asked at import, since torch.compile of torch 2.10 and 2.11 cannot trace it."""
_REMEDY = {
    "scale": "multiply query by it and pass scale=1.0",
    "softcap": "pass a number, softcap.item(), if it is not to be trained",
    "dropout_p": "pass a number, dropout_p.item(), if it is not to be trained",
}


class Call(NamedTuple):
    """A call in the form of ``orchard::flash_attn_fwd``, and the shape its results go back to."""

    operands: tuple[Tensor, Tensor, Tensor]
    scoring: Scoring
    impl: str
    batch_shape: tuple[int, ...]
    has_heads: bool = True
    """False where all operands are (length, head_dim)."""
    drops_all: bool = False
    """True where dropout_p is 1: `scoring` has no dropout then, and out is to be set to 0 * out."""

    def flat(self) -> tuple[Any, ...]:
        return (*self.operands, *self.scoring, self.impl)

    def restore(self, x: Tensor) -> Tensor:
        """(B, Hq, ...) -> (*batch_shape, Hq, ...)."""
        if not self.has_heads:
            return x[0, 0]
        if len(self.batch_shape) == 1:
            return x
        return x.reshape(*self.batch_shape, *x.shape[1:]) if self.batch_shape else x.squeeze(0)


# ---- numbers ------------------------------------------------------------------------------------


def _number(name: str, x: Any) -> float:
    if isinstance(x, float | torch.SymFloat):
        return x  # type: ignore[return-value]
    if isinstance(x, Tensor):
        if x.requires_grad:
            raise TypeError(
                f"{_OP}: {name} must be a number; got a tensor that requires grad, which would get "
                f"no gradient: {_REMEDY[name]}"
            )
        if x.dim() != 0:
            raise TypeError(f"{_OP}: {name} must be a number; got shape {tuple(x.shape)}")
        return float(x.item())
    if isinstance(x, bool) or not isinstance(x, int | torch.SymInt | numbers.Real):
        raise TypeError(f"{_OP}: {name} must be a number; got {x!r}, {_type(x)}")
    return float(x)


def _integer(name: str, x: Any) -> int:
    if type(x) is int or isinstance(x, torch.SymInt):
        return x  # type: ignore[return-value]
    try:
        if isinstance(x, bool):
            raise TypeError
        return operator.index(x)
    except TypeError:
        raise TypeError(f"{_OP}: {name} must be an integer; got {x!r}, {_type(x)}") from None


def _flag(name: str, x: Any) -> bool:
    if not isinstance(x, bool):
        raise TypeError(f"{_OP}: {name} must be True or False; got {x!r}, {_type(x)}")
    return x


def _type(x: Any) -> str:
    return f"a {type(x).__name__}"


# ---- operands -----------------------------------------------------------------------------------


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Casts as autocast does for F.scaled_dot_product_attention."""
    device_type = tensors[0].device.type  # type: ignore[union-attr]
    if device_type not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    lower = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(t.to(dtype) if t is not None and t.dtype in lower else t for t in tensors)


def _check_dimensions(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < 2:
            raise ValueError(
                f"{_OP}: {name} must have 2 or more dimensions, (..., heads, length, head_dim); "
                f"got shape {tuple(x.shape)}"
            )


def _broadcast_batch(operands: Sequence[Tensor]) -> tuple[tuple[int, ...], list[Tensor]]:
    """The common batch dimensions, and the operands expanded to them."""
    shapes = [tuple(x.shape[:-3]) for x in operands]
    try:
        batch_shape = tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        query, key, value = shapes
        raise ValueError(
            f"{_OP}: the batch dimensions of query, key and value must broadcast; got "
            f"{query}, {key} and {value}"
        ) from None
    return batch_shape, [
        x if shape == batch_shape else x.expand(*batch_shape, *x.shape[-3:])
        for x, shape in zip(operands, shapes)
    ]


def _match_heads(operands: Sequence[Tensor], enable_gqa: bool) -> list[Tensor]:
    """The operands with head counts that the functional pair takes: key and value have the same
    number, which divides that of query."""
    query, key, value = operands
    num_heads, num_key_heads, num_value_heads = (x.shape[-3] for x in operands)
    if enable_gqa:
        if num_key_heads == num_value_heads:
            return [query, key, value]  # `checks` sees whether they divide Hq
        for name, count in (("key", num_key_heads), ("value", num_value_heads)):
            if count == 0 or num_heads % count:
                raise ValueError(
                    f"{_OP}: the number of query heads must be a multiple of the number of {name} "
                    f"heads; got {num_heads} and {count}"
                )
        common = math.lcm(num_key_heads, num_value_heads)
        return [query, *(x.repeat_interleave(common // x.shape[-3], dim=-3) for x in (key, value))]
    if num_heads == num_key_heads == num_value_heads or num_key_heads == num_value_heads == 1:
        return [query, key, value]
    counts = {num_heads, num_key_heads, num_value_heads} - {1}
    if len(counts) > 1:
        raise ValueError(
            f"{_OP}: query, key and value must have the same number of heads, or enable_gqa=True "
            f"where query heads share those of key and value; got {num_heads}, {num_key_heads} and "
            f"{num_value_heads} heads (operands are (..., heads, length, head_dim))"
        )
    (common,) = counts
    return [x.expand(*x.shape[:-3], common, *x.shape[-2:]) for x in operands]


def _to_4d(x: Tensor) -> Tensor:
    if x.dim() == 4:
        return x
    return x.unsqueeze(0) if x.dim() == 3 else x.flatten(0, x.dim() - 4)


# ---- masks --------------------------------------------------------------------------------------


def _has_own_torch_function(x: Tensor) -> bool:
    own = type(x).__torch_function__
    return (
        not isinstance(x, Parameter)
        and own is not torch._C._disabled_torch_function_impl
        and getattr(own, "__func__", own) is not Tensor.__torch_function__.__func__  # type: ignore[attr-defined]
    )


def _check_kind(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{_OP}: {name} must be a tensor or None; got {_type(x)}")
    checks.check_dense(_OP, name, x)
    if type(x) is not Tensor and _has_own_torch_function(x):
        raise TypeError(
            f"{_OP}: {name} must be a plain tensor or a torch.nn.attention.bias.CausalBias; got "
            f"a {type(x).__name__}, whose meaning is in its own __torch_function__"
        )


def _mask_to_4d(
    mask: Tensor, batch_shape: tuple[int, ...], has_heads: bool, full: tuple[int, ...]
) -> Tensor:
    """The mask with four dimensions, or five (see `_fold_batch`). Missing dimensions become 1.

    `full` is (*batch_shape, Hq, L, S).
    """
    wanted = full if has_heads else full[-2:]
    shape = tuple(mask.shape)
    if len(shape) > len(wanted):
        raise ValueError(
            f"{_OP}: attn_mask must have at most {len(wanted)} dimensions for this query; "
            f"got shape {shape}"
        )
    if not all(m == f or m == 1 for m, f in zip(shape, wanted[len(wanted) - len(shape) :])):
        padding = len(batch_shape) == 1 and shape == (full[0], full[-1])
        remedy = ": a padding mask goes in as mask[:, None, None, :]" if padding else ""
        raise ValueError(
            f"{_OP}: attn_mask must broadcast to {tuple(wanted)}; got shape {shape}{remedy}"
        )
    mask = mask[(None,) * (len(full) - len(shape))]
    if len(batch_shape) == 0:
        return mask.unsqueeze(0)
    return _fold_batch(mask, batch_shape) if len(batch_shape) > 1 else mask


def _fold_batch(mask: Tensor, batch_shape: tuple[int, ...]) -> Tensor:
    """Joins batch dimensions into one, or into two if the mask broadcasts over some of them.

    A mask that is the same for all images, (1, windows, ...), is not copied for each of them. If
    the dimensions that it broadcasts over lie between others, it is expanded to the fewest elements
    possible.
    """
    num_batch = len(batch_shape)

    def group(first: int, end: int) -> Sequence[int]:
        """The mask's sizes in dimensions first..end-1, if they are all 1, or else the batch's."""
        broadcasts = all(size == 1 for size in mask.shape[first:end])
        return mask.shape[first:end] if broadcasts else batch_shape[first:end]

    def elements(split: int) -> int:
        return math.prod(group(0, split)) * math.prod(group(split, num_batch))

    split = min(range(num_batch), key=elements)
    sizes = [group(0, split), group(split, num_batch)]
    mask = mask.expand(*sizes[0], *sizes[1], *mask.shape[num_batch:])
    if elements(split) in (1, math.prod(batch_shape)):
        return mask.flatten(0, num_batch - 1)
    return mask.reshape(*map(math.prod, sizes), *mask.shape[num_batch:])


def _is_causal_bias(mask: Any) -> TypeGuard[CausalBias]:
    """The class is asked for where a mask may be one alone: its module loads torch._dynamo, which
    takes about as long to import as torch."""
    if mask is None or type(mask) is Tensor or type(mask) is Parameter:
        return False
    from torch.nn.attention.bias import CausalBias

    return isinstance(mask, CausalBias)


def _causal_bias(
    bias: CausalBias, q_len: int, kv_len: int, is_causal: bool, window_left: int, window_right: int
) -> int:
    """The diagonal at which a CausalBias ends. It stands for a window, so no other may be given."""
    if is_causal:
        raise ValueError(f"{_OP}: attn_mask is a CausalBias already: pass is_causal=False")
    if (bias.seq_len_q, bias.seq_len_kv) != (q_len, kv_len):
        raise ValueError(
            f"{_OP}: attn_mask must be a CausalBias for {q_len} queries and {kv_len} keys; "
            f"got one for {bias.seq_len_q} and {bias.seq_len_kv}"
        )
    diagonal = kv_len - q_len if bias.variant.name == "LOWER_RIGHT" else 0
    if window_right >= 0 or (window_left >= 0 and diagonal != 0):
        raise ValueError(
            f"{_OP}: a CausalBias and a window hide keys in two ways; got window_left "
            f"{window_left} and window_right {window_right}: pass one bool mask of both"
        )
    return diagonal


def _of_kernels(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Slopes or sinks in the dtype that the kernels for operands of `dtype` read them in."""
    if x is None or not x.is_floating_point():  # Scoring.check says what is wrong with the latter
        return x
    return x.to(torch.promote_types(torch.float32, dtype))


# ---- the whole ----------------------------------------------------------------------------------


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_ranges: Tensor | KeyRanges | None = None,
    impl: str | None = None,
) -> Call:
    """Checks a call of `flash_attn` and brings it into the functional ops' form. Draws the seed."""
    is_causal, enable_gqa = _flag("is_causal", is_causal), _flag("enable_gqa", enable_gqa)
    dropout_p, softcap = _number("dropout_p", dropout_p), _number("softcap", softcap)
    window_left = _integer("window_left", window_left)
    window_right = _integer("window_right", window_right)
    scale = None if scale is None else _number("scale", scale)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{_OP}: dropout_p must be in [0, 1]; got {dropout_p}")
    impl = "auto" if impl is None else impl
    checks.check_impl(_OP, impl)
    diagonal = 0
    if _is_causal_bias(attn_mask):
        checks.check_kinds(_OP, query, key, value)
        _check_dimensions(query, key, value)
        diagonal = _causal_bias(
            attn_mask, query.shape[-2], key.shape[-2], is_causal, window_left, window_right
        )
        attn_mask, is_causal = None, True
    ranges = key_ranges.tensor if isinstance(key_ranges, KeyRanges) else key_ranges
    for name, x in (
        ("attn_mask", attn_mask),
        ("alibi_slopes", alibi_slopes),
        ("sinks", sinks),
        ("key_ranges", ranges),
    ):
        if x is not None:
            _check_kind(name, x)
    if ranges is not None and ranges.dim() > 0 and ranges.stride(-1) != 1:
        ranges = ranges.contiguous()

    checks.check_tensors(_OP, query, key, value)
    query, key, value, attn_mask = autocast(query, key, value, attn_mask)
    batch_shape, has_heads = tuple(query.shape[:1]), True
    if not checks.plainly_right(query, key, value, enable_gqa):
        checks.check_kinds(_OP, query, key, value)
        _check_dimensions(query, key, value)
        has_heads = max(query.dim(), key.dim(), value.dim()) > 2
        operands = [x if x.dim() > 2 else x.unsqueeze(0) for x in (query, key, value)]
        batch_shape, operands = _broadcast_batch(_match_heads(operands, enable_gqa))
        query, key, value = (_to_4d(x) for x in operands)
        checks.check_problem(_OP, query, key, value)
    if attn_mask is not None:
        if attn_mask.is_floating_point() and attn_mask.dtype not in (torch.float32, query.dtype):
            attn_mask = attn_mask.to(torch.promote_types(torch.float32, query.dtype))
        full = (*batch_shape, query.shape[1], query.shape[2], key.shape[2])
        attn_mask = _mask_to_4d(attn_mask, batch_shape, has_heads, full)
    alibi_slopes, sinks = (_of_kernels(x, query.dtype) for x in (alibi_slopes, sinks))
    drops_all = dropout_p == 1.0
    if drops_all:
        dropout_p = 0.0
    right = 0 if is_causal else window_right
    span = key_ranges.key_span(window_left, right) if isinstance(key_ranges, KeyRanges) else 0
    scoring = Scoring(
        attn_mask=attn_mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_seed=seed.draw(query) if dropout_p > 0.0 else None,
        dropout_p=dropout_p,
        scale=1.0 / math.sqrt(query.shape[-1]) if scale is None else scale,
        window_left=window_left,
        window_right=right,
        diagonal=diagonal,
        softcap=softcap,
        key_ranges=ranges,
        key_span=span,
    )
    scoring._replace(window_right=window_right).check(_OP, query, key)
    return Call((query, key, value), scoring, impl, batch_shape, has_heads, drops_all)
