"""`explain`: which path a call would take, with which kernels, and what would change that."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, get_type_hints

import torch
from torch import Tensor

from . import calls, native, products, watch
from .arguments import Call, prepare
from .cache import AppendCall, CacheCall
from .descriptions import Description
from .ops import autograd
from .ops.flex import FlexCall
from .plan import Plan, append_plan, decode_plan, flex_plan, plan
from .scoring import NO_BACKWARD, Scoring

_BACKWARD = "attention_backward"
_MAPS = ("attention_mask_map", "attention_flex_map")  # which both directions run
"""How the names of kernels begin."""


@dataclass(frozen=True)
class Explanation:
    """The path of one call."""

    path: str
    """"metal", "reference", or "raises": ORCHARD_STRICT or impl="metal" forbids the reference."""
    reason: str
    """The reason for that path."""
    advice: str
    """A change that would make the call run on Metal, or run faster there. It may be empty."""
    kernels: tuple[str, ...]
    """Names of the Metal kernels: forward, then backward. Empty where none would run."""
    tiles: dict[str, str]
    """The tile and grid of each kernel, as a text for reading."""
    scratch_bytes: int = 0
    """The bytes that a backward takes, if it can, for speed while it runs."""
    products: str = ""
    """How many matrix products a backward has, why, and what is stored at a time, as a text for
    reading. Empty where there is none."""

    @property
    def forward_kernels(self) -> tuple[str, ...]:
        return tuple(name for name in self.kernels if not name.startswith(_BACKWARD))

    @property
    def backward_kernels(self) -> tuple[str, ...]:
        return tuple(name for name in self.kernels if name.startswith((_BACKWARD, *_MAPS)))

    def __str__(self) -> str:
        lines = [f"path: {self.path}", f"reason: {self.reason}"]
        lines += [f"kernel: {name} ({self.tiles[name]})" for name in self.kernels]
        if self.scratch_bytes:
            kib = self.scratch_bytes / 1024
            size = f"{kib:.1f} KiB" if kib < 1024 else f"{kib / 1024:.1f} MiB"
            lines.append(f"scratch: {size} for a backward")
        if self.products:
            lines.append(f"backward: {self.products}")
        if self.advice:
            lines.append(f"advice: {self.advice}")
        return "\n".join(lines)


_P = ParamSpec("_P")


def _of_the_arguments_of(
    take: Callable[_P, Call],
) -> Callable[[Callable[[Call], Explanation]], Callable[_P, Explanation]]:
    """Makes a function of a call into one of the arguments from which `take` makes the call."""
    signature = inspect.signature(take, eval_str=True).replace(return_annotation=Explanation)

    def decorate(explain_call: Callable[[Call], Explanation]) -> Callable[_P, Explanation]:
        @functools.wraps(explain_call)
        def explain(*args: _P.args, **kwargs: _P.kwargs) -> Explanation:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"orchard_ops.explain: {error}") from None
            with torch.random.fork_rng(devices=[]):  # taking a call draws its dropout seed
                call = take(*args, **kwargs)
            return explain_call(call)

        explain.__signature__ = signature  # type: ignore[attr-defined]
        explain.__annotations__ = get_type_hints(take) | {"return": Explanation}
        return explain

    return decorate


@_of_the_arguments_of(prepare)
def explain(call: Call) -> Explanation:
    """Says what `flash_attn` would do with the same arguments. Runs nothing.

    `explain_call` says it of the other functions, those for caches among them.

    The backward is explained for a gradient laid out like the output. A call of few queries has
    none on the decode kernel, which runs it where no operand requires a gradient or gradients are
    switched off.

    Raises:
        ValueError, TypeError: as `flash_attn`, for a malformed call.
    """
    args = call.flat()
    return explain_flat(*(args if autograd.needs_grad(args) else autograd.without_backward(args)))


def explain_call(function: Callable[_P, Any], *args: _P.args, **kwargs: _P.kwargs) -> Explanation:
    """Says what a function of this package would do with these arguments.

    ::

        explain_call(flash_attn_with_kvcache, q, k_cache, v_cache, cache_seqlens=lengths)

    No kernel runs, and nothing is written to a cache. What the function does before its attention,
    it does: it checks the arguments, rotates queries, and copies pages that no kernel reads in
    place. Where it attends in several calls, the first is explained, together with the append
    before it. A backward is explained where one can follow. What torch.compile has compiled is
    explained as the eager code that it was.

    Args:
        function: `flash_attn_with_kvcache`, `flash_attn_varlen_func`, `flex_attention`, any other
            attention function, or an op such as ``torch.ops.orchard.flash_attn_decode``.

    Raises:
        ValueError, TypeError, NotImplementedError: as the function, for a malformed call; also
            where it calls no attention.
    """
    found: list[Explanation] = []

    def answer(name: str, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append(_ASKED[name](*given, **named))
        if name != "flash_attn_append":
            raise _Answered

    said, eager = contextlib.suppress(_Answered), torch.compiler.set_stance("force_eager")
    with torch.random.fork_rng(devices=[]), watch.answering(answer), said, eager:
        function(*args, **kwargs)
    if not found:
        raise ValueError(
            f"orchard_ops.explain_call: {getattr(function, '__name__', function)} calls no "
            "attention of this package with these arguments"
        )
    return functools.reduce(_together, found)


class _Answered(Exception):
    """What there is to say is said."""


def _together(first: Explanation, then: Explanation) -> Explanation:
    """Of two calls, the path of which is Metal if that of both is."""
    said = first if first.path != "metal" else then
    return Explanation(
        said.path,
        said.reason,
        said.advice,
        first.kernels + tuple(x for x in then.kernels if x not in first.kernels),
        first.tiles | then.tiles,
        max(first.scratch_bytes, then.scratch_bytes),
        first.products or then.products,
    )


def _explain_forward(*arguments: Any, **named: Any) -> Explanation:
    names = ("query", "key", "value", *Scoring._fields, "impl")
    given = dict(zip(names, arguments)) | named
    found = explain_flat(*(given.get(name, "auto") for name in names))
    if given["key_span"] != NO_BACKWARD:
        return found
    forward = found.forward_kernels
    tiles = {name: found.tiles[name] for name in forward}
    return replace(found, kernels=forward, tiles=tiles, scratch_bytes=0, products="")


def _explain_decode(*arguments: Any, **named: Any) -> Explanation:
    return explain_cache(CacheCall(*arguments, **named))


def _explain_append(*arguments: Any, **named: Any) -> Explanation:
    call = AppendCall(*arguments, **named)
    call.check("orchard::flash_attn_append")
    return _explained(call.key_cache, call.impl, lambda: append_plan(*call))


def _explain_flex(*arguments: Any, **named: Any) -> Explanation:
    call = FlexCall.read((*arguments, *named.values()))
    found = explain_flex(call)
    if autograd.needs_grad(call[:3]):
        return found
    forward = found.forward_kernels
    tiles = {name: found.tiles[name] for name in forward}
    return replace(found, kernels=forward, tiles=tiles, scratch_bytes=0, products="")


def _explain_flex_reference(call: Description, reason: str) -> Explanation:
    if call.device != "mps":
        return _without_metal(call.device, "auto", reason, _MOVE)
    advice = _INSTALL if native.why_not() else "docs/flex-attention.md says what runs on Metal"
    return _without_metal(call.device, "auto", reason, advice)


_ASKED: dict[str, Callable[..., Explanation]] = {
    "flash_attn_fwd": _explain_forward,
    "flash_attn_decode": _explain_decode,
    "flash_attn_append": _explain_append,
    "flex_attn_fwd": _explain_flex,
    "flex_attention": _explain_flex_reference,
}


def explain_cache(call: CacheCall) -> Explanation:
    """`explain` for a call of ``orchard::flash_attn_decode``."""
    call.check("orchard::flash_attn_decode")
    return _explained(call.query, call.impl, lambda: decode_plan(*call))


def explain_flex(call: FlexCall) -> Explanation:
    """`explain` for a call of ``orchard::flex_attn_fwd``, and for the backward that follows."""
    call.check("orchard::flex_attn_fwd")
    arguments = (*call[:3], *call.scoring, call.impl)
    return _explained(call.query, call.impl, lambda: flex_plan(*arguments))


def explain_flat(*arguments: Any) -> Explanation:
    """`explain` for the arguments of ``orchard::flash_attn_fwd``."""
    return _explained(arguments[0], arguments[-1], lambda: plan(*arguments))


_MOVE, _INSTALL = 'move them to "mps"', "see docs/install.md"


def _without_metal(device: str, impl: str, reason: str, advice: str) -> Explanation:
    path = "raises" if calls.insists_on_metal(device, impl) else "reference"
    return Explanation(path, reason, advice, (), {})


def _explained(of: Tensor, impl: str, ask: Callable[[], Plan]) -> Explanation:
    device = of.device.type
    if device != "mps":
        return _without_metal(device, impl, f"{calls.NOT_MPS}{device}, not on mps", _MOVE)
    missing = native.why_not()
    if missing:
        return _without_metal(device, impl, missing, _INSTALL)
    chosen = ask()
    if chosen.refusal:
        return _without_metal(device, impl, chosen.why_not, chosen.advice)
    tiles = {kernel.name: kernel.tile for kernel in chosen.kernels}
    reason = "the Metal kernels cover every argument of this call"
    return Explanation(
        "metal", reason, chosen.advice, tuple(tiles), tiles, chosen.scratch_bytes,
        products.of_plan(chosen),
    )  # fmt: skip
