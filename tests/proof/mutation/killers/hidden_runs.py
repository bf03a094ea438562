"""Masks that hide many blocks in a row, which loops go past at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

from attention_cases import Case
from simulator import engine

from ..harness import DKV, DKV_PAIRS, DQ, DQ_FROM_DS, FORWARD, Sources
from .attention import F16, F32
from .compiled import compile_kernel
from .properties import Property
from .score_problems import Scores
from .score_runs import launched, left_by_the_repository, plan_of
from .scores import Scored

_KEYS = Case(75, 32 * 394 + 1, 16, num_heads=1, dtype=F32, mask="bool")
_QUERIES = _KEYS.but(q_len=_KEYS.kv_len, kv_len=75)
_ONE_ROW = (False, False, False, True)
_ONE_COLUMN = (False, False, True, False)
_WINDOW = _KEYS.but(head_dim=128, q_len=40, window_left=8444, diagonal=12566)
PROBLEMS: tuple[tuple[str, Scores, tuple[str, ...]], ...] = (
    ("keys", Scores(_KEYS, "runs"), (FORWARD, DQ)),
    # The first of two blocks of the map's rows that a threadgroup has sees keys before the second.
    ("keys, mirrored", Scores(_KEYS, "mirrored runs"), (FORWARD,)),
    ("keys, stored", Scores(_KEYS.but(head_dim=64, dtype=F16), "runs", store_ds=True),
     (FORWARD, DQ_FROM_DS)),
    ("keys in a window", Scores(_WINDOW, "runs"), (FORWARD, DQ)),
    ("keys beside ranges", Scores(_KEYS.but(ranges="prefix"), "runs"), (FORWARD, DQ)),
    ("keys of one row", Scores(_KEYS.but(mask_full=_ONE_ROW), "runs"), (FORWARD,)),
    ("queries", Scores(_QUERIES, "runs"), (DKV,)),
    ("queries in a window", Scores(_QUERIES.but(head_dim=64, dtype=F16, window_right=40), "runs"),
     (DKV,)),
    ("queries of pairs", Scores(_QUERIES.but(head_dim=96), "runs"), (DKV_PAIRS,)),
    ("queries of one column", Scores(_QUERIES.but(mask_full=_ONE_COLUMN), "runs"), (DKV,)),
)  # fmt: skip
_FAR = 32 * 270
"""Of the 269 hidden blocks of the map a loop looks at the 1st, the 129th and the 257th."""


def _counted(
    sources: Sources, note: Callable[[str], None], family: str, problem: Scores
) -> tuple[engine.Counters, int]:
    """What a launch did, and its threads."""
    known = dict(left_by_the_repository(problem))
    plan, params = plan_of(problem, sources, known["out"], family != FORWARD)
    kernel = next(dict(k) for k in plan["kernels"] if k["family"] == family)
    library = compile_kernel(sources, family, kernel, problem.case.head_dim == 16)
    note("compiled")
    _, counters = launched(problem, kernel, plan, params, known, library, sources.buffers)
    return counters, kernel["threads"] * kernel["groups"][0] * kernel["groups"][1]


def one_look_for_128_hidden_blocks(
    sources: Sources, note: Callable[[str], None], family: str, head_dim: int,
    hides: str, lengths: tuple[int, int], expected: int,
) -> None:  # fmt: skip
    """The same blocks are seen with and without hidden ones: of so many queries or keys, and of
    more. Each look costs every thread one operation of its simdgroup."""
    case = Case(32, 32, head_dim, num_heads=1, dtype=F32, mask="bool")
    along = "q_len" if family in (DKV, DKV_PAIRS) else "kv_len"
    near, far = (
        _counted(
            sources, note, family,
            Scores(case.but(**{along: n}), hides, store_ds=family == DQ_FROM_DS),
        )
        for n in lengths
    )  # fmt: skip
    assert near[1] == far[1] and near[0].mma == far[0].mma
    assert near[0].threadgroup_barriers == far[0].threadgroup_barriers
    looks = (far[0].simd_ops - near[0].simd_ops) / far[1]
    assert looks == expected, f"{looks} looks at the map, not {expected}"


@functools.cache
def killers() -> tuple[Property | Scored, ...]:
    return (*_looks(), *(
        Scored(f"{family}: runs of hidden blocks of {name}", family, problem)
        for name, problem, families in PROBLEMS
        for family in families
    ))  # fmt: skip


def _looks() -> Iterator[Property]:
    for family, head_dim in (
        (FORWARD, 16), (FORWARD, 128), (DQ, 16), (DQ_FROM_DS, 64), (DKV, 16), (DKV_PAIRS, 96),
    ):  # fmt: skip
        for name, hides, lengths, looks in (
            ("one look for 128 hidden blocks", "tail", (32, _FAR), 3),
            ("one look for 18 blocks between others", "gap", (64, 32 * 20), 1),
        ):
            test = functools.partial(
                one_look_for_128_hidden_blocks, family=family, head_dim=head_dim, hides=hides,
                lengths=lengths, expected=looks,
            )  # fmt: skip
            yield Property(f"{family}: {name}, {head_dim}", family, test)


@functools.cache
def checked() -> tuple[Scored, ...]:
    return tuple(
        Scored(f"{family}: runs of hidden blocks of {name}, checked", family, problem, check=True)
        for name, problem, (family, *_) in PROBLEMS
        if name in ("keys", "queries")
    )
