"""Whether the plan stores dS, five matrix products, or computes it twice, seven."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ..harness import DQ, DQ_FROM_DS, Request, Sources, request
from .attention import dense
from .properties import Property

_TILES = {  # by head dim and dtype: keys of a threadgroup; rows of one of dq, and of dq from dS
    (64, 0): (32, 32, 64), (128, 0): (16, 32, 64), (256, 0): (16, 32, 32), (80, 2): (32, 32, 64),
}  # fmt: skip


class Call(NamedTuple):
    """Sizes, window and GPU of a backward."""

    b: int = 1
    h: int = 4
    hk: int = 2
    l: int = 100
    s: int = 130
    d: int = 64
    dtype: int = 0
    left: int = -1
    right: int = -1
    diagonal: int = 0
    cores: int = 8
    scratch: int = 0

    def request(self, **fields: Any) -> Request:
        shapes = {"q": (self.b, self.h, self.l, self.d), "k": (self.b, self.hk, self.s, self.d)}
        shapes |= {"v": shapes["k"], "out": shapes["q"], "dout": shapes["q"]}
        layouts = {name: (shape, dense(shape), 0) for name, shape in shapes.items()}
        return request(
            layouts, self.dtype, True, window_left=self.left, window_right=self.right,
            diagonal=self.diagonal, gpu_cores=self.cores, scratch_bytes=self.scratch, **fields,
        )  # fmt: skip

    @property
    def group(self) -> int:
        return self.h // self.hk

    @property
    def heads(self) -> int:
        """Of keys and values, of all batches."""
        return self.b * self.hk

    def visible(self) -> torch.Tensor:
        """(L, S)"""
        ahead = torch.arange(self.s) - torch.arange(self.l)[:, None] - self.diagonal
        seen = torch.ones(self.l, self.s, dtype=torch.bool)
        if self.left >= 0:
            seen &= ahead >= -self.left
        if self.right >= 0:
            seen &= ahead <= self.right
        return seen


def time_of_launch(call: Call, pairs: float, groups: int, heaviest: float) -> float:
    """Of so many threadgroups: 1.4 keep a core busy; beyond 4 all cores end together."""
    most = math.ceil(groups / call.cores)
    turns = max(1.4, most) if groups <= 4 * call.cores else groups / call.cores
    return max(pairs / groups * turns, 1.4 * heaviest)


def time_of(call: Call, stored: bool, at_once: tuple[int, int], parts: int) -> float:
    """What the plan should say: all pairs are counted."""
    keys_of_group, rows_of_dq, rows_of_stored = _TILES[call.d, call.dtype]
    rows = min(rows_of_stored if stored else rows_of_dq, call.l)
    weight = 0.25 if stored else 0.75
    visible, total = call.visible().double(), 0.0
    for head, begin in itertools.product(
        range(0, call.b * call.h, at_once[0]), range(0, call.s, at_once[1])
    ):
        heads = min(at_once[0], call.b * call.h - head)
        seen = visible[:, begin : begin + at_once[1]]
        pairs = heads * seen.sum().item()
        keys = min(keys_of_group, seen.shape[1])
        of_keys = call.group // parts * keys * seen.sum(0).max().item()
        of_queries = rows * seen.sum(1).max().item()
        key_groups = heads * parts // call.group * math.ceil(seen.shape[1] / keys)
        seeing = max(int((seen.sum(1) > 0).sum()), 1)
        row_groups = heads * math.ceil(seeing / rows)
        turn = seen.shape[1] < call.s
        again = 24 * heads * call.l * turn
        time = time_of_launch(call, pairs, key_groups, of_keys)
        time += weight * time_of_launch(call, pairs + again, row_groups, of_queries)
        total += (time + 2 * 80000 / call.d) * (1.04 if turn else 1.0)
    if parts > 1:
        total += 48 * call.heads * parts * call.s / call.cores
        total += 80000 / call.d * min(math.ceil(call.b * call.h / at_once[0]), call.heads)
    return total


_WINDOWS: tuple[dict[str, int], ...] = (
    {}, {"right": 0}, {"left": 0}, {"left": 20, "right": 0}, {"left": 15, "right": 4},
    {"right": 0, "diagonal": 30}, {"right": 0, "diagonal": -40}, {"left": 9, "diagonal": 80},
    {"left": 10, "right": 5, "diagonal": -50}, {"right": 0, "diagonal": -300},
    {"left": 3, "diagonal": 300}, {"left": 1 << 40, "right": 7}, {"left": 7, "right": 1 << 40},
)  # fmt: skip


def plan_of_times(sources: Sources) -> None:
    """The estimate is what counting gives."""
    for window, cores, (d, dtype) in itertools.product(_WINDOWS, (1, 3, 8, 500), _TILES):
        for call, at_once in (
            (Call(d=d, dtype=dtype, cores=cores, **window), (4, 130)),
            (Call(l=129, d=d, dtype=dtype, cores=cores, **window), (4, 130)),
            (Call(l=1, d=d, dtype=dtype, cores=cores, **window), (4, 130)),
            (Call(b=3, h=6, d=d, dtype=dtype, cores=cores, **window), (12, 130)),
            (Call(d=d, dtype=dtype, cores=cores, **window), (2, 64)),
            (Call(h=3, hk=3, s=65, d=d, dtype=dtype, cores=cores, **window), (2, 64)),
            (Call(b=5, h=2, hk=1, d=d, dtype=dtype, cores=cores, **window), (6, 130)),
            (Call(h=8, d=d, dtype=dtype, cores=cores, **window), (2, 64)),
            (Call(b=33, h=1, hk=1, l=40, s=10, d=d, dtype=dtype, cores=cores, **window), (33, 10)),
            (Call(l=20, s=10, b=2, d=d, dtype=dtype, cores=cores, **window), (2, 10)),
        ):
            turns = max(call.group // at_once[0], 1)
            for stored, parts in itertools.product((False, True), (turns, call.group)):
                found = sources.time_of_backward(call.request(), stored, at_once, parts)
                expected = time_of(call, stored, at_once, parts)
                assert math.isclose(found, expected, rel_tol=1e-12), (call, at_once, found)
    heads = 1 << 10  # of 2^33 threadgroups
    long = Call(h=heads, hk=heads, l=1 << 28, s=1 << 28, right=0, cores=1)
    pairs = float(heads) * ((1 << 27) * ((1 << 28) + 1))
    found = sources.time_of_backward(long.request(), True, (heads, 1 << 28), 1)
    assert math.isclose(found, 1.25 * pairs + 2 * 80000 / 64, rel_tol=1e-12)


def _turns(of_all: int, fitting: int) -> int:
    return math.ceil(of_all / math.ceil(of_all / fitting))


def _heads_at_once(call: Call) -> Iterator[int]:
    """Divisors of the group, if sums of dk and dv have room, and 1, 2, 4 ... groups."""
    if call.s * 2 * call.d <= 1 << 28:
        yield from (n for n in range(1, call.group) if call.group % n == 0)
    for power in range(60):
        yield call.group * min(1 << power, call.heads)
        if 1 << power >= call.heads:
            return


def _ring(call: Call) -> tuple[int, int, int]:
    """All keys, or what 8 queries see through the window and what begins or ends in their blocks,
    with all tiles of queries."""
    keys, tiles = 8 * math.ceil(call.s / 8), math.ceil(call.l / 8)
    if min(call.left, call.right) < 0:
        return keys, tiles, 0
    return min(keys, 64 * math.ceil((call.left + call.right + 8 + 7) / 64)), tiles, 0


def _stored_rows(call: Call) -> tuple[int, int, int]:
    """The ring, or the first half of the rows that lose a tile each, with the other half in it."""
    ring, ahead = _ring(call), max(math.ceil((call.diagonal + call.right) / 8), 0)
    tiles = ring[1]
    shrinking = min(math.ceil(call.s / 8) - ahead, tiles)
    if call.right < 0 or shrinking < 1:
        return ring
    keys = 64 * math.ceil((ahead + math.ceil(shrinking / 2)) / 8)
    width = max(tiles, tiles + (tiles - shrinking + 1))  # the longest row of them, and the shortest
    smaller = keys < ring[0] and keys * width < ring[0] * tiles
    return (keys, width, (2 * ahead + shrinking - 1) * width + ahead) if smaller else ring


def divisions_of(call: Call) -> Iterator[tuple[int, ...]]:
    """What the plan should have to choose from: as many heads as fit with all keys, and keys of so
    many heads. Where a group's heads take turns, sums of dk and dv have room, too."""
    rows, stored = 8 * math.ceil(call.l / 8), _stored_rows(call)
    of_head = stored[0] * stored[1] * 8
    floats, every = call.scratch // 4, call.b * call.h
    for room in (floats, floats - min(call.scratch // 8, 1 << 30) // 4)[: 1 + (call.group > 1)]:
        left = {
            heads: room - (call.s * 2 * call.d if heads < call.group else 0)
            for heads in _heads_at_once(call)
        }
        whole = sorted((n for n in left if n * of_head <= left[n]), reverse=True)
        if whole and whole[0] >= call.group:
            fitting = room // (call.group * of_head)
            even = call.group * _turns(call.heads, min(fitting, call.heads))
            whole = [even, *whole] if even != whole[0] else whole
        for at_once in whole:
            if math.ceil(every / at_once) <= 1024:
                yield at_once, call.s, at_once * of_head, 0, *stored
        for heads in _heads_at_once(call):
            sums = heads * call.l * call.d
            keys = (left[heads] - sums) // (heads * rows) if left[heads] > sums else 0
            if 64 <= keys < _ring(call)[0]:
                keys = 64 * _turns(math.ceil(call.s / 64), keys // 64)
                if math.ceil(every / heads) * math.ceil(call.s / keys) <= 1024:
                    yield heads, keys, heads * rows * keys, sums, keys, rows // 8, 0


def _parts_of(call: Call, division: tuple[int, ...]) -> tuple[int, int]:
    """As in divided_groups.py: the least divisor of the heads that run at once, of one group, that
    fills the GPU, and fits; all parts of the group, and those that run at once."""
    heads, keys, tiles, sums, *_ = division
    of_group = min(heads, call.group)
    room = min(call.scratch // 4 - tiles - sums, min(call.scratch // 8, 1 << 30) // 4)
    most = min(
        room // (heads // of_group * call.s * 2 * call.d), of_group * call.l // 256
    )  # fmt: skip
    groups = heads // of_group * math.ceil(keys / _TILES[call.d, call.dtype][0])
    parts = 1
    for n in range(2, of_group + 1):
        if of_group % n == 0 and n <= most and parts * groups < 8 * call.cores:
            parts = n
    return call.group // of_group * parts, parts


def _calls() -> Iterator[Call]:
    for cores, scratch in itertools.product((8, 32, 132), (0, 1, 100, 256, 320, 1024, 4096)):
        at = {"cores": cores, "scratch": scratch << 20}
        for l, hk, d in itertools.product((512, 4096, 16384), (16, 4, 1), (64, 128)):
            yield Call(h=16, hk=hk, l=l, s=l, d=d, right=0, **at)
        yield Call(b=3, h=10, hk=5, l=4001, s=7009, **at)
        yield Call(b=8, h=16, hk=16, l=2048, s=2048, left=255, right=0, **at)
        for right in (9, 10):  # 64 keys, and one more
            yield Call(h=2, hk=2, l=512, s=512, left=40, right=right, **at)
        yield Call(b=64, h=32, hk=32, l=2048, s=2048, **at)
        for l, s, diagonal in (
            (2048, 1024, 0), (1024, 2048, 0), (1024, 2048, 1024), (999, 1500, 260),
            (1024, 2048, -100), (2048, 2048, 1100), (64, 4096, 100),
        ):  # fmt: skip
            for right in (0, 5):
                yield Call(h=2, hk=2, l=l, s=s, right=right, diagonal=diagonal, **at)
        yield Call(h=2, hk=2, l=2048, s=2048, left=1200, right=0, **at)  # folded, or a ring
        yield Call(h=2, hk=2, l=2048, s=2048, left=900, right=0, **at)
        yield Call(h=2, hk=2, l=2048, s=2048, right=1, **at)  # ahead by one key
        yield Call(right=0, diagonal=-(1 << 20), **at)  # no pair: all ways take the same
        yield Call(h=1, hk=1, l=1, s=1, **at)  # one: nearly the same
        yield Call(h=1, hk=1, l=70000, s=70, **at)
        yield Call(h=2, hk=1, l=8, s=1 << 17, **at)
        yield Call(h=8, hk=8, l=1 << 15, s=1 << 15, d=256, right=0, **at)


def plan_of_divisions(sources: Sources) -> None:
    """Whole heads, or keys of some heads, in turns as even as can be; at most 1024."""
    fitting = [  # so many of 640 keys, beside dq's sums
        Call(h=1, hk=1, l=8, s=640, scratch=4 * (8 * keys + 8 * 64)) for keys in (639, 640)
    ]
    for call in (*_calls(), *fitting):
        found = sources.ds_divisions(call.request())
        assert found == list(divisions_of(call)), (call, found)
    group = 2 * 6 * 8 * 9 * 8 * 4  # bytes of two query heads, 6 x 9 tiles
    for scratch, at_once in (
        (0, 0), (group - 1, 0), (group, 1), (2 * group - 1, 1), (7 * group, 5), (15 * group, 15),
        (99 * group, 15),
    ):  # fmt: skip
        found = sources.ds_divisions(Call(3, 10, 5, 41, 70, scratch=scratch).request())
        assert [x for x in found if x[1] == 70][:1] == (
            [(2 * at_once, 70, at_once * group // 4, 0, 72, 6, 0)] if at_once else []
        )
    for empty in ({"b": 0}, {"h": 0}, {"h": 0, "hk": 2}, {"hk": 0}, {"l": 0}, {"s": 0}, {"d": 48}):
        fields = {"h": 0, "hk": 0} if empty == {"h": 0} else empty
        call = Call(scratch=1 << 30)._replace(**fields)
        assert not sources.ds_divisions(call.request()), empty
    for turns, kept in ((1024, True), (1025, False)):
        call = Call(h=1, hk=1, l=8, s=64 * turns, scratch=4 * (8 * 64 + 8 * 64))
        assert bool(sources.ds_divisions(call.request())) == kept
        call = Call(b=turns, h=1, hk=1, l=8, s=8, scratch=4 * 8 * 8)
        for has_key_ranges in (False, True):
            found = sources.ds_divisions(call.request(has_key_ranges=has_key_ranges))
            assert bool(found) == kept
    for h in (64, 128, 256):  # whose tiles of one key/value head are 2^62 floats and more
        far = Call(h=h, hk=1, l=1 << 28, s=1 << 28, scratch=1 << 40)
        assert sources.ds_divisions(far.request()) == list(divisions_of(far))
    many = Call(h=32, hk=32, l=1, s=1 << 28, scratch=1 << 37)  # of one head 2^32 - 8 keys would fit
    for more in (0, 4 * 8 * ((1 << 27) + 16)):  # or 2^32 + 2^27
        call = many._replace(scratch=many.scratch + more)
        assert sources.ds_divisions(call.request()) == list(divisions_of(call)) != []
    for s in (1 << 21, (1 << 21) + 1):  # sums of 2^28 numbers, and of more
        call = Call(h=2, hk=1, l=8, s=s, scratch=1 << 33)
        assert sources.ds_divisions(call.request()) == list(divisions_of(call)) != []
    even = Call(h=1, hk=1, l=8, s=128, right=0, diagonal=56, scratch=1 << 20)
    assert _stored_rows(even) == _ring(even)  # folded they would take as much
    assert sources.ds_divisions(even.request()) == list(divisions_of(even)) != []


def _launches(call: Call, plan: dict, at_once: tuple[int, int], parts: int) -> Iterator[list[int]]:
    """dk and dv, and dq behind them, in turns; where groups are divided, the sums of their parts
    behind all turns of their heads."""
    every = call.b * call.h
    for head in range(0, every, at_once[0]):
        heads = min(at_once[0], every - head)
        for begin in range(0, call.s, at_once[1]):
            end = min(begin + at_once[1], call.s)
            groups = math.ceil((end - begin) / _TILES[call.d, call.dtype][0])
            yield [1, heads * parts // call.group, groups, head, begin, end]
            yield [2, heads, plan["kernels"][2]["groups"][1], head, begin, end]
        if parts > 1 and (head + heads) % call.group == 0:
            groups = max(heads // call.group, 1)
            first = head + heads - groups * call.group
            yield [3, groups, plan["kernels"][3]["groups"][1], first, 0, call.s]


def plan_of_choices(sources: Sources) -> None:
    """Of seven products and the divisions the one that takes least; the first of equal ones."""
    chosen = set()
    for call in _calls():
        seven = (call.b * call.h, call.s, 0, 0, 0, 0, 0)
        options = [seven, *sources.ds_divisions(call.request())]
        times = []
        for x in options:
            parts, _ = _parts_of(call, x)
            times.append(sources.time_of_backward(call.request(), x[2] > 0, x[:2], parts))
        for stores_ds in (False, True):
            first = 1 if stores_ds and len(options) > 1 else 0
            best = min(range(first, len(options)), key=times.__getitem__)
            heads, keys, tiles, sums, *rows = options[best]
            plan, params = sources.plan(call.request(stores_ds=stores_ds))
            assert plan["scratch_bytes"] == 4 * (tiles + sums), (call, options[best])
            assert params.dq_sums == tiles
            assert [params.ds_keys, params.ds_row, params.ds_folded] == rows
            assert (params.dkv_parts, params.dkv_sums) == _parts_of(call, options[best])
            groups = params.dkv_sums * max(heads // call.group, 1)
            elements = groups * call.s * 2 * call.d if params.dkv_parts > 1 else 0
            assert plan["dkv_part_elements"] == elements
            family = DQ_FROM_DS if tiles else DQ
            assert plan["kernels"][2]["family"] == family
            assert plan["launches"][1:] == list(
                _launches(call, plan, (heads, keys), params.dkv_parts)
            )
            of_heads = (heads < call.group) + (heads < call.b * call.h)
            fewer = 0 < rows[0] < call.s and keys == call.s
            chosen.add((tiles > 0, of_heads, keys < call.s, fewer, rows[2] > 0))
    assert len(chosen) == 11, chosen


def plan_of_ranges_in_turns(sources: Sources) -> None:
    """What key_ranges let rows see is not known: whole heads are stored if they fit at all."""
    for call in (
        Call(h=16, hk=16, l=512, s=512, cores=132, scratch=1 << 20),
        Call(scratch=1 << 30),
    ):
        found = sources.ds_divisions(call.request(has_key_ranges=True))
        rows = call.group * 8 * math.ceil(call.l / 8)
        stored = 8 * math.ceil(call.s / 8)
        heads = min(call.scratch // 4 // (rows * stored), call.heads)
        heads = _turns(call.heads, heads)
        tiles = math.ceil(call.l / 8)
        first = (heads * call.group, call.s, heads * rows * stored, 0, stored, tiles, 0)
        assert found[0] == first
        for right in (-1, 0):  # rows are not folded
            window = call._replace(right=right)
            plan, params = sources.plan(window.request(has_key_ranges=True))
            assert plan["scratch_bytes"] == 4 * heads * rows * stored
            assert [params.ds_keys, params.ds_row, params.ds_folded] == [stored, tiles, 0]
    assert not sources.ds_divisions(Call(scratch=1 << 16).request(has_key_ranges=True))


def properties() -> Iterator[Property]:
    for of_plan in (plan_of_times, plan_of_divisions, plan_of_choices, plan_of_ranges_in_turns):
        name = of_plan.__name__.removeprefix("plan_of_").replace("_", " ")
        yield Property(f"plan: products: {name}", None, of_plan)
