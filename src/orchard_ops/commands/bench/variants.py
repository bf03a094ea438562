"""Other ways to run our own kernels: further tiles of the forward, and budgets for scratch.

Each is one more contender, which must pass the same gate and takes turns with the default. Its
calls run under ORCHARD_STRICT, so that they fail where Metal cannot run them: a fallback must not
get a figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from ... import native
from ...arguments import prepare
from ...plan import Kernel, plan
from ..place import Place
from .cases import DTYPES, Case
from .contenders import Contender, ours

TILE = "tile "
SCRATCH = "scratch "
"""How the names of these contenders begin."""

_FORWARD = "attention_forward"
_STRICT = ("ORCHARD_STRICT", "1")


def tile(name: str) -> Contender:
    """The forward in another tile of the plan's."""
    variables = (("ORCHARD_TILES", f"{_FORWARD}={name}"), _STRICT)
    return Contender(f"{TILE}{name}", ours, is_ours=True, variables=variables)


def scratch(megabytes: int) -> Contender:
    """A backward that may store dS in so many MiB."""
    variables = (("ORCHARD_BACKWARD_SCRATCH_MB", str(megabytes)), _STRICT)
    return Contender(f"{SCRATCH}{megabytes} MiB", ours, is_ours=True, variables=variables)


def _forward_plan(case: Case, device: torch.device) -> Kernel:
    """The forward kernel that the plan chooses.

    Raises:
        ValueError: Metal kernels cannot run the case.
    """
    problem = case.problem

    def empty(heads: int) -> Tensor:
        shape = (problem.batch, heads, problem.length, problem.head_dim)
        return torch.empty(shape, dtype=DTYPES[problem.dtype], device=device)

    k = empty(problem.num_kv_heads)
    q = empty(problem.num_heads)
    call = prepare(q, k, k, is_causal=problem.is_causal, enable_gqa=True)
    chosen = plan(*call.flat())
    if chosen.refusal:
        raise ValueError(f"{case}: the Metal kernels cannot run it: {chosen.why_not}")
    kernel = chosen.kernels[0]
    if kernel.family != _FORWARD:
        raise ValueError(f"{case}: the first kernel is {kernel.name}, not the forward's")
    return kernel


def of_cases(
    chosen: Sequence[Case],
    tiles: Sequence[str] | None,
    scratch_mb: Sequence[int] | None,
    place: Place,
) -> dict[Case, list[Contender]]:
    """The further contenders of each case: tiles in forward cases, scratch budgets in training.

    Args:
        tiles: names or patterns of tiles, empty for all of them; None: none.
        scratch_mb: budgets in MiB; None: none.

    Raises:
        ValueError: Metal kernels do not run here or not in a case, or no case has such a tile.
    """
    options = [
        o for o, given in (("--tiles", tiles), ("--scratch", scratch_mb)) if given is not None
    ]
    if not options:
        return {case: [] for case in chosen}
    missing = native.why_not()
    if place.device.type != "mps" or missing:
        why = missing if place.device.type == "mps" else f"this runs on {place.device.type}"
        raise ValueError(f"{' and '.join(options)}: no Metal kernels to choose from here: {why}")
    for option, mode in (("--tiles", "forward"), ("--scratch", "training")):
        if option in options and all(case.mode != mode for case in chosen):
            raise ValueError(f"{option} is about {mode}, which --modes leaves out")
    further: dict[Case, list[Contender]] = {case: [] for case in chosen}
    unmatched: set[str] = set(tiles or ())
    available: list[str] = []
    for case in chosen:
        if case.training:
            further[case] = [scratch(megabytes) for megabytes in dict.fromkeys(scratch_mb or ())]
        elif tiles is not None:
            kernel = _forward_plan(case, place.device)
            names = kernel.alternatives
            available += names
            unmatched -= {p for p in unmatched if any(fnmatchcase(n, p) for n in names)}
            further[case] = [
                tile(name)
                for name in names
                if name != kernel.tile_name
                and (not tiles or any(fnmatchcase(name, p) for p in tiles))
            ]
    if unmatched:
        raise ValueError(
            f"--tiles: no tile is called {', '.join(sorted(unmatched))}; there are "
            f"{', '.join(dict.fromkeys(available))}"
        )
    return further
