"""What kernels must make of problems whose scores are not plain: results, and how many products."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from orchard_ops.testing import assert_attention_close

from ..harness import BOOL, DMASK, DQ, DQ_FROM_DS, FORWARD
from .attention import (
    F32,
    KEYS_SIDE,
    DscoreRows,
    ds_tiles,
    in_places,
    keys_of_group,
    repository,
    tiles_of_pairs,
    window_of,
)
from .compiled import template_arguments
from .score_problems import Scores, fits, given, meets
from .score_runs import IN_PARTS, left_by_the_repository, plan_of

# For a block of scores: over the head dim, and over that of the values.
_PRODUCTS = {FORWARD: (1, 1), DQ: (2, 1), DQ_FROM_DS: (1, 0), DMASK: (2, 0)}


def compare(problem: Scores, family: str, results: dict[str, Tensor], rows: DscoreRows) -> None:
    """Raises if a kernel's results are not what they must be. `rows`: of dS, if that is stored."""
    x = given(problem)
    named: dict[str, Tensor | None] = dict.fromkeys(
        ("out", "lse", "dq", "dk", "dv", "dmask", "dsinks")
    )
    for name, got in results.items():
        if name == "row_stats":
            named["lse"] = (got.double().sum(-1) * problem.case.scoring().unit).float()
            _compare_stats(problem, got)
        elif name in ("delta", "sink_parts"):
            _compare_rows(problem, name, got)
        elif name == "ds":
            _compare_ds(problem, got, rows)
        elif name == "mask_map":
            assert torch.equal(got, _map(problem)), "mask_map"
        elif name == "range_hulls":
            assert torch.equal(got, _hulls(problem)), "range_hulls"
        elif name == "dmask_parts":
            error = (got.double() - x.dscores.sum(2)).abs().max()
            eps = torch.finfo(problem.case.dtype).eps
            size = x.dscores.abs().sum(2).max() + x.dscores.abs().max()
            assert error <= 32 * eps * size, "sums of keys"
        elif name == "dmask":
            assert x.ref.dmask is not None and x.mask is not None
            if family in IN_PARTS and got.dim() == 2:  # of several threadgroups
                got = got.double().sum(0)
            dtype = x.tensors["mask"].dtype
            named["dmask"] = got.to(dtype).reshape(x.ref.dmask.shape)
        elif name == "dq" and problem.ds_keys:
            own = _rows_of(problem, family)
            assert got[~own].isnan().all(), "dq of the other kernel's rows"
            named[name] = torch.where(own[..., None], got, x.ref.dq.to(got.dtype))
        else:
            named[name] = got
    assert_attention_close(list(named.values()), x.ref, x.eager)


def _compare_stats(problem: Scores, got: Tensor) -> None:
    sees = given(problem).seen.any(-1)
    log_sum = got[..., 1]
    without = torch.signbit(log_sum) == ~sees
    assert without.all(), "the sign that tells rows without a key"


def _compare_rows(problem: Scores, name: str, got: Tensor) -> None:
    x, known = given(problem), left_by_the_repository(problem)
    terms = x.tensors["dout"].double().nan_to_num() * known["out"].double()
    delta, size = terms.sum(-1), terms.abs().sum(-1).max()
    sees = x.seen.any(-1)
    delta = torch.where(sees, delta, 0.0)
    if "dlse" in x.tensors:
        delta = delta - x.tensors["dlse"].double()
        size = size + x.tensors["dlse"].abs().max()
    if name == "delta":
        expected = torch.where(sees, delta, 0.0)
    else:
        sinks = x.tensors["sinks"].double().view(1, -1, 1)
        weights = torch.exp(sinks - x.ref.lse)
        rows = torch.nn.functional.pad(-weights * delta, (0, -delta.shape[2] % 8))
        expected = rows.unflatten(2, (-1, 8)).sum(-1)
        size = 8 * size
    assert ((got.double() - expected).abs() <= 64 * torch.finfo(F32).eps * size).all(), name


def _rows_of(problem: Scores, family: str) -> Tensor:
    """(B, Hq, L), whether this kernel computes dq there: 64 rows by dS that fits, or all anew."""
    x, case = given(problem), problem.case
    assert x.sight is not None
    own = torch.zeros(case.batch, case.num_heads, case.q_len, dtype=torch.bool)
    for batch in range(case.batch):
        for head in range(case.num_heads):
            for row in range(0, case.q_len, 64):
                stored = all(
                    fits(x.sight.hull(batch, head, slice(eight, eight + 8)), problem.ds_keys)
                    for eight in range(row, min(row + 64, case.q_len), 8)
                )
                own[batch, head, row : row + 64] = stored == (family == DQ_FROM_DS)
    return own


def _stored_tiles(problem: Scores) -> Tensor:
    """(heads, key blocks, query blocks) of dS, whether key_ranges let the key's side store them."""
    x, case = given(problem), problem.case
    assert x.sight is not None
    shape = (case.batch * case.num_heads, -(-case.kv_len // 8), -(-case.q_len // 8))
    stored = torch.zeros(shape, dtype=torch.bool)
    for index, key, row in itertools.product(*map(range, shape)):
        hull = x.sight.hull(*divmod(index, case.num_heads), slice(8 * row, 8 * row + 8))
        stored[index, key, row] = fits(hull, problem.ds_keys) and meets(hull, 8 * key, 8 * key + 8)
    return stored


def _compare_ds(problem: Scores, got: Tensor, rows: DscoreRows) -> None:
    x = given(problem)
    expected = ds_tiles(x.ds.flatten(0, 1))
    seen = ds_tiles(x.seen.flatten(0, 1).double()) > 0
    if problem.ds_keys:
        stored = _stored_tiles(problem)
        expected, seen = (in_places(tiles, stored, rows) for tiles in (expected, seen.double()))
        assert torch.equal(expected.isnan(), got.isnan()), "the tiles of dS that are stored"
        seen = seen == 1
    elif x.sight is None:
        window = tiles_of_pairs(window_of(problem.case)).expand(expected.shape[:3])
        expected, seen = (in_places(tiles, window, rows) for tiles in (expected, seen.double()))
        assert got[expected.isnan()].isnan().all(), "tiles of dS that no window has"
        seen = seen == 1
    error = (got.double() - expected).abs()
    eps = torch.finfo(problem.case.dtype).eps
    assert (error[seen] <= 32 * eps * x.ds.abs().max()).all(), "dS"
    tiles = seen.flatten(-2).any(-1)
    hidden = got[tiles][~seen[tiles]]
    assert (hidden == 0).all(), "dS of what is not seen"


def _map(problem: Scores) -> Tensor:
    """As masks.h describes it, by torch."""
    x, case = given(problem), problem.case
    assert x.mask is not None
    plan, _ = plan_of(problem, repository(), left_by_the_repository(problem)["out"], False)
    memory = x.tensors["mask"].view(-1)
    mask = memory.as_strided(x.mask.sizes, x.mask.strides, x.mask.offset)
    passes = mask != 0 if x.mask.dtype == BOOL else mask != -math.inf
    windowed = x.sight is None and (case.window_left >= 0 or case.window_right >= 0)
    any_seen = passes
    if passes.shape[3] > 1 and windowed:
        passes = passes.expand(*passes.shape[:4], case.kv_len)
        any_seen = passes & x.within
    if x.map_has_ranges:
        passes, in_range = torch.broadcast_tensors(passes, _own_ranges(problem))
        any_seen = passes & in_range
    blocks = []
    for seen, all_of in ((any_seen, False), (passes, True)):
        rows, keys = seen.shape[3], seen.shape[4]
        if keys == 1 and case.kv_len > 1:
            seen = seen.expand(*seen.shape[:4], 32)
        fill = (0, -seen.shape[4] % 32, 0, -rows % 32 if rows > 1 else 0)
        whole = torch.nn.functional.pad(seen.float(), fill, value=float(all_of)) > 0
        whole = whole.unflatten(4, (-1, 32))
        whole = whole.unflatten(3, (-1, 32 if rows > 1 else 1))
        blocks.append(whole.all(4).all(-1) if all_of else whole.any(4))
    bits = (blocks[0].long() << torch.arange(32)).sum(-1)
    bits = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int()
    found = torch.stack((bits, blocks[1].int()), -1).flatten(0, -2)
    assert len(found) == plan["map_elements"]
    return found


def _own_ranges(problem: Scores) -> Tensor:
    """What key ranges let through, as a mask of five dimensions, 1 where they are the same."""
    x = given(problem)
    assert x.sight is not None and x.mask is not None
    batches, heads = x.tensors["key_ranges"].shape[:2]
    sees = x.sight.sees(problem.case.kv_len)[:batches, :heads]
    return sees.unflatten(0, (-1, x.mask.inner if batches > 1 else 1))


def _hulls(problem: Scores) -> Tensor:
    """As RangeHull in ranges.h has them, of 8 rows each; rows beyond the last see nothing."""
    x = given(problem)
    assert x.sight is not None
    batches, heads = x.tensors["key_ranges"].shape[:2]
    fill = (0, -problem.case.q_len % 8)
    begin, end, prefix = (
        torch.nn.functional.pad(rows[:batches, :heads], fill, value=none).unflatten(2, (-1, 8))
        for rows, none in ((x.sight.begin, 1 << 30), (x.sight.end, 0), (x.sight.prefix, 0))
    )
    of_each = (
        begin.amin(-1), end.amax(-1), begin.amax(-1), end.amin(-1), prefix.amax(-1),
        prefix.amin(-1),
    )  # fmt: skip
    return torch.stack(of_each, -1).int()


# ---- matrix products


def products(problem: Scores, kernel: dict) -> int:
    """8 x 8 x 8 products if exactly the blocks run in which something is seen."""
    family, arguments = kernel["family"], template_arguments(kernel)
    if family not in (*KEYS_SIDE, *_PRODUCTS):
        return 0
    width = int(arguments[2]) // 8
    of_values = 16 if width == 24 and problem.case.value_dim in range(1, 129) else width
    if family in KEYS_SIDE:
        block, keys = int(arguments[3]), keys_of_group(family)
        blocks = _blocks_of_keys(problem, block, keys)
        return blocks * 4 * 2 * (block // 8) * (width + of_values) * keys // 32
    r, block = int(arguments[3]), int(arguments[4])
    of_family = _blocks_of_mask_gradient if family == DMASK else _blocks_of_queries
    blocks = of_family(problem, 32 * r, block, family)
    over_head_dim, over_values = _PRODUCTS[family]
    depth = over_head_dim * width + over_values * of_values
    return blocks * 4 * r * (block // 8) * depth


def _blocks_of_queries(problem: Scores, rows: int, keys: int, family: str) -> int:
    x, case, total = given(problem), problem.case, 0
    own = x.seen.new_ones(x.seen.shape[:3])
    if problem.ds_keys and family in (DQ, DQ_FROM_DS):
        own = _rows_of(problem, family)
    for batch in range(case.batch):
        for head in range(case.num_heads):
            for row in range(0, case.q_len, rows):
                if not own[batch, head, row]:
                    continue
                group = slice(row, row + rows)
                any_passes = x.passes[batch, head, group].any(0)
                if x.map_has_ranges:
                    seen = x.seen[batch, head, group].any(0)
                elif x.sight is not None:  # the two are met key by key
                    seen = any_passes & x.sight.sees(case.kv_len)[batch, head, group].any(0)
                elif x.mask is not None:
                    seen = x.seen[batch, head, group].any(0)
                else:
                    seen = any_passes
                for key in _span(x.within[group].any(0), keys):
                    total += bool(seen[key : key + keys].any())
    return total


def _blocks_of_keys(problem: Scores, rows: int, keys: int) -> int:
    x, case, total = given(problem), problem.case, 0
    for batch in range(case.batch):
        for head in range(case.num_heads):
            for key in range(0, case.kv_len, keys):
                key1 = min(key + keys, case.kv_len)
                within = x.within[:, key:key1].any(1)
                if x.sight is not None:
                    eights = [
                        meets(x.sight.hull(batch, head, slice(row, row + 8)), key, key1)
                        for row in range(0, case.q_len, 8)
                    ]
                    within = torch.tensor(eights).repeat_interleave(8)[: case.q_len]
                for row in _span(within, rows):
                    by_map = x.sight is None or x.map_has_ranges
                    seen = x.seen if by_map else x.passes
                    part = seen[batch, head, row // 32 * 32 :, key // 32 * 32 :][:32, :32]
                    runs = x.mask is None or bool(part.any())
                    if x.sight is not None:
                        hull = x.sight.hull(batch, head, slice(row, row + rows))
                        runs = runs and meets(hull, key, key1)
                    total += runs
    return total


def _blocks_of_mask_gradient(problem: Scores, rows: int, keys: int, family: str) -> int:
    """For each head of a batch entry: what it adds to the tiles of the mask that it shares."""
    x, case, total = given(problem), problem.case, 0
    assert x.mask is not None
    shared_rows = x.mask.sizes[3] == 1
    for batch in range(case.batch):
        for head in range(case.num_heads):
            for key in range(0, case.kv_len, keys):
                for row in _span(x.within[:, key : key + keys].any(1), rows):
                    group = slice(row, row + rows)
                    seen = x.passes[batch, head, group, key : key + keys]
                    if not shared_rows:
                        seen = seen & x.within[group, key : key + keys]
                    if x.map_has_ranges:
                        seen = x.seen[batch, head, group, key : key + keys]
                    runs = bool(seen.any())
                    if x.sight is not None:
                        runs = runs and meets(x.sight.hull(batch, head, group), key, key + keys)
                    total += runs
    return total


def _span(seen: Tensor, block: int) -> range:
    """Where the blocks begin, from the first to the last seen position."""
    places = seen.nonzero()
    if not len(places):
        return range(0)
    return range(int(places.min()) // block * block, int(places.max()) + 1, block)
