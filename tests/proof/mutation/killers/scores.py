"""Kernels on problems whose scores are not plain: softcap, ALiBi, masks and their gradients, key
ranges, sinks, value widths.

A problem runs once by the repository's kernels; then each kernel that a killer is about runs anew
from the sources under test, with what the others have left, and its results are judged by float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from attention_cases import Case

from ..harness import (
    DELTA,
    DKV,
    DKV_PAIRS,
    DMASK,
    DMASK_FROM_DS,
    DMASK_ROWS,
    DMASK_SUM,
    DMASK_SUM_KEYS,
    DQ,
    DQ_FROM_DS,
    DSINKS,
    FORWARD,
    MASK_MAP,
    Sources,
)  # fmt: skip
from .attention import BF16, F16, F32, DscoreRows
from .compiled import compile_kernel
from .score_problems import Scores
from .score_results import compare, products
from .score_runs import launched, left_by_the_repository, plan_of


@dataclass(frozen=True)
class Scored:
    """A kernel on a problem whose scores are not plain."""

    name: str
    family: str
    problem: Scores
    check: bool = False

    def run(self, sources: Sources, note: Callable[[str], None] = lambda _: None) -> None:
        problem, family = self.problem, self.family
        known = dict(left_by_the_repository(problem))
        plan, params = plan_of(problem, sources, known["out"], family != FORWARD)
        kernel = next(dict(k) for k in plan["kernels"] if k["family"] == family)
        library = compile_kernel(sources, family, kernel, self.check)
        note("compiled")
        results, counters = launched(problem, kernel, plan, params, known, library, sources.buffers)
        compare(problem, family, results, DscoreRows.of(params))
        expected = products(problem, kernel)
        assert counters.mma == expected, f"{counters.mma} matrix products, not {expected}"


_BASE = Case(41, 70, 16, batch=2, num_heads=4, num_kv_heads=2, dtype=F32)
_WIDE = _BASE.but(head_dim=64, num_heads=2, num_kv_heads=1)
_ALL = _BASE.but(
    softcap=1.5, alibi="batch", mask="float32", sinks=True, window_left=40, window_right=21,
    diagonal=9, dropout_p=0.2, value_dim=13,
)  # fmt: skip
_BIAS = _BASE.but(mask="float32")
_NARROW = Case(31, 20, 16, num_heads=2, num_kv_heads=1, dtype=F32, mask="float32")
_RANGES = _BASE.but(ranges="any", q_len=75, kv_len=100)
PROBLEMS: dict[str, Scores] = {
    "all together": Scores(_ALL, "rows"),
    "all together, half": Scores(_ALL.but(dtype=F16, mask="same", value_dim=8, kv_len=66), "rows"),
    "softcap": Scores(_BASE.but(softcap=0.7, scale=1.0), dlse=False),
    "softcap, half": Scores(_BASE.but(softcap=0.7, scale=1.0, dtype=F16)),
    "softcap, far": Scores(_BASE.but(softcap=3.0, scale=60.0, dtype=F16)),
    "softcap, high": Scores(_BASE.but(softcap=5000.0)),
    "softcap, high, pairs": Scores(_WIDE.but(head_dim=96, softcap=5000.0)),
    "softcap in a window": Scores(_BASE.but(softcap=0.7, scale=1.0, q_len=75, kv_len=100,
                                            window_left=20, window_right=9)),
    "softcap of pairs in a window": Scores(_WIDE.but(head_dim=96, softcap=0.7, q_len=75, kv_len=100,
                                                     window_left=20, window_right=9)),
    "late scores": Scores(_BASE.but(mask="float32", scale=2.0**-40, dtype=F16, kv_len=64), "late"),
    "ALiBi by head": Scores(_BASE.but(alibi="head", diagonal=-7)),
    "sinks of whole blocks": Scores(Case(40, 9, 16, batch=2, num_heads=2, sinks=True)),
    "sinks far above": Scores(Case(40, 9, 64, sinks=True), raised=92.0),
    "sinks, alone": Scores(_BASE.but(sinks=True, window_right=0, diagonal=-10)),
    "blocks of a mask": Scores(_BASE.but(mask="bool", q_len=75, kv_len=100), "blocks"),
    "one query less than blocks of a mask": Scores(_BASE.but(mask="bool", q_len=63)),
    "pairs of a mask": Scores(_BASE.but(mask="bool", kv_len=98), "blocks", side_by_side=True),
    "firsts of blocks": Scores(_BASE.but(mask="bool", q_len=203, kv_len=164), "firsts"),
    "firsts of blocks, stored": Scores(_WIDE.but(mask="bool", q_len=203, kv_len=164), "firsts",
                                       store_ds=True),
    "firsts of blocks of pairs": Scores(_WIDE.but(head_dim=96, mask="bool", q_len=203, kv_len=164),
                                        "firsts"),
    "padding": Scores(_BASE.but(mask="bool", mask_full=(True, False, False, True), sinks=True),
                      "padding"),
    "rows of a mask": Scores(_BASE.but(mask="bool", mask_full=(True, True, True, False), q_len=75,
                                       window_left=20, window_right=9, diagonal=5)),
    "one for all": Scores(_BASE.but(mask="float32", mask_full=(False, False, False, True),
                                    kv_len=66), side_by_side=True),
    "outer batches": Scores(_BASE.but(batch=4, mask="bool"), "rows", folded=(2, 1)),
    "inner batches": Scores(_BASE.but(batch=4, mask="same", kv_len=66), "rows", folded=(1, 2),
                            side_by_side=True),
    "transposed": Scores(_BASE.but(mask="float32", q_len=75), "blocks", transposed=True,
                         mask_grad=True),
    "half of a mask": Scores(_BASE.but(mask="bool", q_len=130), "half"),
    "heads of a mask of few keys": Scores(_BASE.but(mask="bool", kv_len=20,
                                                    mask_full=(True, True, False, False))),
    "heads of a mask": Scores(_BASE.but(mask="bool", mask_full=(True, True, False, False))),
    "first keys of blocks": Scores(_BASE.but(mask="bool"), "first keys"),
    "halves of blocks": Scores(_WIDE.but(head_dim=96, mask="bool"), "sixteens"),
    "padding in a window": Scores(_BASE.but(mask="bool", mask_full=(True, False, False, True),
                                            window_right=5, diagonal=3), "padding"),
    "outer and inner batches": Scores(_BIAS.but(batch=4), "rows", folded=(2, 2), mask_grad=True),
    "half of a mask of batches": Scores(_BASE.but(batch=4, mask="bool"), "half", folded=(2, 2)),
    "half of a mask of outer batches": Scores(_BASE.but(batch=4, mask="bool"), "half",
                                              folded=(2, 1)),
    "sinks of many rows": Scores(Case(300, 9, 16, batch=2, sinks=True)),
    "softcap, hardly": Scores(_BIAS.but(softcap=1000.0), mask_grad=True),
    "narrow values": Scores(_BASE.but(head_dim=24, value_dim=9)),
    "wide values": Scores(_BASE.but(head_dim=9, value_dim=24)),
    # What lies behind the last key that a row sees, also within its row of a block, is NaN.
    "wide values, in chunks": Scores(_BASE.but(head_dim=24, value_dim=32, kv_len=80,
                                               window_right=23)),
    "values of their own width": Scores(_BASE.but(head_dim=192, value_dim=128, dtype=F16)),
    "values of their own width, stored": Scores(
        _BASE.but(head_dim=170, value_dim=99, num_heads=2, window_right=0, diagonal=9),
        store_ds=True),
    "stored": Scores(_WIDE.but(softcap=1.5, mask="bool", value_dim=40, window_left=50), "blocks",
                     store_ds=True),
    "stored, tall": Scores(_WIDE.but(alibi="head", mask="float32", q_len=75, dropout_p=0.2),
                           "blocks", store_ds=True),
    "pairs": Scores(_WIDE.but(head_dim=96, q_len=75, softcap=1.5, alibi="head", mask="float32"),
                    "blocks"),
    "pairs, stored": Scores(_WIDE.but(head_dim=96, value_dim=50, mask="bool", softcap=2.0,
                                      sinks=True), "rows", store_ds=True),
    "bfloat16": Scores(_BASE.but(dtype=BF16, mask="same", kv_len=66, alibi="head"), "padding",
                       side_by_side=True),
    "bias of pairs": Scores(_BIAS.but(mask_full=(False, True, True, True), q_len=75, kv_len=100,
                                      window_left=30, window_right=15, diagonal=12),
                            "blocks", mask_grad=True),
    "bias in a window": Scores(_BIAS.but(q_len=75, kv_len=100, window_left=30, window_right=15,
                                         diagonal=12), mask_grad=True),
    "bias in a window of later keys": Scores(_BIAS.but(
        q_len=75, kv_len=120, window_left=10, window_right=15, diagonal=40), mask_grad=True),
    "bias of capped pairs in a window": Scores(
        _WIDE.but(head_dim=96, q_len=75, kv_len=100, mask="float32", softcap=1.5, window_left=20,
                  window_right=10, mask_full=(True, False, False, True)), mask_grad=True),
    "bias of everything": Scores(_BIAS.but(mask="same", dtype=F16, softcap=1.5, dropout_p=0.2,
                                           alibi="batch", value_dim=13), "rows", mask_grad=True),
    "bias of narrow rows": Scores(_NARROW.but(head_dim=56, value_dim=8), "rows", mask_grad=True),
    "bias of narrow values": Scores(_NARROW.but(head_dim=64, value_dim=16), "rows",
                                    mask_grad=True),
    "bias of wide rows": Scores(_NARROW.but(head_dim=192, q_len=17), mask_grad=True),
    "bias beside columns": Scores(_NARROW.but(head_dim=16), columns=True, mask_grad=True),
    "bias of outer batches": Scores(_BIAS.but(batch=4), "rows", folded=(2, 1), mask_grad=True),
    "bias of inner batches": Scores(_BIAS.but(batch=4), folded=(1, 2), mask_grad=True),
    "bias of all beside ALiBi": Scores(_BIAS.but(mask_full=(False, False, True, True),
                                                 alibi="batch"), mask_grad=True),
    "bias of whole blocks": Scores(_BIAS.but(q_len=96, kv_len=64, sinks=True), "blocks",
                                   mask_grad=True),
    "bias of blocks and one": Scores(_BIAS.but(q_len=65, kv_len=65), "blocks", mask_grad=True),
    "bias of keys of inner batches": Scores(
        _BIAS.but(batch=6, mask_full=(True, True, False, True)), folded=(1, 2), mask_grad=True),
    "bias of many": Scores(Case(9, 10, 16, batch=70, num_heads=1, mask="float32",
                                mask_full=(False, False, True, True)), mask_grad=True),
    "bias of keys": Scores(_BIAS.but(mask_full=(True, False, False, True), q_len=75, kv_len=100,
                                     window_left=30, softcap=1.5, dropout_p=0.2), "padding",
                           mask_grad=True),
    "bias of keys of pairs": Scores(_WIDE.but(head_dim=96, q_len=75, mask="float32",
                                              mask_full=(True, False, False, True)),
                                    "padding", mask_grad=True),
    "bias of keys of many": Scores(Case(9, 150, 16, batch=35, num_heads=2, mask="float32",
                                        mask_full=(False, False, False, True)), mask_grad=True),
    "bias of keys of long columns": Scores(Case(2200, 9, 16, num_heads=1, mask="float32",
                                                mask_full=(False, True, False, True)),
                                           mask_grad=True),
    "bias of capped pairs": Scores(_WIDE.but(head_dim=96, q_len=75, mask="float32", softcap=1.5,
                                             mask_full=(True, False, False, True)),
                                   "padding", mask_grad=True),
    "bias of capped pairs, a query less": Scores(
        _WIDE.but(head_dim=96, q_len=63, mask="float32", softcap=1.5,
                  mask_full=(True, False, False, True)), mask_grad=True),
    "bias of long columns": Scores(Case(2200, 9, 96, num_heads=2, mask="float32", softcap=1.5,
                                        mask_full=(False, False, False, True)),
                                   mask_grad=True, parts=1),
    "bias of long columns in parts": Scores(Case(1100, 9, 96, num_heads=2, mask="float32",
                                                 softcap=1.5, window_left=60, diagonal=-1000,
                                                 mask_full=(False, False, False, True)),
                                            mask_grad=True, parts=3),
    "bias of long columns in four": Scores(Case(2200, 9, 96, num_heads=2, mask="float32",
                                                softcap=1.5, mask_full=(False, False, False, True)),
                                           mask_grad=True, parts=4),
    "stored bias": Scores(_WIDE.but(mask="float32", q_len=75, kv_len=100, window_left=30,
                                    window_right=15, diagonal=12), "blocks", store_ds=True,
                          mask_grad=True),
    "stored bias of whole blocks": Scores(
        _WIDE.but(mask="float32", q_len=64, kv_len=64, window_left=28, window_right=4,
                  diagonal=12), store_ds=True, mask_grad=True),
    "stored bias of blocks and one": Scores(
        _WIDE.but(mask="float32", q_len=65, kv_len=65, window_left=29, window_right=13,
                  diagonal=12), store_ds=True, mask_grad=True),
    "stored bias of all": Scores(_WIDE.but(mask="float32", mask_full=(False, False, True, True),
                                           q_len=75), "rows", store_ds=True, mask_grad=True),
    "stored bias of outer batches": Scores(_WIDE.but(batch=4, num_kv_heads=2, mask="same",
                                                     dtype=F16),
                                           folded=(2, 1), store_ds=True, mask_grad=True),
    "stored bias of many": Scores(Case(9, 10, 64, batch=70, num_heads=1, mask="float32",
                                       mask_full=(False, False, True, True)), store_ds=True,
                                  mask_grad=True, parts=1),
    "stored bias beside ranges": Scores(_WIDE.but(ranges="any", ranges_full=(False, True),
                                                  mask="float32", q_len=75, kv_len=100,
                                                  mask_full=(True, False, True, True)),
                                        "blocks", store_ds=True, mask_grad=True),
    "stored bias beside aligned ranges": Scores(
        _WIDE.but(ranges="any", mask="float32", q_len=75, kv_len=200), aligned=True,
        store_ds=True, mask_grad=True),
    "stored bias beside ranges, outside": Scores(
        _WIDE.but(ranges="any", mask="float32", q_len=75, kv_len=200), aligned=True,
        edges="outside", store_ds=True, mask_grad=True),
    "bias of rows": Scores(_BIAS.but(mask_full=(True, False, True, False), q_len=150, sinks=True,
                                     window_right=0, diagonal=-10), mask_grad=True),
    "bias of rows without dlse": Scores(
        _BIAS.but(mask_full=(True, False, True, False), sinks=True), dlse=False, mask_grad=True),
    "bias of rows of inner batches": Scores(
        _BIAS.but(batch=6, mask_full=(True, False, True, False)), folded=(1, 2), mask_grad=True),
    "bias of rows, half": Scores(_BIAS.but(mask_full=(False, True, True, False), mask="same",
                                           dtype=F16), mask_grad=True, dlse=False),
    "bias of one": Scores(_BIAS.but(mask_full=(False, True, False, False), q_len=300),
                          mask_grad=True),
    "bias of one, many": Scores(_BIAS.but(mask_full=(False, False, False, False), batch=35,
                                          num_heads=2, q_len=5, sinks=True), mask_grad=True),
    "entries of outer batches": Scores(_BASE.but(batch=4, mask="bool"), "entries", folded=(2, 1)),
    "entries of inner batches": Scores(_BASE.but(batch=4, mask="bool"), "entries", folded=(1, 2)),
    "entries of all": Scores(_BASE.but(mask="bool"), "entries"),
    "rows of a mask, side by side": Scores(
        _BASE.but(mask="bool", q_len=75, window_left=20, window_right=9, diagonal=5,
                  mask_full=(True, True, True, False)), side_by_side=True),
    "padding beside a window": Scores(_BASE.but(mask="bool", window_right=9,
                                                mask_full=(True, False, False, True)), "padding"),
    "hardly capped": Scores(_BIAS.but(softcap=3000.0, scale=1.0), mask_grad=True),
    "hardly capped pairs": Scores(_WIDE.but(head_dim=96, softcap=3000.0, scale=1.0)),
    "sinks of 33 blocks": Scores(Case(264, 9, 16, num_heads=2, sinks=True), dlse=False),
    "bias of two blocks": Scores(_BIAS.but(q_len=64, kv_len=64), "blocks", mask_grad=True),
    "bias of one beyond blocks": Scores(_BIAS.but(q_len=65, kv_len=65), mask_grad=True),
    "stored bias of two blocks": Scores(_WIDE.but(mask="float32", q_len=64, kv_len=64,
                                                    window_left=16, window_right=16),
                                          store_ds=True, mask_grad=True),
    "stored bias of one beyond blocks": Scores(_WIDE.but(mask="float32", q_len=65, kv_len=65,
                                                         window_left=25, window_right=17),
                                               store_ds=True, mask_grad=True),
    "stored bias of all in parts": Scores(_WIDE.but(mask="float32",
                                                    mask_full=(False, False, True, True)),
                                          store_ds=True, mask_grad=True, parts=2),
    "stored bias beside documents": Scores(
        _WIDE.but(ranges="documents", mask="float32", q_len=130, kv_len=130), store_ds=True,
        mask_grad=True),
    "stored bias beside ranges of whole blocks": Scores(
        _WIDE.but(ranges="any", mask="float32", q_len=75, kv_len=200), aligned=True,
        store_ds=True, mask_grad=True),
    "bias of all beside slopes": Scores(_BIAS.but(mask_full=(False, False, True, True),
                                                  alibi="head"), mask_grad=True),
    "bias of long columns in runs": Scores(Case(1100, 9, 96, num_heads=2, mask="float32",
                                                softcap=1.5, alibi="head",
                                                mask_full=(False, False, False, True)),
                                           mask_grad=True, parts=4),
    "ranges": Scores(_RANGES.but(window_left=20, window_right=9, dropout_p=0.2)),
    "ranges, extreme": Scores(_RANGES.but(window_left=30), extreme=True),
    "ranges, extreme to the right": Scores(_RANGES.but(window_right=12), extreme=True),
    "ranges, extreme to the left": Scores(_RANGES.but(window_left=1 << 28), extreme=True),
    "ranges, aligned": Scores(_RANGES.but(q_len=79, kv_len=200), aligned=True),
    "ranges, aligned, stored": Scores(_WIDE.but(ranges="any", q_len=152, kv_len=200), aligned=True,
                                      store_ds=True, span=64),
    "ranges, aligned, pairs": Scores(_WIDE.but(head_dim=96, ranges="any", q_len=73, kv_len=200),
                                     aligned=True),
    "ranges, aligned, beside a bias": Scores(
        _RANGES.but(mask="float32", kv_len=200, mask_full=(False, True, True, True)),
        aligned=True, mask_grad=True),
    "ranges, inside": Scores(_RANGES.but(kv_len=200), aligned=True, edges="inside"),
    "ranges, inside, stored": Scores(_WIDE.but(ranges="any", q_len=150, kv_len=200), aligned=True,
                                     edges="inside", store_ds=True, span=64),
    "ranges of a first key": Scores(_RANGES.but(kv_len=200), aligned=True, edges="first key"),
    "ranges of a first key, stored": Scores(
        _WIDE.but(ranges="any", q_len=150, kv_len=200), aligned=True, edges="first key",
        store_ds=True, span=57),
    "ranges a key too long": Scores(
        _WIDE.but(ranges="any", q_len=150, kv_len=200), aligned=True, edges="long",
        store_ds=True, span=57),
    "ranges of one head": Scores(_RANGES.but(q_len=72, num_heads=1, num_kv_heads=1,
                                             ranges_full=(True, False))),
    "ranges of blocks and one row": Scores(_RANGES.but(q_len=65)),
    "ranges of a row less than blocks": Scores(_RANGES.but(q_len=71)),
    "ranges of blocks of 8": Scores(_RANGES.but(head_dim=80, num_heads=2, num_kv_heads=1)),
    "ranges of early rows": Scores(Case(800, 9, 16, num_heads=1, ranges="any"), edges="late"),
    "ranges of batches": Scores(_RANGES.but(ranges_full=(True, False), alibi="head")),
    "ranges of heads": Scores(_RANGES.but(ranges_full=(False, True), mask="bool", sinks=True),
                              "blocks"),
    "ranges of documents": Scores(_RANGES.but(ranges="documents", batch=1, dtype=F16)),
    "ranges of long padding": Scores(_RANGES.but(ranges="padding", kv_len=200)),
    "ranges of padding": Scores(_RANGES.but(ranges="padding", dtype=BF16)),
    "ranges of a prefix": Scores(_RANGES.but(ranges="prefix", kv_len=200, softcap=1.5)),
    "ranges of a prefix, a key less": Scores(_RANGES.but(ranges="prefix", kv_len=190)),
    "ranges apart": Scores(_RANGES, edges="apart"),
    "ranges apart of few rows": Scores(_RANGES.but(q_len=16), edges="apart"),
    "ranges of few rows": Scores(_RANGES.but(q_len=16, kv_len=200), aligned=True),
    "ranges of a prefix in other rows": Scores(_RANGES, edges="other rows"),
    "ranges, stored": Scores(_WIDE.but(ranges="any", q_len=75, kv_len=100, window_left=40,
                                       alibi="head"), store_ds=True),
    "ranges of a prefix, stored": Scores(_WIDE.but(ranges="prefix", mask="bool", kv_len=200),
                                         "blocks", store_ds=True),
    "ranges of a span": Scores(_WIDE.but(ranges="prefix", q_len=299, kv_len=200, dropout_p=0.2),
                               store_ds=True, span=40),
    "ranges of a span of documents": Scores(
        _WIDE.but(ranges="documents", q_len=202, kv_len=202, num_kv_heads=2, dtype=F16),
        store_ds=True, span=70),
    "ranges of a span of pairs": Scores(
        _WIDE.but(head_dim=96, ranges="any", q_len=150, kv_len=200, batch=1, window_right=9,
                  softcap=1.5), store_ds=True, span=64),
    "ranges of pairs": Scores(_WIDE.but(head_dim=96, q_len=75, ranges="documents", kv_len=130,
                                        dropout_p=0.2, alibi="batch")),
    "ranges beside a bias": Scores(_RANGES.but(mask="float32", softcap=1.5, window_left=25,
                                               mask_full=(False, True, True, True)),
                                   "rows", mask_grad=True),
    "ranges of heads beside a bias of all": Scores(
        _RANGES.but(ranges_full=(False, True), mask="float32",
                    mask_full=(False, False, True, True)), "blocks", mask_grad=True),
    "ranges beside a bias of capped pairs": Scores(
        _WIDE.but(head_dim=96, ranges="any", q_len=75, kv_len=200, softcap=1.5, mask="float32",
                  mask_full=(True, False, False, True)), aligned=True, mask_grad=True),
    "ranges of batches beside inner batches": Scores(
        _RANGES.but(ranges_full=(True, False), batch=4, mask="bool",
                    mask_full=(True, False, True, False)), folded=(1, 2)),
    "ranges of all beside outer batches": Scores(
        _RANGES.but(ranges_full=(True, True), batch=4, mask="same", dtype=F16, kv_len=70,
                    mask_full=(True, False, True, True)), "rows", folded=(2, 1)),
    "ranges beside a bias of keys": Scores(_RANGES.but(ranges="documents", mask="float32",
                                                       mask_full=(True, False, False, True)),
                                           "padding", mask_grad=True),
}  # fmt: skip


@functools.cache
def killers() -> tuple[Scored, ...]:
    return tuple(
        Scored(f"{family}: scores, {name}", family, problem)
        for name, problem in PROBLEMS.items()
        for family in _families(problem)
    )


@functools.cache
def checked() -> tuple[Scored, ...]:
    return tuple(
        Scored(f"{family}: scores, {name}, checked", family, PROBLEMS[name], check=True)
        for name in (
            "all together",
            "blocks of a mask",
            "one query less than blocks of a mask",
            "pairs, stored",
            "inner batches",
            "bias of pairs",
            "bias of capped pairs",
            "bias of narrow values",
            "bias of keys",
            "stored bias",
            "stored bias of all",
            "stored bias beside ranges",
            "bias of rows",
            "bias of one",
            "ranges",
            "ranges, extreme",
            "ranges of blocks of 8",
            "ranges of a prefix, stored",
            "ranges of heads beside a bias of all",
            "ranges of a span",
            "ranges of pairs",
        )
        for family in _families(PROBLEMS[name])
    )


def _families(problem: Scores) -> list[str]:
    """Those that its plans have. Nothing is computed to know them: workers are forked later."""
    case = problem.case
    alone = 96 if case.dtype == F16 else 80
    pairs = max(case.head_dim, case.value_dim or 0) > alone
    of_mask = []
    if problem.mask_grad and not case.mask_full[3]:
        of_mask = [DMASK_ROWS]
    elif problem.mask_grad and not case.mask_full[2] and not (pairs and case.softcap):
        of_mask = [DMASK_SUM_KEYS]
    elif problem.mask_grad:
        shared = not (case.mask_full[0] and case.mask_full[2])
        shared = shared or math.prod(problem.folded) % case.batch != 0
        from_ds = problem.store_ds and not case.softcap and not problem.span
        of_mask = [DMASK_FROM_DS if from_ds else DMASK, *[DMASK_SUM] * shared]
    return [
        *[MASK_MAP] * bool(case.mask), FORWARD, DELTA, DKV_PAIRS if pairs else DKV,
        *[DQ_FROM_DS] * problem.store_ds, *[DQ] * (not problem.store_ds or problem.span > 0),
        *of_mask, *[DSINKS] * case.sinks,
    ]  # fmt: skip
