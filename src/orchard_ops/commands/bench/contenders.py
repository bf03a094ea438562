"""Who is measured: this package's op and `F.scaled_dot_product_attention`, called alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from ...calls import NOT_MPS, stats
from ...explain import explain
from ..environment import environment_variables
from .cases import Case

OURS = "orchard_ops"
SDPA = "sdpa"
SDPA_MATH = "sdpa-math"

_FUSED = {
    "_scaled_dot_product_attention_math_for_mps": "PyTorch's MPS attention without a backward",
    "_scaled_dot_product_flash_attention_for_cpu": "PyTorch's flash attention for the CPU",
}


@dataclass(frozen=True)
class Contender:
    """An attention function (q, k, v, is_causal) -> out.

    Several contenders take turns in one case. Another way to run our kernels is one more contender.
    """

    name: str
    attention: Callable[[Tensor, Tensor, Tensor, bool], Tensor]
    is_ours: bool = False
    """Whether its results must pass the gate before it is measured."""
    variables: tuple[tuple[str, str], ...] = ()
    """The environment variables of its calls, which choose how our kernels run (variants.py)."""

    def environment(self) -> AbstractContextManager[None]:
        """Sets its variables for the block. The setting is not timed."""
        return environment_variables(**dict(self.variables))

    def call(self, operands: Sequence[Tensor], case: Case) -> tuple[Tensor, ...]:
        """(out,), or (out, dq, dk, dv) in training."""
        q, k, v, dout = operands
        if not case.training:
            with torch.no_grad():
                return (self.attention(q, k, v, case.problem.is_causal),)
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out = self.attention(q, k, v, case.problem.is_causal)
        return (out.detach(), *torch.autograd.grad(out, (q, k, v), dout))


def ours(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return torch.ops.orchard.flash_attn(q, k, v, is_causal=is_causal, enable_gqa=grouped)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=grouped)


def _sdpa_math(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return _sdpa(q, k, v, is_causal)


CONTENDERS = {
    c.name: c
    for c in (
        Contender(OURS, ours, is_ours=True),
        Contender(SDPA, _sdpa),
        Contender(SDPA_MATH, _sdpa_math),
    )
}


class _OperatorNames(TorchDispatchMode):
    """Collects the names of the aten operators that a call runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict | None = None
    ) -> Any:
        self.names.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def path(contender: Contender, operands: Sequence[Tensor], case: Case) -> str:
    """Names the kernels that this contender runs. It makes a call to find out.

    For our op this is the answer of `explain`, unless the call fell back; for SDPA these are the
    operators that the call ran.
    """
    if contender.is_ours:
        before = stats().fallbacks
        contender.call(operands, case)
        q, k, v, _ = operands
        explanation = explain(q, k, v, is_causal=case.problem.is_causal, enable_gqa=True)
        if explanation.path == "metal" and stats().fallbacks == before:
            kernels = explanation.kernels if case.training else explanation.kernels[:1]
            return f"Metal: {', '.join(kernels)}"
        reasons = [r for r in stats().reference if not r.startswith(NOT_MPS)]
        if explanation.path == "metal" and reasons:
            return f"reference: {reasons[-1]}"
        return f"reference: {explanation.reason}"
    with _OperatorNames() as ran:
        contender.call(operands, case)
    for operator, words in _FUSED.items():
        if operator in ran.names:
            return f"fused: {words} ({operator})"
    fused = sorted(name for name in ran.names if name.startswith("_scaled_dot_product"))
    if fused:
        return f"fused: {', '.join(fused)}"
    return "unfused: PyTorch's math path, which stores the L x S matrix"
