"""Which kernels take a call of `flex_attention`: the fixed ones of `flash_attn`, those with the
text of the mods, or the reference.

Where a BlockMask has blocks, its lists decide what is seen. The fixed kernels do not read them and
take the call where they say what the mask_mod says.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .. import calls, native, plan, watch
from ..arguments import prepare
from ..attention import run, run_with_lse
from ..descriptions import describe_flex
from ..environment import switched_on
from ..ops import flex as op
from ..ops.kernels import no_autocast
from ..ops.schema import FLEX_FORWARD
from . import additive, reference
from .arguments import OP
from .block_lists import Said, lists_follow
from .block_mask import Blocks
from .decided import FORWARD_OP, KnownCall
from .known import Known, RangeRule
from .mod import MAX_CAPTURES, Function, NotLowered
from .traces import Use, known_call

_NAME = "flex_attention"
_functorch = torch._C._functorch
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_GRADIENT = (
    "a tensor that score_mod captures requires grad, and Metal has the gradient of what is added "
    "to the score alone, as in score + table[h, q_idx, kv_idx]; detach() what is not trained"
)
_TRANSFORMED = (
    "a transform of torch.func maps a tensor that a mod captures, or differentiates by it, and "
    "Metal has no rule for that: take gradients with torch.autograd.grad, and make what is mapped "
    "a part of query's batch"
)
_MAX_SCORES = (
    "max_scores is asked for, and the kernels do not keep the largest score of a row, which the "
    "reference finds; lse is at least as large, and within log(kv_len) of it"
)


class _Asked(NamedTuple):
    """A call of `attend` that has been checked."""

    query: Tensor
    key: Tensor
    value: Tensor
    score: Use | None
    mask: Use | None
    blocks: Blocks | None
    scale: float
    wants_lse: bool

    @property
    def of_score(self) -> tuple[Tensor, ...]:
        """What score_mod captures."""
        return () if self.score is None else self.score.captures

    @property
    def of_mask(self) -> tuple[Tensor, ...]:
        return () if self.mask is None else self.mask.captures


class _Texts(NamedTuple):
    score: str
    mask: str
    captures: tuple[Tensor, ...]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score: Use | None,
    mask: Use | None,
    blocks: Blocks | None,
    scale: float,
    wants_lse: bool = True,
    in_graph: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """out and lse of a call that has been checked. An lse that is not wanted may be None, or empty.

    `in_graph`: torch.compile makes a graph of the call, which will run with other numbers.
    """
    for use in (score, mask):
        if use is not None:
            _check_captures(use, query)
    asked = _Asked(query, key, value, score, mask, blocks, scale, wants_lse)
    reason = why_not_metal(query, value)
    if reason is None and any(use is not None and use.kept is None for use in (score, mask)):
        reason = _TRANSFORMED
    if reason is None:
        found = _by_fixed_kernels(asked, in_graph)
        if found is not None:
            return found
    if reason is None and _is_mapped(query, key, value, *asked.of_score, *asked.of_mask):
        reason = (
            "torch.vmap is active, and the kernels have no rule for it: make what is mapped a part "
            "of query's batch"
        )
    states, q_block, kv_block = _states(blocks, query, key)
    if reason is None and score is not None and _is_trained(score):
        if additive.takes(score):
            with no_autocast(query):
                return additive.attend(
                    query, key, value, score, mask, states, q_block, kv_block, scale
                )
        reason = _GRADIENT
    if reason is None:
        texts = _texts(score, mask, query)
        if isinstance(texts, str):
            reason = texts
        else:
            numbers = (states, q_block, kv_block, texts.score, texts.mask, scale)
            arguments = (query, key, value, texts.captures, *numbers)
            refused = "" if is_traced(query) else op.why_not_metal(*arguments)
            if not refused and wants_lse:
                return op.attend(*arguments)
            if not refused:  # lse is work of its own
                scoring = op.FlexScoring(texts.captures, *numbers)
                return FLEX_FORWARD(query, key, value, *scoring, "auto")[0], None
            reason = refused
    described = describe_flex(query, key, value, score is not None, mask is not None, scale)
    watch.ask(_NAME, described, reason)
    calls.record_reference(_NAME, reason, described, "auto")
    if not is_traced(query):
        watch.tell(_NAME, (described,), reason)
    with no_autocast(query):
        functions = _functions(score, mask)
        return reference.attend(query, key, value, *functions, states, q_block, kv_block, scale)


def max_scores(
    query: Tensor,
    key: Tensor,
    score: Use | None,
    mask: Use | None,
    blocks: Blocks | None,
    scale: float,
) -> Tensor:
    """The largest score of each query. It has no gradient, as PyTorch's has none."""
    if why_not_metal(query, key) is None:
        described = describe_flex(query, key, key, score is not None, mask is not None, scale)
        calls.record_reference(_NAME, _MAX_SCORES, described, "auto")
        if not is_traced(query):
            watch.tell(_NAME, (described,), _MAX_SCORES)
    states, q_block, kv_block = _states(blocks, query, key)
    with no_autocast(query):
        functions = _functions(score, mask)
        return reference.max_scores(query, key, *functions, states, q_block, kv_block, scale)


def _states(blocks: Blocks | None, query: Tensor, key: Tensor) -> tuple[Tensor | None, int, int]:
    """The states of blocks for the call's lengths, and the sizes of a block."""
    if blocks is None:
        return None, 1, 1
    return blocks.states(query.shape[2], key.shape[2]), *blocks[1:]


def _functions(score: Use | None, mask: Use | None) -> tuple[Function | None, Function | None]:
    """score_mod and mask_mod as the reference calls them."""
    return None if score is None else score.function, None if mask is None else mask.function


def _by_fixed_kernels(asked: _Asked, in_graph: bool) -> tuple[Tensor, Tensor | None] | None:
    """out and lse by `flash_attn`, where its arguments say the same as the mods and the blocks."""
    query, key, value, score, mask, blocks, scale, wants_lse = asked
    known = known_call(score, mask)
    of_mask = Known() if mask is None else known_call(None, mask)
    if known is None or of_mask is None or _is_mapped(*asked.of_score, *asked.of_mask):
        return None
    rule = known.rule(asked.of_score, asked.of_mask)
    asks_numbers = blocks is not None or (rule is not None and rule.kind == "documents")
    if asks_numbers and in_graph:
        return _decided(asked, known, of_mask, rule)
    if asks_numbers and _has_no_numbers(query):
        return None
    arguments = known.arguments(asked.of_score, asked.of_mask, query, key)
    if arguments is None:
        return None
    if blocks is not None:
        ranges = None if of_mask.ranges is None else arguments["key_ranges"]
        said = Said.of(of_mask.window_left, of_mask.window_right, ranges, rule)
        if not lists_follow(blocks, said, (*query.shape[:3], key.shape[2])):
            return None
    enable_gqa = query.shape[1] != key.shape[1]
    with no_autocast(query):  # the operands are cast; a table is added to scores as it is
        call = prepare(query, key, value, scale=scale, enable_gqa=enable_gqa, **arguments)
    return run_with_lse(call) if wants_lse else (run(call), None)


def _decided(
    asked: _Asked, known: Known, of_mask: Known, rule: RangeRule | None
) -> tuple[Tensor, Tensor] | None:
    """The same in a graph: an op that decides when it runs. It remembers what it finds of a
    tensor's memory, which is right where that is the user's and not one that the graph takes for
    one tensor after another."""
    query, key, value, score, mask, blocks, scale, wants_lse = asked
    lists = () if blocks is None else tuple(x for x in blocks.lists if x is not None)
    source = None if rule is None else rule.source
    if not all(is_given(x) for x in (*lists, source) if x is not None):
        return None
    if _is_mapped(query, key, value) or (score is not None and _is_trained(score)):
        return None
    texts = _texts(score, mask, query)
    arguments = known.of_score(asked.of_score, query, key)
    if isinstance(texts, str) or arguments is None:
        return None
    windows = (known.window_left, known.window_right, of_mask.window_left, of_mask.window_right)
    q_block, kv_block = (1, 1) if blocks is None else blocks[1:]
    call = KnownCall(
        captures=list(texts.captures),
        lists=list(lists),
        block_q=q_block,
        block_kv=kv_block,
        score=texts.score,
        mask=texts.mask,
        scale=scale,
        attn_mask=arguments.get("attn_mask"),
        alibi_slopes=arguments.get("alibi_slopes"),
        softcap=known.softcap,
        windows=[*windows, int(of_mask.ranges is not None)],
        ranges="" if rule is None else rule.kind,
        source=source,
        number=0 if rule is None else rule.number,
        lse=wants_lse,
        alone=True,
    )
    out, _, _, lse = FORWARD_OP(query, key, value, *call)
    return out, lse


def is_given(x: Tensor) -> bool:
    """Whether a tensor of a graph is one that the graph is given, and not one that it makes."""
    x = _unwrapped(x)
    if isinstance(x, FunctionalTensor):
        x = torch._from_functional_tensor(x.elem)
    if not isinstance(x, FakeTensor):
        return type(x) in (Tensor, torch.nn.Parameter)
    # What FakeTensorMode has made of real tensors.
    given = x.fake_mode.fake_tensor_converter.meta_converter.tensor_memo.values()
    return any(
        own.untyped_storage() is x.untyped_storage()
        and own.dtype == x.dtype
        and own.shape == x.shape
        and own.stride() == x.stride()
        and own.storage_offset() == x.storage_offset()
        for own in given
    )


def is_traced(x: Tensor) -> bool:
    """Whether a compiler or a transform asks, with tensors that have no memory of their own."""
    return _functorch.is_functorch_wrapped_tensor(x) or _has_no_numbers(x)


def _has_no_numbers(x: Tensor) -> bool:
    """Whether a compiler asks."""
    return isinstance(_unwrapped(x), (FakeTensor, FunctionalTensor))


def _unwrapped(x: Tensor) -> Tensor:
    """What a transform of torch.func has wrapped."""
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return x


def why_not_metal(query: Tensor, value: Tensor) -> str | None:
    """The reason why no Metal kernel takes a call with such operands, if there is one."""
    if query.device.type != "mps":
        return f"{calls.NOT_MPS}{query.device.type}, not on mps"
    if native.why_not() is not None:
        return native.why_not()
    if switched_on("ORCHARD_DISABLE_METAL"):
        return "ORCHARD_DISABLE_METAL is set"
    if query.dtype not in _DTYPES:
        return "the dtype is not float16, bfloat16 or float32"
    if query.shape[-1] > plan.WIDEST_HEAD_DIM or value.shape[-1] > plan.WIDEST_HEAD_DIM:
        return f"head_dim is above {plan.WIDEST_HEAD_DIM}"
    return None


def _is_mapped(*tensors: Tensor) -> bool:
    """Whether torch.vmap maps one of the tensors."""
    if not torch._C._are_functorch_transforms_active():
        return False
    for x in tensors:
        while _functorch.is_functorch_wrapped_tensor(x):
            if _functorch.is_batchedtensor(x):
                return True
            x = _functorch.get_unwrapped(x)
    return False


def _check_captures(use: Use, query: Tensor) -> None:
    for x in use.captures:
        if x.device != query.device and not (x.dim() == 0 and x.device.type == "cpu"):
            raise ValueError(
                f"{OP}: tensors that {use.kind}_mod captures must be on query's device "
                f"{query.device}; got one of shape {tuple(x.shape)} on {x.device}: move it before "
                "the mod is made"
            )


def _is_trained(score: Use) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in score.captures)


def _texts(score: Use | None, mask: Use | None, query: Tensor) -> _Texts | str:
    """The mods' Metal text, or why they have none."""
    texts: list[str] = []
    captures: tuple[Tensor, ...] = ()
    for use in (score, mask):
        if use is None:
            texts.append("")
            continue
        try:
            mod = use.mod(len(captures))
        except NotLowered as error:
            return f"{use.kind}_mod: {error}"
        texts.append(mod.text)
        captures += mod.captures
    if len(captures) > MAX_CAPTURES:
        return f"the mods capture {len(captures)} tensors, more than {MAX_CAPTURES}"
    if any(0 in x.shape for x in captures):
        return "a tensor that the mods capture has no elements"
    return _Texts(texts[0], texts[1], tuple(_moved(x, query.device) for x in captures))


def _moved(capture: Tensor, device: torch.device) -> Tensor:
    return (capture.float() if capture.dtype == torch.float64 else capture).to(device)
