"""A forward whose keys are divided: what its parts leave, and what a kernel makes of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from attention_cases import Case
from torch import Tensor

from orchard_ops.testing import assert_attention_close

from ..harness import (
    DTYPE_NUMBERS,
    FORWARD,
    FORWARD_MERGE,
    Guarded,
    Params,
    Sources,
    launch,
    place,
    request,
    with_seed,
)
from .attention import F16, F32, dense
from .compiled import compile_kernel, template_arguments
from .properties import Property

LOWEST = torch.finfo(F32).min
CASES = {
    "two heads, ragged": Case(70, 811, 16, dtype=F16),
    "elements, sinks": Case(70, 811, 15, batch=2, dtype=F16, sinks=True, value_dim=7),
    "wide values, softcap": Case(40, 530, 48, softcap=3.0, dtype=F32, value_dim=40),
    "dropout": Case(33, 530, 16, dropout_p=0.25, dtype=F32),
    "dropout, elements": Case(33, 530, 15, dropout_p=0.25, dtype=F32, value_dim=7),
    "rows without a key, parts without a block": Case(
        560, 560, 16, num_heads=1, window_right=0, diagonal=-20, dtype=F32
    ),
    "window": Case(80, 1100, 16, window_left=300, window_right=280, diagonal=330, dtype=F32),
}


def _plan(sources: Sources, case: Case, layouts: dict[str, Guarded]) -> tuple[dict, Params]:
    """On a GPU so large that parts are as many as the keys allow."""
    fields: dict[str, Any] = dict(
        scale=case.head_dim**-0.5, softcap=case.softcap, has_sinks=case.sinks, gpu_cores=10_000,
        dropout_p=case.dropout_p, window_left=case.window_left, window_right=case.window_right,
        diagonal=case.diagonal,
    )  # fmt: skip
    places = {name: place(x) for name, x in layouts.items()}
    plan, params = sources.plan(request(places, DTYPE_NUMBERS[case.dtype], **fields))
    assert [x["family"] for x in plan["kernels"]] == [FORWARD, FORWARD_MERGE]
    return plan, params


def _scores(case: Case, q: Tensor, k: Tensor) -> Tensor:
    """Of all pairs, -inf where hidden."""
    repeated = k.repeat_interleave(case.num_heads // case.num_kv_heads, 1).double()
    s = q.double() @ repeated.mT * case.head_dim**-0.5
    if case.softcap:
        s = case.softcap * torch.tanh(s / case.softcap)
    row, key = torch.arange(case.q_len)[:, None], torch.arange(case.kv_len)
    for side, distance in (
        (case.window_left, row + case.diagonal - key),
        (case.window_right, key - row - case.diagonal),
    ):
        if side >= 0:
            s = s.masked_fill(distance > side, -math.inf)
    return s


def _shares(seen: Tensor, rows: int, block: int, parts: int) -> Tensor:
    """Which keys (rows, keys) each part has, (parts, rows, keys)."""
    shares = torch.zeros(parts, *seen.shape, dtype=torch.bool)
    for first in range(0, len(seen), rows):
        keys = seen[first : first + rows].any(0).nonzero()
        if not len(keys):
            continue
        begin, end = int(keys.min()) // block, int(keys.max()) // block + 1
        for part in range(parts):
            low, high = (begin + (end - begin) * n // parts for n in (part, part + 1))
            shares[part, first : first + rows, low * block : high * block] = True
    return shares


@dataclass
class Run:
    """What the kernels of a case have written."""

    arguments: list[str]  # of the first one's template
    stats: Tensor  # (parts, B, Hq, L, 2): origins and sums
    sums: Tensor  # (parts, B, Hq, L, Dv)
    out: Tensor
    row_stats: Tensor


def _run(
    sources: Sources, note: Callable[[str], None], case: Case, q: Tensor, k: Tensor, v: Tensor,
    check: bool = False,
) -> Run:  # fmt: skip
    shape = (*q.shape[:3], v.shape[3])
    inputs = {
        name: Guarded.like(x, "dense") for name, x in (("query", q), ("key", k), ("value", v))
    }
    out = Guarded(shape, dense(shape), case.dtype)
    short = {"q": inputs["query"], "k": inputs["key"], "v": inputs["value"], "out": out}
    plan, params = _plan(sources, case, short)
    parts, rows = params.forward_parts, q[..., 0].numel()
    assert plan["forward_part_elements"] == parts * rows * (shape[3] + 2)
    scratch = Guarded((parts * rows * (shape[3] + 2),), (1,), F32)
    of_sinks = case.scoring("cpu").sinks
    if of_sinks is not None:
        inputs["sinks"] = Guarded.like(of_sinks[None, None, None], "dense")
    first, last = plan["kernels"]
    library = compile_kernel(sources, FORWARD, first, check)
    note("compiled")
    block = with_seed(params, key_end=case.kv_len)
    launch(library, first, sources.buffers, block, inputs, {"forward_parts": scratch},
           workers=1)  # fmt: skip
    row_stats = Guarded((*shape[:3], 2), dense((*shape[:3], 2)), F32)
    launch(compile_kernel(sources, FORWARD_MERGE, last, check), last, sources.buffers, block,
           inputs | {"forward_parts": scratch}, {"out": out, "row_stats": row_stats},
           workers=1)  # fmt: skip
    floats = 2 * parts * rows
    return Run(
        template_arguments(first), scratch.tensor[:floats].view(parts, *shape[:3], 2).double(),
        scratch.tensor[floats:].view(parts, *shape).double(), out.tensor, row_stats.tensor,
    )  # fmt: skip


def divided(sources: Sources, note: Callable[[str], None], name: str, check: bool = False) -> None:
    """Sums of each part's own keys, and at the end the attention of all."""
    case = CASES[name]
    q, k, v, do = case.operands()
    run = _run(sources, note, case, q, k, v, check)
    s = _scores(case, q, k)
    seen = (s > -math.inf).any(0).any(0)
    rows, block = 32 * int(run.arguments[3]), int(run.arguments[4])
    unit = 1.0 if case.softcap or case.sinks else math.log(2)
    values = v.repeat_interleave(case.num_heads // case.num_kv_heads, 1).double()
    shares = _shares(seen, rows, block, len(run.stats))
    for part, (share, stats, sums) in enumerate(zip(shares, run.stats, run.sums)):
        own = s.masked_fill(~share, -math.inf)
        lse = own.logsumexp(-1)
        alone = lse == -math.inf
        found = unit * stats[..., 0] + stats[..., 1].log()
        assert ((found - lse)[~alone].abs() < 2e-3).all(), f"part {part} has other keys"
        assert (stats[alone] == torch.tensor([LOWEST, 0.0]).double()).all()
        assert (sums[alone] == 0).all()
        if not case.dropout_p:
            error = sums / stats[..., 1:].clamp_min(1e-30) - own.softmax(-1).nan_to_num() @ values
            assert (error.abs() < 5e-3).all(), f"part {part} has other sums"
    ref, eager = (case.math(t, q, k, v, do) for t in (torch.float64, case.dtype))
    lse = (run.row_stats.double().sum(-1) * unit).float()
    assert_attention_close([run.out, lse, None, None, None], ref, eager)


def rows_without_a_key(sources: Sources, note: Callable[[str], None]) -> None:
    """They are zero, also where others of their block see infinite values."""
    case = CASES["rows without a key, parts without a block"]
    q, k, v, _ = case.operands()
    out = _run(sources, note, case, q, k, torch.full_like(v, math.inf)).out
    assert (out[:, :, :20] == 0).all() and not out[:, :, 20:].isfinite().any()


# ---- the merge by itself


def merged(
    sources: Sources, note: Callable[[str], None], case: Case, parts: int, check: bool = False
) -> None:
    """Of made up parts: far origins, none of a row, all without a key."""
    generator = torch.Generator().manual_seed(4)
    rows = (case.batch, case.num_heads, case.q_len)
    width = case.value_dim or case.head_dim
    q = Guarded((*rows, case.head_dim), dense((*rows, case.head_dim)), case.dtype)
    of_keys = (case.batch, case.num_kv_heads, case.kv_len)
    k, v = (
        Guarded((*of_keys, d), dense((*of_keys, d)), case.dtype) for d in (case.head_dim, width)
    )
    out = Guarded.like(torch.zeros(*rows, width, dtype=case.dtype), "blhd")
    out.tensor.fill_(math.nan)
    plan, params = _plan(sources, case, {"q": q, "k": k, "v": v, "out": out})
    kernel = plan["kernels"][1]
    params.forward_parts = parts
    origins = 6 * torch.randn(parts, *rows, generator=generator)
    origins[0, ..., 0] += 1000.0
    totals = torch.rand(parts, *rows, generator=generator) + 0.5
    sums = torch.randn(parts, *rows, width, generator=generator)
    unseen = torch.rand(parts, *rows, generator=generator) < 0.3
    unseen[..., 1] = True
    unseen[1:, ..., 2] = True
    unseen[:-1, ..., 3] = True
    origins[unseen], totals[unseen], sums[unseen] = LOWEST, 0.0, 0.0
    flat = torch.cat((torch.stack((origins, totals), -1).flatten(), sums.flatten()))
    scratch = Guarded.like(flat[None, None, None], "dense")
    inputs = {"forward_parts": scratch}
    sinks = None
    if case.sinks:
        sinks = torch.linspace(-3, 3, case.num_heads)
        inputs["sinks"] = Guarded.like(sinks[None, None, None], "dense")
        inputs["sinks"].tensor[..., 0] = math.inf
    stats = Guarded((*rows, 2), dense((*rows, 2)), F32)
    library = compile_kernel(sources, FORWARD_MERGE, kernel, check)
    note("compiled")
    launch(library, kernel, sources.buffers, with_seed(params), inputs,
           {"out": out, "row_stats": stats}, workers=1)  # fmt: skip

    if sinks is not None:
        _assert_infinite(totals[:, :, 0], out.tensor[:, 0], stats.tensor[:, 0])
        sinks, origins, totals, sums = (
            sinks[1:],
            origins[:, :, 1:],
            totals[:, :, 1:],
            sums[:, :, 1:],
        )
    found, of_rows = (x.tensor[:, -origins.shape[2] :] for x in (out, stats))
    natural = case.sinks or case.softcap > 0
    unit = 1.0 if natural else math.log(2)
    top = origins.amax(0)
    if sinks is not None:
        top = torch.maximum(top, sinks[:, None])
    weights = ((origins.double() - top) * unit).exp()
    keys = (weights * totals).sum(0)
    total = keys + (0 if sinks is None else (sinks[:, None].double() - top).exp())
    right = (weights[..., None] * sums).sum(0) / total[..., None].clamp_min(1e-30)
    right = torch.where(keys[..., None] > 0, right / (1 - case.dropout_p), 0.0)
    tolerance = 1e-5 if case.dtype == F32 else 2e-3
    assert ((found.double() - right).abs() <= tolerance * (1 + right.abs())).all(), "out"
    assert torch.equal(of_rows[..., 0], top), "origins"
    log = total.log() / unit
    alone = keys == 0
    assert ((of_rows[..., 1].double() - log)[~alone].abs() < 1e-5).all(), "logarithms"
    of_none = of_rows[..., 1][alone]
    assert bool(of_none.signbit().all()) and torch.equal(
        of_none, torch.full_like(of_none, -math.inf if sinks is None else -0.0)
    ), "rows without a key"


def _assert_infinite(totals: Tensor, out: Tensor, stats: Tensor) -> None:
    """Of a head whose sink is +inf: NaN, but for rows without a key."""
    seen = totals.sum(0) > 0
    assert out[seen].isnan().all() and (out[~seen] == 0).all()
    assert stats[seen][:, 0].isnan().all() and (stats[~seen][:, 0] == math.inf).all()
    assert (stats[..., 1] == 0).all() and torch.equal(stats[..., 1].signbit(), ~seen)


MERGED = {
    "powers of two": (Case(5, 600, 64, batch=2, num_heads=3, value_dim=33, dtype=F16), 3),
    "32 parts, sinks": (Case(5, 600, 32, num_heads=3, sinks=True, value_dim=31, dtype=F32), 32),
    "dropout, natural": (
        Case(6, 600, 16, num_heads=1, softcap=5.0, dropout_p=0.25, dtype=F32), 2
    ),
}  # fmt: skip


def properties() -> Iterator[Property]:
    for name in CASES:
        test = functools.partial(divided, name=name)
        yield Property(f"{FORWARD}, in parts: {name}", FORWARD, test, (FORWARD_MERGE,))
    name = "rows without a key beside infinite values"
    yield Property(f"{FORWARD}, in parts: {name}", FORWARD, rows_without_a_key, (FORWARD_MERGE,))
    for name, (case, parts) in MERGED.items():
        test = functools.partial(merged, case=case, parts=parts)
        yield Property(f"{FORWARD_MERGE}: {name}", FORWARD_MERGE, test)


def checked() -> Iterator[Property]:
    test = functools.partial(divided, name="two heads, ragged", check=True)
    yield Property(f"{FORWARD}, in parts: checked", FORWARD, test, (FORWARD_MERGE,))
    case, parts = MERGED["powers of two"]
    test = functools.partial(merged, case=case, parts=parts, check=True)
    yield Property(f"{FORWARD_MERGE}: checked", FORWARD_MERGE, test)
