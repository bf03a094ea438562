"""What the backward's kernels alone must do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from attention_cases import Case

from orchard_ops.testing import assert_attention_close

from ..harness import (
    DKV,
    DKV_PAIRS,
    DQ,
    DQ_FROM_DS,
    Guarded,
    Sources,
    launch,
    place,
    request,
    with_seed,
)
from .attention import (
    F16,
    F32,
    KEYS_SIDE,
    Attention,
    dense,
    empty,
    forward_results,
    kernel_of,
    reference,
)
from .compiled import compile_kernel
from .operands import dominant_keys, infinite_rows, long_sums, sums_of_half
from .properties import Given, Property


def divided_keys(
    sources: Sources, note: Callable[[str], None], keys_side: str, kv_len: int = 150,
    check: bool = False,
) -> None:  # fmt: skip
    """The two kernels in turn over 64 keys at a time, for one key/value head of two.

    The queries end in the second fragment of a simdgroup of two.
    """
    case = Case(78, kv_len, 64, num_heads=4, num_kv_heads=2, dtype=F32, dropout_p=0.2,
                window_left=90, window_right=60, diagonal=20)  # fmt: skip
    given = reference(case, False, (0.0, 0.0))
    names = ("query", "key", "value", "dout")
    x = {name: Guarded.like(t, "padded") for name, t in zip(names, given.operands)}
    layouts = {
        short: place(x[name])
        for short, name in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "query"),
                            ("dout", "dout"))
    }  # fmt: skip
    plan, params = sources.plan(request(
        layouts, 2, True, dropout_p=0.2, scale=0.125, window_left=90, window_right=60,
        diagonal=20, stores_ds=True, scratch_bytes=1 << 30,
    ))  # fmt: skip
    x["row_stats"] = Guarded.like(forward_results(case)[1], "dense")
    x["delta"] = Guarded.like(given.delta.float()[None], "dense")
    tiles = 2 * 8 * 10 * 64  # heads, key blocks, query blocks
    shape = (1, 1, 1, tiles + 2 * 78 * 64)
    scratch = Guarded(shape, dense(shape), F32)
    results = {
        name: empty(like, "padded") for name, like in zip(("dq", "dk", "dv"), given.operands)
    }
    own = {name: tuple(y.tensor.stride()) for name, y in results.items()}
    for begin in range(0, kv_len, 64):
        end = min(begin + 64, kv_len)
        block = with_seed(
            params,
            first_head=2,
            key_begin=begin,
            key_end=end,
            ds_keys=64,
            ds_row=10,
            ds_folded=0,
            dq_sums=tiles,
            **own,
        )
        for family, inputs, outputs in (
            (keys_side, ("query", "key", "value", "dout", "row_stats", "delta"), ("dk", "dv")),
            (DQ_FROM_DS, ("key",), ("dq",)),
        ):
            kernel = kernel_of(plan, family, end - begin)
            library = compile_kernel(sources, family, kernel, check)
            note("compiled")
            kernel["groups"][0] = 1 if family == keys_side else 2
            written = {name: results[name] for name in outputs} | {"ds": scratch}
            launch(library, kernel, sources.buffers, block, {n: x[n] for n in inputs}, written,
                   workers=1)  # fmt: skip
        if end < kv_len:
            assert results["dq"].tensor.isnan().all(), "dq before the last keys"
        assert results["dk"].tensor[:, 1, end:].isnan().all(), "keys of the next dispatch"
    named = dict.fromkeys(("out", "lse", "dq", "dk", "dv"))
    for name, y in results.items():
        mine = slice(2, 4) if name == "dq" else slice(1, 2)
        assert y.tensor[:, : mine.start].isnan().all(), name
        named[name] = getattr(given.ref, name).to(F32)
        named[name][:, mine] = y.tensor[:, mine]
    assert_attention_close(list(named.values()), given.ref, given.eager)


def infinite_scores_dq(sources: Sources, note: Callable[[str], None]) -> None:
    case, x = infinite_rows()
    inputs = {name: x[name] for name in ("query", "key", "value", "dout", "row_stats")}
    inputs["delta"] = (x["dout"] * x["out"]).sum(-1)
    got = Given("", DQ, case).results(sources, note, inputs, {"dq": (1, 1, 16, 16)})
    assert got["dq"].abs().max() < 1e-4  # delta = dP in the others


def infinite_scores_dkv(sources: Sources, note: Callable[[str], None], family: str) -> None:
    case, x = infinite_rows()
    shapes = {"dk": (1, 1, 32, 16), "dv": (1, 1, 32, 16)}
    delta = (x["dout"] * x["out"]).sum(-1)
    inputs = {name: x[name] for name in ("query", "key", "value", "dout", "row_stats")}
    got = Given("", family, case).results(sources, note, {**inputs, "delta": delta}, shapes)
    torch.testing.assert_close(got["dv"], torch.full((1, 1, 32, 16), 8 / 32))


def small_weights_dkv(sources: Sources, note: Callable[[str], None], family: str) -> None:
    """Weights of 2^-26, below half's smallest number, add up in dv."""
    case = Case(16, 32, 64, num_heads=1, dtype=F16)
    zeros = torch.zeros(1, 1, 32, 64, dtype=F16)
    inputs = {"query": zeros[:, :, :16], "key": zeros, "value": zeros,
              "dout": torch.full((1, 1, 16, 64), 1024.0, dtype=F16),
              "row_stats": torch.tensor((0.0, 26.0)).expand(1, 1, 16, 2),
              "delta": torch.zeros(1, 1, 16)}  # fmt: skip
    shapes = {"dk": (1, 1, 32, 64), "dv": (1, 1, 32, 64)}
    dv = Given("", family, case).results(sources, note, inputs, shapes)["dv"]
    torch.testing.assert_close(
        dv.float(), torch.full(dv.shape, 16 * 1024 / 2.0**26), rtol=1e-3, atol=0.0
    )


def long_sums_dkv(
    sources: Sources, note: Callable[[str], None], family: str, head_dim: int, heads: int,
    q_len: int, check: bool = False,
) -> None:  # fmt: skip
    """Parts of 1024 queries are exact; they are added in order."""
    case, x = long_sums(head_dim, heads, q_len)
    shapes = dict.fromkeys(("dk", "dv"), (1, 1, 8, head_dim))
    got = Given("", family, case, check=check).results(sources, note, x, shapes)
    parts = (x["dout"].flatten(0, 2) / 8).split(1024)
    dv = functools.reduce(torch.add, (part.sum(0, dtype=torch.float64).to(F32) for part in parts))
    assert torch.equal(got["dv"], dv.expand(shapes["dv"])), "dv"
    assert torch.equal(got["dk"], dv[:8, None].expand(shapes["dk"])), "dk"


def sums_of_half_dkv(sources: Sources, note: Callable[[str], None], family: str) -> None:
    """A half type's sum is rounded to it once."""
    case, x = sums_of_half()
    shapes = dict.fromkeys(("dk", "dv"), (1, 1, 8, 16))
    got = Given("", family, case).results(sources, note, x, shapes)
    dv = (x["dout"].double() * 2.0**-10).sum((1, 2), keepdim=True).to(F16)
    assert torch.equal(got["dv"], dv.expand(shapes["dv"])), "dv"


def dominant_keys_dkv(sources: Sources, note: Callable[[str], None], family: str) -> None:
    """The weights are exactly 1 and 0: the backward takes the forward's numbers."""
    case, x = dominant_keys()
    shapes = {"dk": (1, 1, 32, 16), "dv": (1, 1, 32, 16)}
    names = ("query", "key", "value", "dout", "row_stats", "delta")
    got = Given("", family, case).results(sources, note, {n: x[n] for n in names}, shapes)
    assert torch.equal(got["dv"], x["dout"])
    assert torch.equal(got["dk"], torch.tensor(case.scale) * x["query"])


def dominant_keys_dq(sources: Sources, note: Callable[[str], None]) -> None:
    case, x = dominant_keys()
    names = ("query", "key", "value", "dout", "row_stats", "delta")
    inputs = {n: x[n] for n in names}
    got = Given("", DQ, case).results(sources, note, inputs, {"dq": (1, 1, 32, 16)})
    # dS is dP where the weight is 1: 1 for all keys.
    assert torch.equal(got["dq"], torch.tensor(case.scale) * x["key"])


_PARTNERS = ((DKV, DKV), (DKV_PAIRS, DKV_PAIRS), (DQ_FROM_DS, DKV))  # a family, the key's side


def parts_of_sums() -> Iterator[Attention]:
    """Two parts of the queries and keys of every simdgroup. Pairs of columns would end behind a
    row, and dk and dv lie in different strides."""
    case = Case(1040, 40, 15, num_heads=1, dtype=F32, dropout_p=0.3)
    for family in KEYS_SIDE:
        yield Attention(f"{family}: parts of sums, dropout, elements", family, case,
                        layouts=("padded", "padded", "odd", "dense", "odd"))  # fmt: skip


def properties() -> Iterator[Property | Attention]:
    yield Property(f"{DQ}: dominant keys", DQ, dominant_keys_dq)
    yield Property(f"{DQ}: scores of -inf", DQ, infinite_scores_dq)
    for name, test in (
        ("dominant keys", dominant_keys_dkv),
        ("scores of -inf", infinite_scores_dkv),
        ("small weights", small_weights_dkv),
        ("sums of half", sums_of_half_dkv),
    ):
        for family in KEYS_SIDE:
            partial = functools.partial(test, family=family)
            yield Property(f"{family}: {name}", family, partial)
    for family in KEYS_SIDE:
        for head_dim, heads, q_len in ((16, 1, 2560), (15, 2, 1280)):
            partial = functools.partial(
                long_sums_dkv, family=family, head_dim=head_dim, heads=heads, q_len=q_len
            )
            yield Property(f"{family}: {heads} x {q_len} queries", family, partial)
    yield from parts_of_sums()
    for family, keys_side in _PARTNERS:
        partial = functools.partial(divided_keys, keys_side=keys_side)
        beside = (keys_side, DQ_FROM_DS)
        yield Property(f"{family}: divided keys", family, partial, beside)
    partial = functools.partial(divided_keys, keys_side=DKV, kv_len=129)
    yield Property(f"{DQ_FROM_DS}: one key in the last part", DQ_FROM_DS, partial, (DKV,))


def checked() -> Iterator[Property]:
    for family in KEYS_SIDE:
        partial = functools.partial(
            long_sums_dkv, family=family, head_dim=15, heads=1, q_len=1040, check=True
        )
        yield Property(f"{family}: 1040 queries, checked", family, partial)
    for family, keys_side in _PARTNERS:
        partial = functools.partial(divided_keys, keys_side=keys_side, check=True)
        beside = (keys_side, DQ_FROM_DS)
        yield Property(f"{family}: divided keys, checked", family, partial, beside)
