"""What a peer's results are compared with before it is timed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from orchard_ops.testing import assert_attention_close

from .. import peer, reference
from .problems import Problem

_HEADS = 4
_RESULTS = ("out", "lse", "dq", "dk", "dv")
LOOSE = 10.0
"""Others never promised our rule: a peer may be this many same-dtype errors away, which is told."""
_FLOOR = 1e-5
"""Of the largest number of a result: what float32 sums may be off where the dtype's error is 0."""

Errors = dict[str, tuple[float, float]]


class Gate:
    """float64 and same-dtype mathematics of some heads: of all heads of some groups.

    With ``rounded_query``, of the query as PyTorch 2.13's kernel rounds it.
    """

    def __init__(self, problem: Problem, operands: dict[str, Tensor], rounded_query: bool = False):
        kv_heads = problem.batch * problem.num_kv_heads
        count = min(kv_heads, max(1, _HEADS // problem.group))
        of_keys = torch.linspace(0, kv_heads - 1, count).long()
        of_queries = of_keys.unsqueeze(1) * problem.group + torch.arange(problem.group)
        device = operands["q"].device
        self._of_keys, self._of_queries = of_keys.to(device), of_queries.flatten().to(device)
        scoring, given = problem.scoring(), dict(operands)
        if rounded_query:
            given["q"], scale = peer.rounded_query(given["q"], problem.scale)
            scoring = replace(scoring, scale=scale)
        cut = [self._cut(name, given[name]) for name in ("q", "k", "v", "dout")]
        self._exact = reference.attention(*cut, None, scoring, torch.float64)
        self._eager = reference.attention(*cut, None, scoring, given["q"].dtype)

    def _cut(self, name: str, x: Tensor) -> Tensor:
        heads = self._of_keys if name in ("k", "v", "dk", "dv") else self._of_queries
        return x.flatten(0, 1)[heads].unsqueeze(0)

    def check(self, results: dict[str, Tensor], strict: bool) -> tuple[Errors, str]:
        """The largest error of each result and that of same-dtype mathematics; and how the results
        fail the rule of orchard_ops.testing, or "".

        Raises:
            AssertionError: a result is not finite, or more than LOOSE same-dtype errors away, or,
                if ``strict``, fails the rule.
        """
        for name, x in results.items():
            if not torch.isfinite(x).all():
                raise AssertionError(f"{name}: NaN or infinity")
        cut = {name: self._cut(name, x) for name, x in results.items()}
        errors: Errors = {}
        for name, x in cut.items():
            exact = getattr(self._exact, name).double()
            ours, eager = (
                (y.double() - exact).abs().max().item() for y in (x, getattr(self._eager, name))
            )
            errors[name] = (ours, eager)
            if not ours <= LOOSE * eager + _FLOOR * exact.abs().max().item():
                raise AssertionError(
                    f"{name}: error {ours:.2e}, same-dtype mathematics {eager:.2e}"
                )
        try:
            ordered = [cut.get(name) for name in _RESULTS]
            assert_attention_close(ordered, self._exact, self._eager)
        except AssertionError as error:
            if strict:
                raise
            return errors, str(error).split("\n")[0][:300]
        return errors, ""
