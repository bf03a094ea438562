"""`attn_implementation="orchard"` for models of transformers 5. Importing this registers it.

`attention_mask` makes, once a forward, what all layers share; `attention_forward` is called by
every layer. docs/transformers.md says what is served.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..arguments import prepare
from ..attention import flash_attn, run, run_with_lse
from ..key_ranges import OPEN, KeyRanges
from ..mask_symbols import Unsayable
from . import class_tables
from .patterns import NUMBER_EACH_BLOCK, Interval, interval_of
from .visibility import LazyMask, TracedMask, Visibility

NAME = "orchard"
_OP = 'attn_implementation="orchard"'

NOT_OURS = frozenset(
    {
        # Models pass these on to every attention function; they do not change what it computes.
        *("position_ids", "cache_position", "position_embeddings", "token_type_ids"),
        *("use_cache", "output_attentions", "output_hidden_states", "output_router_logits"),
        *("return_dict", "deterministic", "num_items_in_batch", "logits_to_keep", "labels"),
        *("max_length_q", "max_length_k", "mm_token_type_ids", "input_ids", "seq_idx", "cache"),
        *("past_key_values", "layer_idx", "training", "return_loss", "shift_labels", "task"),
    }
)
"""Names of arguments that are not attention's. Any other unknown one is refused."""

_logger = transformers.utils.logging.get_logger(__name__)
_ADVICE = (
    'leave the model at attn_implementation="sdpa" and call orchard_ops.enable(), or ask for '
    '"eager"'
)


def register() -> None:
    """Makes `attn_implementation="orchard"` known to transformers. May be called again."""
    major = int(transformers.__version__.split(".")[0])
    if major < 5:
        raise ImportError(
            f"{_OP} needs transformers 5 or later; got {transformers.__version__}: "
            "pip install --upgrade transformers"
        )
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    class_tables.serve(NAME, sdpa_forward)


# ---- the mask, once a forward -------------------------------------------------------------------


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool | None = None,
    use_vmap: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    config: Any = None,
    **_: Any,
) -> LazyMask | TracedMask | None:
    """The mask interface of transformers: a descriptor of what each query sees.

    It takes memory linear in the lengths unless the model's mask function leaves its queries
    something else than an interval of keys (`patterns.py`). Nothing waits for the device.
    """
    where = torch.device(device)
    traced = torch.compiler.is_compiling()
    offset: Any = q_offset
    q = torch.arange(q_length, device=where)[None] + q_offset
    blocks_are_runs = getattr(config, "model_type", None) in NUMBER_EACH_BLOCK
    try:
        # transformers itself packs where no user's function asks for vmap.
        found = interval_of(mask_function, q, blocks_are_runs, is_packed=not use_vmap)
    except Unsayable:
        dense = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=where,
        )
        seen = Visibility(batch_size, q_length, kv_length, dtype, where, dense=dense)
        return TracedMask(seen) if traced else LazyMask(seen)

    tokens = _padding(attention_mask, kv_length, kv_offset)
    if allow_is_bidirectional_skip and tokens is None and found.hides_nothing:
        return None
    seen = _visibility(found, q, q_offset, kv_offset, kv_length)
    seen.batch, seen.dtype, seen.keys = batch_size, dtype, tokens
    return TracedMask(seen) if traced else LazyMask(seen)


def _padding(mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """(B, 1, 1, S) bool of a tokenizer's mask (B, T). Keys behind its end are not tokens."""
    if mask is None:
        return None
    missing = kv_length + kv_offset - mask.shape[-1]
    if missing > 0:
        mask = torch.nn.functional.pad(mask, (0, missing))
    return mask[:, None, None, kv_offset : kv_offset + kv_length].to(torch.bool)


def _visibility(
    found: Interval, q: Tensor, q_offset: int | Tensor, kv_offset: int, kv_length: int
) -> Visibility:
    """An interval, counted from the first key that there is. The ranges are made at once, since
    the offset of a static cache is a tensor that changes when its layers run."""
    ranges, diagonal = None, 0
    if not isinstance(q_offset, Tensor):
        diagonal = q_offset - kv_offset
    if isinstance(q_offset, Tensor) or found.begin is not None or found.end is not None:
        position = q - kv_offset
        zero = torch.zeros_like(position)
        begin = zero if found.begin is None else found.begin - kv_offset
        end = torch.full_like(position, OPEN) if found.end is None else found.end - kv_offset
        columns = torch.broadcast_tensors(begin, end, position, zero)
        ranges = torch.stack(columns, -1).to(torch.int32).unsqueeze(1)
    left, right = found.left, found.right
    if isinstance(kv_length, int) and ranges is None:
        # A window as wide as there are keys hides none.
        left = -1 if left >= diagonal + q.shape[1] - 1 else left
        right = -1 if right >= kv_length - min(diagonal, 0) else right
    return Visibility(
        *(1, q.shape[1], kv_length, torch.float32, q.device),
        window_left=left,
        window_right=right,
        diagonal=diagonal,
        ranges=ranges,
    )


# ---- attention, in every layer ------------------------------------------------------------------


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | LazyMask | TracedMask | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    sliding_window: int | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    dropout_p: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention interface of transformers: (B, H, L, D) operands, out (B, L, H, Dv).

    `sliding_window` is read where there is no mask: that of `attention_mask` has the window in it.
    Sinks are a number for each head, or (B, H, L, 1) for each query (Inkling 2). `dropout` is for
    training mode alone; `dropout_p`, where it is passed, for both.

    Raises:
        ValueError, TypeError: an argument that would change the result and is not known, or a call
            whose mask cannot be what was meant. The message names the model's module.
    """
    _refuse_unknown(module, others)
    if block_indices is not None:
        raise NotImplementedError(
            f"{_OP}: {type(module).__name__} chooses blocks of keys by block_indices, which are "
            'not supported: ask for attn_implementation="eager"'
        )
    if s_aux is not None and sinks is not None:
        raise ValueError(f"{_OP}: {type(module).__name__} passes both s_aux and sinks")
    if others.get("output_attentions"):
        _logger.warning_once(f"{_OP}: attention weights are not made; output_attentions gives None")
    q_len, kv_len = query.shape[2], key.shape[2]
    if isinstance(attention_mask, LazyMask | TracedMask):
        edited = attention_mask.visibility.edited
        attention_mask = attention_mask if edited is None else edited
    seen = _seen(module, attention_mask, is_causal, query, kv_len)
    if attention_mask is None and sliding_window is not None and q_len > sliding_window:
        if seen.window_right != 0:
            raise NotImplementedError(
                f"{_OP}: {type(module).__name__} passes sliding_window={sliding_window} without a "
                f"mask, and is not causal, which leaves open where the window lies: {_ADVICE}"
            )
        seen.window_left = sliding_window - 1
    ranges: KeyRanges | Tensor | None = seen.ranges
    mask: Tensor | None = seen.keys if seen.dense is None else seen.dense
    if isinstance(attention_mask, Tensor) and not isinstance(attention_mask, LazyMask):
        mask = _own_mask(module, attention_mask, kv_len)
    diagonal = seen.diagonal if ranges is None else 0
    if cu_seq_lens_q is not None:
        documents = _documents(module, cu_seq_lens_q, cu_seq_lens_k, query, kv_len)
        ranges, diagonal = _intersect(seen, documents), 0
    if indices is not None:
        chosen = torch.zeros(
            (query.shape[0], 1, q_len, kv_len), dtype=torch.bool, device=query.device
        ).scatter(-1, indices.long().unsqueeze(1), True)
        mask = _with(mask, chosen)
    if position_bias is not None:
        mask = position_bias if mask is None else _added(position_bias, mask)
    p = dropout_p if dropout_p is not None else dropout if module.training else 0.0
    sink = s_aux if sinks is None else sinks
    of_queries = sink if sink is not None and sink.dim() == 4 else None
    shared: dict[str, Any] = {
        "scale": scaling,
        "enable_gqa": True,
        "window_left": seen.window_left,
        "window_right": seen.window_right,
        "softcap": 0.0 if softcap is None else softcap,
        "sinks": sink if of_queries is None else None,
        "key_ranges": ranges,
    }
    stands_elsewhere = diagonal != 0 and (seen.window_left >= 0 or seen.window_right >= 0)
    if of_queries is None and not stands_elsewhere:
        out: Any = flash_attn(query, key, value, mask, float(p), **shared)
        return out.transpose(1, 2).contiguous(), None
    call = prepare(query, key, value, mask, float(p), **shared)
    if stands_elsewhere:
        call = call._replace(scoring=call.scoring._replace(diagonal=diagonal))
    if of_queries is None:
        out = run(call)
    else:
        out, lse = run_with_lse(call)
        out = out * torch.sigmoid(lse.unsqueeze(-1) - of_queries).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


def sdpa_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | LazyMask | TracedMask | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention as modules call it whose families have no interface."""
    if not isinstance(attn_mask, LazyMask | TracedMask):
        more: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        out = flash_attn(query, key, value, attn_mask, dropout_p, is_causal, **more)
        return out  # type: ignore[return-value]
    out, _ = attention_forward(
        module, query, key, value, attn_mask, 0.0, scale, is_causal, dropout_p=dropout_p
    )
    return out.transpose(1, 2)


def _refuse_unknown(module: torch.nn.Module, others: dict[str, Any]) -> None:
    for name, value in others.items():
        if name not in NOT_OURS and value is not None and value is not False:
            raise TypeError(
                f"{_OP}: {type(module).__name__} passes {name}, which may change what attention "
                f"computes and is not known here: {_ADVICE}"
            )


def _seen(
    module: torch.nn.Module,
    mask: Tensor | LazyMask | TracedMask | None,
    is_causal: bool | None,
    query: Tensor,
    kv_len: int,
) -> Visibility:
    """What the mask says. Without one a causal module sees no later keys, as with "sdpa"."""
    batch, q_len = query.shape[0], query.shape[2]
    if isinstance(mask, LazyMask | TracedMask):
        seen = mask.visibility
        if seen.kv_len > kv_len:
            seen = seen.sliced((..., slice(0, kv_len))) or seen
        if (seen.q_len, seen.kv_len) != (q_len, kv_len):
            raise ValueError(
                f"{_OP}: {type(module).__name__} has {q_len} queries and {kv_len} keys; the mask "
                f"was made for {seen.q_len} and {seen.kv_len}: {_ADVICE}"
            )
        return seen
    seen = Visibility(batch, q_len, kv_len, query.dtype, query.device)
    if mask is None and q_len > 1:
        causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        if causal and q_len != kv_len:
            raise ValueError(
                f"{_OP}: {type(module).__name__} is causal, has {q_len} queries and {kv_len} keys "
                "and passes no mask, which leaves open where the queries stand: pass the model "
                "an attention_mask"
            )
        seen.window_right = 0 if causal else -1
    return seen


def _own_mask(module: torch.nn.Module, mask: Tensor, kv_len: int) -> Tensor:
    """A mask that the model or its user has made."""
    if mask.dim() != 4:
        raise ValueError(
            f"{_OP}: attention_mask must have shape (batch or 1, heads or 1, queries, keys) where "
            f"it reaches {type(module).__name__}; got {tuple(mask.shape)}: {_ADVICE}"
        )
    return mask[..., :kv_len] if mask.shape[-1] > kv_len else mask


def _documents(
    module: torch.nn.Module,
    of_query: Tensor,
    of_key: Tensor | None,
    query: Tensor,
    kv_len: int,
) -> KeyRanges:
    """Packed sequences by cumulative lengths; models pass them beside a batch of one row."""
    if query.shape[0] != 1:
        raise ValueError(
            f"{_OP}: {type(module).__name__} passes cu_seq_lens_q, which describe one packed row, "
            f"with a batch of {query.shape[0]}: pack the batch into one row, or pass position_ids "
            "with use_cache=False and without attention_mask"
        )
    same = of_key is None or of_key is of_query
    if same and query.shape[2] != kv_len:
        raise ValueError(
            f"{_OP}: {type(module).__name__} passes cu_seq_lens_q for {query.shape[2]} queries and "
            f"{kv_len} keys: pass cu_seq_lens_k too"
        )
    return KeyRanges.from_cu_seqlens(of_query, None if same else of_key, q_len=query.shape[2])


def _intersect(seen: Visibility, documents: KeyRanges) -> KeyRanges:
    if seen.ranges is None:
        return documents
    a, b = seen.ranges, documents.tensor
    begin = torch.maximum(a[..., 0], b[..., 0])
    end = torch.minimum(a[..., 1], b[..., 1])
    position = a[..., 2] + torch.zeros_like(begin)
    return KeyRanges(torch.stack((begin, end, position, torch.zeros_like(begin)), -1))


def _with(mask: Tensor | None, chosen: Tensor) -> Tensor:
    """A mask that hides besides what is not chosen."""
    if mask is None:
        return chosen
    if mask.dtype == torch.bool:
        return mask & chosen
    return mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)


def _added(bias: Tensor, mask: Tensor) -> Tensor:
    """A bias and a mask of the same scores as one."""
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
    return bias + mask


register()
