"""`explain`: which path a call would take, with which kernels, and what would change that."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, get_type_hints

import torch

from . import calls, native
from .arguments import Call, prepare
from .ops import autograd
from .plan import plan

_BACKWARD = "attention_backward"
_MASK_MAP = "attention_mask_map"  # which both directions run
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
    """The bytes that a backward takes, if it can, for the gradient of the scores while it runs."""

    @property
    def forward_kernels(self) -> tuple[str, ...]:
        return tuple(name for name in self.kernels if not name.startswith(_BACKWARD))

    @property
    def backward_kernels(self) -> tuple[str, ...]:
        return tuple(name for name in self.kernels if name.startswith((_BACKWARD, _MASK_MAP)))

    def __str__(self) -> str:
        lines = [f"path: {self.path}", f"reason: {self.reason}"]
        lines += [f"kernel: {name} ({self.tiles[name]})" for name in self.kernels]
        if self.scratch_bytes:
            kib = self.scratch_bytes / 1024
            size = f"{kib:.1f} KiB" if kib < 1024 else f"{kib / 1024:.1f} MiB"
            lines.append(f"scratch: {size} for a backward")
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

    The backward is explained for a gradient laid out like the output. A call of few queries has
    none on the decode kernel, which runs it where no operand requires a gradient or gradients are
    switched off.

    Raises:
        ValueError, TypeError: as `flash_attn`, for a malformed call.
    """
    args = call.flat()
    return explain_flat(*(args if autograd.needs_grad(args) else autograd.without_backward(args)))


def explain_flat(*arguments: Any) -> Explanation:
    """`explain` for the arguments of ``orchard::flash_attn_fwd``."""
    device, impl = arguments[0].device.type, arguments[-1]
    other_path = "raises" if calls.insists_on_metal(device, impl) else "reference"

    def without_metal(reason: str, advice: str) -> Explanation:
        return Explanation(other_path, reason, advice, (), {})

    if device != "mps":
        return without_metal(f"{calls.NOT_MPS}{device}, not on mps", 'move them to "mps"')
    missing = native.why_not()
    if missing:
        return without_metal(missing, "see docs/install.md")
    chosen = plan(*arguments)
    if chosen.refusal:
        return without_metal(chosen.why_not, chosen.advice)
    tiles = {kernel.name: kernel.tile for kernel in chosen.kernels}
    reason = "the Metal kernels cover every argument of this call"
    return Explanation("metal", reason, chosen.advice, tuple(tiles), tiles, chosen.scratch_bytes)
