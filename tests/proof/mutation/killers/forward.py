"""What the forward alone must do."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
from attention_cases import Case, far_scores, uneven_scores
from torch import Tensor

from orchard_ops.testing import assert_attention_close

from ..harness import FORWARD, Sources
from .attention import F16, F32, lse_of
from .operands import dominant_keys, infinite_rows
from .properties import Given, Property


def forward_of(
    sources: Sources, note: Callable[[str], None], case: Case, q: Tensor, k: Tensor, v: Tensor,
    check: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """out and row_stats."""
    inputs = {"query": q, "key": k, "value": v}
    shapes = {"out": tuple(q.shape), "row_stats": (*q.shape[:3], 2)}
    return Given("", FORWARD, case, check=check).results(sources, note, inputs, shapes)


def origins_are_scores(sources: Sources, note: Callable[[str], None]) -> None:
    """With one key the origin is its score and the logarithm of the sum 0, to the bit; without
    one, the origin is the lowest number."""
    length = 640
    case = Case(length, 1, 16, num_heads=1, scale=math.log(2), dtype=F32, window_left=600)
    m = torch.arange(1, length + 1).float() * 1.5
    q = torch.zeros(1, 1, length, 16)
    q[0, 0, :, 0] = m
    k = torch.zeros(1, 1, 1, 16)
    k[..., 0] = 1.0
    stats = forward_of(sources, note, case, q, k, k)["row_stats"][0, 0]
    assert torch.equal(stats[:601, 0], m[:601]) and (stats[:601, 1] == 0).all()
    assert (stats[601:, 0] == torch.finfo(F32).min).all() and (stats[601:, 1] == -math.inf).all()


def sums_beside_far_origins(sources: Sources, note: Callable[[str], None]) -> None:
    """24 equal scores of 2^30: the logarithm of 24 is below what float32 adds to that."""
    case = Case(8, 24, 16, num_heads=1, scale=math.log(2), dtype=F32)
    q, k = torch.zeros(1, 1, 8, 16), torch.zeros(1, 1, 24, 16)
    q[..., 0] = k[..., 0] = 2.0**15
    got = forward_of(sources, note, case, q, k, torch.ones(1, 1, 24, 16))
    stats = got["row_stats"]
    assert (stats[..., 0] == 2.0**30).all()
    torch.testing.assert_close(stats[..., 1], torch.full((1, 1, 8), math.log2(24)))
    assert (got["out"] == 1).all()


def dominant_keys_forward(sources: Sources, note: Callable[[str], None]) -> None:
    """Row i gives all its weight to key i, whatever the rounding of the score."""
    case, x = dominant_keys()
    got = forward_of(sources, note, case, x["query"], x["key"], x["value"])
    assert torch.equal(got["out"], x["value"]) and torch.equal(got["row_stats"], x["row_stats"])


def sums_in_chains(sources: Sources, note: Callable[[str], None]) -> None:
    """A score of 2^24 and 255 ones: a chain that begins with 2^24 loses all ones behind it, which
    may be the part of one of four chains (Chains in shaders/tile.h).
    """
    case = Case(8, 2, 256, num_heads=1, dtype=F32, scale=math.log(2) / 64)
    q, k, v = torch.ones(1, 1, 8, 256), torch.ones(1, 1, 2, 256), torch.zeros(1, 1, 2, 256)
    q[..., 0] = k[..., 0] = 2.0**12
    k[:, :, 1, 1:], v[:, :, 0] = 0.0, 1.0
    weight = forward_of(sources, note, case, q, k, v)["out"]
    # 1 / (1 + 2^-4) in exact arithmetic, 8/9 with four chains, 4/5 with two.
    assert (weight > 0.85).all(), f"weight {weight.min()}"


def origins_move(
    sources: Sources, note: Callable[[str], None], dtype: torch.dtype, head_dim: int,
    check: bool = False,
) -> None:  # fmt: skip
    """Rows whose origins of exponentials move at different keys, or not at all."""
    case, (q, k, v, _) = uneven_scores(dtype, head_dim)
    got = forward_of(sources, note, case, q, k, v, check)
    ref, eager = (case.math(t, q, k, v, q) for t in (torch.float64, dtype))
    none = (None, None, None)
    assert_attention_close([got["out"], lse_of(got["row_stats"]), *none], ref, eager)


def far_origins(sources: Sources, note: Callable[[str], None]) -> None:
    case, (q, k, v, _) = far_scores()
    got = forward_of(sources, note, case, q, k, v)
    expected = v[..., 32:, :].float().mean(-2, True).expand(q.shape)
    torch.testing.assert_close(got["out"].float(), expected, rtol=2e-3, atol=2e-3)


def late_scores(sources: Sources, note: Callable[[str], None]) -> None:
    """Scores nearly 16 powers of two above the first ones: half would not hold their weights."""
    case = Case(16, 64, 16, num_heads=1, dtype=F16, scale=15.9998 * math.log(2))
    q, k = torch.zeros(1, 1, 16, 16, dtype=F16), torch.zeros(1, 1, 64, 16, dtype=F16)
    q[..., 0] = k[:, :, 32:, 0] = 1.0
    v = torch.arange(64, dtype=F16)[:, None].expand(1, 1, 64, 16)
    got = forward_of(sources, note, case, q, k, v)
    torch.testing.assert_close(got["out"], torch.full_like(q, 47.5))


def rows_alone(sources: Sources, note: Callable[[str], None]) -> None:
    """A row whose largest score creeps up beside one that moves: the same bits as beside zeros."""
    case, (q, k, v, _) = uneven_scores(F32, 32)
    k[..., 7] = 0.02 * torch.arange(case.kv_len)
    found = []
    for neighbour in (torch.eye(32)[3], torch.zeros(32)):
        q[:] = neighbour
        q[:, :, 4:8] = torch.eye(32)[7]
        got = forward_of(sources, note, case, q, k, v)
        found.append((got["out"][:, :, 4:8], got["row_stats"][:, :, 4:8]))
    assert all(torch.equal(x, y) for x, y in zip(*found))


def infinite_scores_forward(sources: Sources, note: Callable[[str], None]) -> None:
    case, x = infinite_rows()
    got = forward_of(sources, note, case, x["query"], x["key"], x["value"])
    torch.testing.assert_close(got["out"], x["out"])
    assert torch.equal(got["row_stats"], x["row_stats"])


def rows_without_a_key(sources: Sources, note: Callable[[str], None]) -> None:
    """They are zero, also where others of their block see infinite values."""
    case = Case(16, 8, 16, num_heads=1, dtype=F32, window_right=0, diagonal=-8)
    q, k = torch.ones(1, 1, 16, 16), torch.zeros(1, 1, 8, 16)
    got = forward_of(sources, note, case, q, k, torch.full_like(k, math.inf))
    assert (got["out"][:, :, :8] == 0).all() and not got["out"][:, :, 8:].isfinite().any()


def properties() -> Iterator[Property]:
    for name, test in (
        ("origins are scores", origins_are_scores),
        ("sums beside far origins", sums_beside_far_origins),
        ("dominant keys", dominant_keys_forward),
    ):
        yield Property(f"{FORWARD}: {name}", FORWARD, test)
    for dtype, name, head_dim in ((F32, "float32", 32), (F32, "float32", 64), (F16, "float16", 64)):
        test = functools.partial(origins_move, dtype=dtype, head_dim=head_dim)
        yield Property(f"{FORWARD}: origins move, {name}, head_dim {head_dim}", FORWARD, test)
    for name, test in (
        ("sums in chains", sums_in_chains),
        ("origins beyond 2^27", far_origins),
        ("late scores", late_scores),
        ("rows beside others that move", rows_alone),
        ("scores of -inf", infinite_scores_forward),
        ("rows without a key beside infinite values", rows_without_a_key),
    ):
        yield Property(f"{FORWARD}: {name}", FORWARD, test)


def checked() -> Iterator[Property]:
    test = functools.partial(origins_move, dtype=F32, head_dim=32, check=True)
    yield Property(f"{FORWARD}: origins move, checked", FORWARD, test)
