"""Writes docs/support.md: what runs where, asked of the plan, the reference and the compiler.

`python tools/support_matrix.py` writes the page; tests/attention/test_support.py compares it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import orchard_ops
from orchard_ops import KeyRanges, watch
from orchard_ops.arguments import prepare
from orchard_ops.cache import CacheCall
from orchard_ops.plan import Plan, append_plan, decode_plan, plan

PAGE = Path(__file__).resolve().parents[1] / "docs" / "support.md"
B, H, L, D = 2, 2, 6, 16


class Feature(NamedTuple):
    """A feature, a call that has it, and the test files (of tests/attention) that prove it."""

    name: str
    tests: tuple[str, ...]
    options: Callable[[], dict[str, Any]] = dict
    operands: Callable[[], list[torch.Tensor]] = lambda: qkv()


def qkv(dtype: torch.dtype = torch.float32, **sizes: int) -> list[torch.Tensor]:
    size = {"heads": H, "kv_heads": H, "width": D, "value_width": D, **sizes}
    shapes = (
        (B, size["heads"], L, size["width"]),
        (B, size["kv_heads"], L, size["width"]),
        (B, size["kv_heads"], L, size["value_width"]),
    )
    return [torch.ones(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def bias(*shape: int) -> dict[str, Any]:
    return {"attn_mask": torch.zeros(shape, requires_grad=True)}


def ranges(make: Callable[[], KeyRanges]) -> Callable[[], dict[str, Any]]:
    return lambda: {"key_ranges": make()}


COVERING = "covering"
FEATURES = (
    Feature("float32", ("kernels",)),
    Feature("float16", ("kernels",), operands=lambda: qkv(torch.float16)),
    Feature("bfloat16", ("kernels",), operands=lambda: qkv(torch.bfloat16)),
    Feature("float64", ("reference",), operands=lambda: qkv(torch.float64)),
    Feature("head_dim 256", ("kernels",), operands=lambda: qkv(width=256, value_width=256)),
    Feature("head_dim above 256", ("fallback",), operands=lambda: qkv(width=257, value_width=257)),
    Feature("value head_dim of its own", (COVERING,), operands=lambda: qkv(value_width=24)),
    Feature(
        "grouped heads", ("kernels", COVERING), lambda: {"enable_gqa": True},
        lambda: qkv(heads=4),
    ),
    Feature("causal", ("kernels", COVERING), lambda: {"is_causal": True}),
    Feature("windows", ("kernels", COVERING), lambda: {"window_left": 2, "window_right": 1}),
    Feature("dropout", ("dropout", COVERING), lambda: {"dropout_p": 0.5}),
    Feature("softcap", ("reference", COVERING), lambda: {"softcap": 2.0}),
    Feature("ALiBi", ("reference", COVERING), lambda: {"alibi_slopes": torch.ones(H)}),
    Feature(
        "sinks, with their gradient", ("reference", COVERING),
        lambda: {"sinks": torch.ones(H, requires_grad=True)},
    ),
    Feature(
        "bool mask", ("mask_work", COVERING),
        lambda: {"attn_mask": torch.ones(L, L, dtype=torch.bool)},
    ),
    Feature("additive mask, with its gradient", ("mask_gradient", COVERING), lambda: bias(L, L)),
    Feature("bias of keys, with its gradient", ("mask_gradient",), lambda: bias(B, 1, 1, L)),
    Feature(
        "padding, left or right (`KeyRanges`)", ("ranged_attention", "unseen_keys", COVERING),
        ranges(lambda: KeyRanges.from_lengths(torch.tensor([L, 2]), L)),
    ),
    Feature(
        "packed documents (`KeyRanges`, `flash_attn_varlen`)", ("varlen", "range_work", COVERING),
        ranges(lambda: KeyRanges.from_document_ids(torch.tensor([[0, 0, 1, 1, 1, 2]]))),
    ),
    Feature(
        "prefix besides a window (`KeyRanges`)", ("ranged_attention", "range_work", COVERING),
        ranges(lambda: KeyRanges.sliding_window(2, 0, L, prefix=2)),
    ),
)  # fmt: skip


def far(batch: int, length: int) -> list[torch.Tensor]:
    """Sizes alone: no memory lies behind them."""
    return [torch.zeros(1, 1, 1, D).expand(batch, 1, length, D) for _ in range(3)]


class CacheFeature(NamedTuple):
    """A feature of calls for a cache, and one that has it: changes of `cached`."""

    name: str
    tests: tuple[str, ...]
    changed: dict[str, Any]
    function: Callable[..., Any] = orchard_ops.flash_attn_with_kvcache


def cached(**changed: Any) -> dict[str, Any]:
    """Arguments of flash_attn_with_kvcache: 2 sequences with 4 heads, 2 of keys and values."""
    of = {"dtype": torch.float16, "q_len": 1, "widths": (D, D), "new": 0, "page_size": 0} | changed
    dtype, (width, value_width) = of.pop("dtype"), of.pop("widths")
    q_len, new, page_size = of.pop("q_len"), of.pop("new"), of.pop("page_size")
    entries = (B * (64 // page_size), page_size) if page_size else (B, 64)

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype)

    arguments = {
        "q": ones(B, q_len, 4, width),
        "k_cache": ones(*entries, 2, width),
        "v_cache": ones(*entries, 2, value_width),
        "cache_seqlens": torch.tensor([20, 3]),
    }
    if new:
        arguments |= {"k": ones(B, new, 2, width), "v": ones(B, new, 2, value_width)}
    if page_size:
        arguments["block_table"] = torch.arange(entries[0]).view(B, -1)
    return arguments | of


def packed(**changed: Any) -> dict[str, Any]:
    """The same of flash_attn_varlen_func, with keys in pages."""
    of = cached(**changed)
    q_len, lengths = of["q"].shape[1], of.pop("cache_seqlens")
    return {
        "q": of.pop("q").flatten(0, 1),
        "k": of.pop("k_cache"),
        "v": of.pop("v_cache"),
        "cu_seqlens_q": torch.arange(B + 1) * q_len,
        "cu_seqlens_k": torch.tensor([0, *lengths.tolist()]).cumsum(0),
        "max_seqlen_q": q_len,
        "max_seqlen_k": 20,
        **of,
    }


VARLEN = orchard_ops.flash_attn_varlen_func
CACHE_FEATURES = (
    CacheFeature("float32", ("decode", "kv_cache"), {"dtype": torch.float32}),
    CacheFeature("float16", ("decode", "kv_cache"), {}),
    CacheFeature("bfloat16", ("decode", "kv_cache"), {"dtype": torch.bfloat16}),
    CacheFeature("float64", ("kv_cache",), {"dtype": torch.float64}),
    CacheFeature("head_dim 256", ("decode",), {"widths": (256, 256)}),
    CacheFeature("head_dim above 256", ("kv_cache",), {"widths": (257, D)}),
    CacheFeature("value head_dim of its own", ("decode", "kv_cache"), {"widths": (D, 24)}),
    CacheFeature("16 queries", ("decode", "kv_cache"), {"q_len": 16}),
    CacheFeature("17 queries or more", ("kv_cache",), {"q_len": 17}),
    CacheFeature("new keys (k, v)", ("append", "kv_cache"), {"new": 3}),
    CacheFeature(
        "new keys, rotated", ("kv_cache",),
        {"new": 3, "rotary_cos": torch.ones(65, 8), "rotary_sin": torch.ones(65, 8)},
    ),
    CacheFeature("cache_batch_idx", ("kv_cache",), {"cache_batch_idx": torch.tensor([1, 0])}),
    CacheFeature("cache_leftpad", ("kv_cache",), {"cache_leftpad": torch.tensor([2, 1])}),
    CacheFeature("pages of a multiple of 16 keys", ("decode", "kv_cache"), {"page_size": 16}),
    CacheFeature("pages of another size", ("kv_cache",), {"page_size": 8}),
    CacheFeature("pages, 17 queries or more", ("kv_cache",), {"page_size": 16, "q_len": 17}),
    CacheFeature("causal", ("decode", "kv_cache"), {"causal": True}),
    CacheFeature("windows", ("decode", "kv_cache"), {"window_size": (4, 0)}),
    CacheFeature("softcap", ("decode", "kv_cache"), {"softcap": 2.0}),
    CacheFeature("ALiBi", ("decode", "kv_cache"), {"alibi_slopes": torch.ones(4)}),
    CacheFeature(
        "packed queries, pages of a multiple of 16 keys", ("paged_varlen",),
        {"page_size": 16}, VARLEN,
    ),
    CacheFeature(
        "packed queries, pages of another size", ("paged_varlen",), {"page_size": 8}, VARLEN
    ),
    CacheFeature(
        "packed queries, 17 or more of a sequence, pages", ("paged_varlen",),
        {"page_size": 16, "q_len": 17}, VARLEN,
    ),
)  # fmt: skip
REFUSED = (
    CacheFeature("", (), {"q_len": 3}),
    CacheFeature("", (), {"page_size": 16}, VARLEN),
    CacheFeature("", (), {"page_size": 16, "dropout_p": 0.5}, VARLEN),
)
"""What no path takes; operands of those without another reason require grad."""


def arguments_of(feature: CacheFeature) -> dict[str, Any]:
    return (packed if feature.function is VARLEN else cached)(**feature.changed)


def cache_on_metal(feature: CacheFeature) -> str:
    """The kernel that attends, by the plan, and whether it gets a copy of the keys."""
    arguments, found = arguments_of(feature), []
    cache = arguments.get("k_cache", arguments["k"] if feature.function is VARLEN else None)

    class Asked(Exception):
        pass

    def answer(name: str, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if name == "flash_attn_append":
            found.append(append_plan(*args))
            return
        found.append((decode_plan if name == "flash_attn_decode" else plan)(*args))
        copied = args[1].untyped_storage().data_ptr() != cache.untyped_storage().data_ptr()
        word = "decode" if name == "flash_attn_decode" else "forward"
        found.append(word + ", of copied pages" * copied)
        raise Asked

    try:
        with watch.answering(answer):
            feature.function(**arguments)
    except Asked:
        pass
    *plans, word = found
    return "no" if any(x.refusal for x in plans) else word


def cache_on_reference(feature: CacheFeature) -> str:
    return yes(math.isfinite(feature.function(**arguments_of(feature)).sum().item()))


def cache_compiles(feature: CacheFeature) -> str:
    torch._dynamo.reset()
    compiled = torch.compile(feature.function, backend="eager", fullgraph=True)
    return yes(compiled(**arguments_of(feature)).shape[-1] > 0)


def refusal_of(feature: CacheFeature) -> str:
    """The words of the error."""
    arguments = arguments_of(feature)
    if "dropout_p" not in arguments:
        arguments["q"].requires_grad_()
    try:
        feature.function(**arguments)
    except NotImplementedError as error:
        return str(error).removeprefix("orchard_ops.")
    raise AssertionError(f"{feature} is not refused")


def decode_of(query: torch.Tensor, key: torch.Tensor, **places: Any) -> Plan:
    """Of sizes alone, see `far`."""
    return decode_plan(*CacheCall(query, key, key, **places))


def one(*sizes: int) -> torch.Tensor:
    return torch.zeros(1, 1, 1, D).expand(*sizes, D)


CACHE_LIMITS: tuple[Callable[[], Plan], ...] = (
    lambda: decode_of(one(1, 1, 1), one(1, 1, 8), block_table=torch.zeros(1, 1, dtype=torch.int32)),
    lambda: decode_of(one(2**20, 1, 16), one(2**20, 1, 16)),
    lambda: decode_of(one(1, 1, 1), one(1, 1, 16), added=2**28 + 1),
)


LIMITS: tuple[Callable[[], tuple[list[torch.Tensor], dict[str, Any]]], ...] = (
    lambda: (qkv(torch.float64), {}),
    lambda: (qkv(width=257), {}),
    lambda: (qkv(), {"softcap": 1e-37, "scale": 100.0}),
    lambda: (far(1, 2**28 + 1), {}),
    lambda: (far(2**24, 1), {}),
)


def plan_of(operands: list[torch.Tensor], options: dict[str, Any]) -> Plan:
    return plan(*prepare(*operands, **options).flat())


def on_metal(feature: Feature) -> tuple[str, str]:
    """Whether the plan has kernels for the forward, and for the backward."""
    families = [kernel.family for kernel in plan_of(feature.operands(), feature.options()).kernels]
    backward = ("attention_backward_delta", "attention_backward_dkv", "attention_backward_dq")
    has_backward = all(any(x.startswith(name) for x in families) for name in backward)
    return yes("attention_forward" in families), yes(has_backward)


def on_reference(feature: Feature) -> str:
    """Runs it, forward and backward."""
    operands, options = feature.operands(), feature.options()
    leaves = [x for x in (*operands, *options.values()) if isinstance(x, torch.Tensor)]
    leaves = [x for x in leaves if x.requires_grad]
    out = orchard_ops.flash_attn(*operands, impl="reference", **options)
    grads = torch.autograd.grad(out.sum(), leaves)
    return yes(all(math.isfinite(x.sum().item()) for x in (out, *grads)))


def compiles(feature: Feature) -> str:
    """Traces it as one graph; what is not traceable raises."""
    torch._dynamo.reset()
    operands, options = feature.operands(), feature.options()
    compiled = torch.compile(orchard_ops.flash_attn, backend="eager", fullgraph=True)
    return yes(
        compiled(*operands, **options).shape == (*operands[0].shape[:3], operands[2].shape[3])
    )


def yes(holds: bool) -> str:
    return "yes" if holds else "no"


def links(names: tuple[str, ...]) -> str:
    return ", ".join(f"[{name}](../tests/attention/test_{name}.py)" for name in names)


def page() -> str:
    lines = [
        "# What runs where",
        "",
        "`python tools/support_matrix.py` writes this page from what the plan, the reference and",
        "the compiler answer; a test compares them. Features combine freely: the covering tests",
        "take every two of them together.",
        "",
        "| | Metal forward | Metal backward | reference | `torch.compile` | tested by |",
        "|---|---|---|---|---|---|",
    ]
    for x in FEATURES:
        cells = (x.name, *on_metal(x), on_reference(x), compiles(x), links(x.tests))
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "## What Metal does not take",
        "",
        "Such a call runs on the reference, with one warning; `explain` says the same.",
        "",
        "| reason | advice |",
        "|---|---|",
    ]
    for call in LIMITS:
        answer = plan_of(*call())
        lines.append(f"| {answer.refusal} | {answer.advice} |")
    lines += [
        "",
        "## Keys in a cache",
        "",
        "`flash_attn_with_kvcache`, and `flash_attn_varlen_func` with a `block_table` (packed",
        "queries). Metal says which kernel attends; why some of them get a copy of the pages,",
        "[decoding.md](decoding.md) tells. `explain_call` says the same of a call.",
        "",
        "| | Metal | reference | `torch.compile` | tested by |",
        "|---|---|---|---|---|",
    ]
    for one_of in CACHE_FEATURES:
        answers = (cache_on_metal(one_of), cache_on_reference(one_of), cache_compiles(one_of))
        lines.append(f"| {one_of.name} | {' | '.join(answers)} | {links(one_of.tests)} |")
    lines += [
        "",
        "Metal does not take, besides what is listed above:",
        "",
        "| reason | advice |",
        "|---|---|",
    ]
    for ask in CACHE_LIMITS:
        lines.append(f"| {ask().refusal} | {ask().advice} |")
    lines += [
        "",
        "The first is met by `torch.ops.orchard.flash_attn_decode` alone: the functions copy such",
        "pages. No path takes, and an error says:",
        "",
        *(f"* {refusal_of(x)}" for x in REFUSED),
        "",
        "`orchard_ops.flex_attention` takes Python functions for scores and masks: what of it runs",
        "where is in [its own table](flex-attention.md#what-runs-where), tested by",
        "[flex](../tests/flex/test_api.py).",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
