"""flash_attn_with_kvcache, against a mathematics of its own that fills lists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bottom_right import mathematics
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from representative import product
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import orchard_ops
from orchard_ops import cache_attention, flash_attn_with_kvcache

pytestmark = pytest.mark.usefixtures("checked")

NAN = float("nan")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BASE: dict[str, Any] = {
    "lengths": (40, 7),
    "starts": None,
    "heads": (4, 2),
    "q_len": 1,
    "new": 1,
    "widths": (16, 16),
    "slots": 64,
    "page_size": 0,
    "entries": False,
    "rotated": 0,
    "interleaved": True,
    "causal": True,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "softmax_scale": None,
    "alibi": "",
    "dtype": torch.float64,
    "seed": 1,
}


class Problem:
    """Arguments, in which what no sequence has is NaN, and each sequence's rows apart."""

    def __init__(self, **options: Any):
        self.of = of = BASE | options
        generator = torch.Generator().manual_seed(of["seed"])
        (heads, kv_heads), (width, value_width) = of["heads"], of["widths"]
        batch = len(of["lengths"])

        def draw(*shape: int) -> Tensor:
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            return x.to(of["dtype"])

        self.q = draw(batch, of["q_len"], heads, width)
        self.new = None
        if of["new"]:
            self.new = [draw(batch, of["new"], kv_heads, n) for n in (width, value_width)]
        self.starts = of["starts"] or [0] * batch
        # Before the call: of each sequence, its rows up to its length.
        self.rows = [[draw(n, kv_heads, w) for n in of["lengths"]] for w in (width, value_width)]
        rooms = [
            torch.full((batch, of["slots"], kv_heads, w), NAN, dtype=of["dtype"])
            for w in (width, value_width)
        ]
        for room, rows in zip(rooms, self.rows):
            for b, x in enumerate(rows):
                room[b, self.starts[b] : len(x)] = x[self.starts[b] :]
        self.table = self.index = None
        if of["page_size"]:
            pages = of["slots"] // of["page_size"]
            order = torch.randperm(batch * pages + 2, generator=generator)[: batch * pages]
            self.table = order.view(batch, pages).int()
            number, size = batch * pages + 2, of["page_size"]
        else:
            self.index = torch.arange(batch).int()
            if of["entries"]:
                self.index = torch.arange(batch + 1, 1, -1).int()
            number, size = batch + 2 * of["entries"], of["slots"]
        self.caches = [torch.full((number, size, *x.shape[2:]), NAN, dtype=x.dtype) for x in rooms]
        for cache, room in zip(self.caches, rooms):
            self.set_rooms(cache, room)
        self.cos = self.sin = None
        if of["rotated"]:
            angles = draw(max(of["slots"], of["q_len"]) + 3, of["rotated"] // 2).double()
            self.cos, self.sin = (x.to(of["dtype"]) for x in (angles.cos(), angles.sin()))
        self.slopes = None
        if of["alibi"]:
            shape = (batch, heads) if of["alibi"] == "batch" else (heads,)
            self.slopes = torch.rand(shape, generator=generator)

    def set_rooms(self, cache: Tensor, rooms: Tensor) -> None:
        if self.table is None:
            cache[self.index.long()] = rooms
        else:
            cache[self.table.flatten().long()] = rooms.reshape(-1, *cache.shape[1:])

    def arguments(self, device: str = "cpu") -> dict[str, Any]:
        k, v = self.new or (None, None)
        of = self.of
        arguments = {
            "q": self.q,
            "k_cache": self.caches[0].clone(),
            "v_cache": self.caches[1].clone(),
            "k": k,
            "v": v,
            "rotary_cos": self.cos,
            "rotary_sin": self.sin,
            "cache_seqlens": torch.tensor(of["lengths"], dtype=torch.int32),
            "cache_batch_idx": self.index if of["entries"] and self.table is None else None,
            "cache_leftpad": None if of["starts"] is None else torch.tensor(of["starts"]).int(),
            "block_table": self.table,
            "softmax_scale": of["softmax_scale"],
            "causal": of["causal"],
            "window_size": of["window_size"],
            "softcap": of["softcap"],
            "rotary_interleaved": of["interleaved"],
            "alibi_slopes": self.slopes,
        }
        return {n: x.to(device) if isinstance(x, Tensor) else x for n, x in arguments.items()}

    def _turned(self, x: Tensor, positions: list[int]) -> Tensor:
        """x (tokens, heads, D) with complex numbers, in float64."""
        if self.cos is None or self.sin is None:
            return x.double()
        half = self.cos.shape[1]
        c, s = self.cos.double(), self.sin.double()
        result = x.double().clone()
        for token, position in enumerate(positions):
            place = min(position, c.shape[0] - 1)
            turn = torch.complex(c[place], s[place])
            for i in range(half):
                at = (2 * i, 2 * i + 1) if self.of["interleaved"] else (i, i + half)
                z = torch.complex(*(x[token, :, n].double() for n in at)) * turn[i]
                result[token, :, at[0]], result[token, :, at[1]] = z.real, z.imag
        return result

    def expected(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """out and lse in float64, and the caches after the call."""
        of = self.of
        outs, lses = [], []
        sides = [side if 0 <= side < of["slots"] else -1 for side in of["window_size"]]
        by_row = of["causal"] or max(sides) >= 0
        after = [torch.full((len(of["lengths"]), of["slots"], *x.shape[2:]), NAN, dtype=x.dtype)
                 for x in self.caches]  # fmt: skip
        for b, length in enumerate(of["lengths"]):
            rows = [x[b].double() for x in self.rows]
            if self.new is not None:
                k = self._turned(self.new[0][b], [length + i for i in range(of["new"])])
                added = (k.to(of["dtype"]), self.new[1][b])
                rows = [torch.cat((x, y.double())) for x, y in zip(rows, added)]
            for room, x in zip(after, rows):
                room[b, self.starts[b] : len(x)] = x[self.starts[b] :].to(room.dtype)
            q = self._turned(self.q[b], [length + i * by_row for i in range(of["q_len"])])
            q = q.to(of["dtype"]).double()
            slopes = self.slopes
            out, lse = mathematics(
                q[None],
                *(x[None, self.starts[b] :] for x in rows),
                softmax_scale=of["softmax_scale"],
                causal=of["causal"],
                window_size=tuple(sides),
                softcap=of["softcap"],
                alibi_slopes=slopes[b] if slopes is not None and slopes.dim() == 2 else slopes,
                longest_key=1 << 30,
            )
            outs.append(out)
            lses.append(lse)
        caches = [x.clone() for x in self.caches]
        for cache, room in zip(caches, after):
            self.set_rooms(cache, room)
        return torch.cat(outs), torch.cat(lses), caches

    def check(self, device: str = "cpu") -> None:
        arguments = self.arguments(device)
        kept = {n: x.clone() for n, x in arguments.items() if isinstance(x, Tensor)}
        out, lse = flash_attn_with_kvcache(**arguments, return_softmax_lse=True)
        again = flash_attn_with_kvcache(**self.arguments(device), num_splits=3)
        assert torch.equal(again, out)
        right, right_lse, caches = self.expected()
        eps = torch.finfo(self.of["dtype"]).eps
        size = right.abs().max().item() if right.numel() else 0.0
        torch.testing.assert_close(out.cpu().double(), right, rtol=0, atol=8 * eps * (size + 0.1))
        assert lse.dtype == torch.promote_types(torch.float32, self.of["dtype"])
        tolerance = 1e-9 if self.of["dtype"] == torch.float64 else 1e-5
        torch.testing.assert_close(lse.cpu().double(), right_lse, rtol=tolerance, atol=tolerance)
        # Rotated keys may be rounded to either side; all else has its own bits.
        rounding = {"rtol": eps, "atol": eps} if self.of["rotated"] else {"rtol": 0, "atol": 0}
        for name, cache in zip(("k_cache", "v_cache"), caches):
            found = arguments[name].cpu()
            torch.testing.assert_close(found, cache, equal_nan=True, **rounding)
            old = kept[name].cpu()
            same = (found == old) | (found.isnan() & old.isnan())
            assert bool(same[~old.isnan()].all())
        for name, x in kept.items():
            if name not in ("k_cache", "v_cache"):
                assert torch.equal(arguments[name], x), name


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads, batch = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    page_size = draw(st.sampled_from((0, 0, 16)))
    slots = page_size * draw(st.integers(1, 2)) if page_size else draw(st.integers(4, 30))
    new = draw(st.integers(0, 4))
    lengths = tuple(draw(st.integers(0, slots - new)) for _ in range(batch))
    side = st.one_of(st.just(-1), st.integers(0, 35))
    return {
        "lengths": lengths,
        "starts": tuple(draw(st.integers(0, n)) for n in lengths) if draw(st.booleans()) else None,
        "heads": (kv_heads * draw(st.integers(1, 3)), kv_heads),
        "q_len": draw(st.sampled_from((1, 2, 5, 20))),
        "new": new,
        "widths": draw(st.sampled_from(((8, 8), (6, 12)))),
        "slots": slots,
        "page_size": page_size,
        "entries": draw(st.booleans()),
        "rotated": draw(st.sampled_from((0, 2, 6))) if new else 0,
        "interleaved": draw(st.booleans()),
        "causal": draw(st.booleans()),
        "window_size": (draw(side), draw(side)),
        "softcap": draw(st.sampled_from((0.0, 1.5, -1.0))),
        "softmax_scale": draw(st.sampled_from((None, 0.7, -0.2))),
        "alibi": draw(st.sampled_from(("", "head", "batch"))),
        "seed": draw(st.integers(0, 2**31)),
    }


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(problem=problems())
def test_is_the_documented_mathematics(problem: dict[str, Any]):
    """Every argument; NaN in unused slots, pages and entries; nothing else is written."""
    Problem(**problem).check()


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problem=problems(), dtype=st.sampled_from(DTYPES))
def test_any_problem_on_metal(problem: dict[str, Any], dtype: torch.dtype):
    Problem(**problem | {"dtype": dtype}).check("mps")


ON_METAL = {
    "a token": {"widths": (64, 64), "heads": (8, 2)},
    "rotated": {"widths": (64, 64), "rotated": 64, "q_len": 3, "new": 3},
    "partly rotated, halves": {"rotated": 8, "interleaved": False, "q_len": 2, "new": 2},
    "rotated alike": {"rotated": 16, "q_len": 3, "new": 1, "causal": False},
    "fewer new keys than queries": {"q_len": 5, "new": 2, "rotated": 16},
    "more new keys than queries": {"q_len": 2, "new": 9},
    "no new keys": {"new": 0, "causal": False},
    "pages": {"page_size": 16, "new": 20, "q_len": 2, "rotated": 16},
    "odd pages": {"page_size": 7, "slots": 63, "new": 3, "q_len": 2, "rotated": 16},
    "odd pages, many queries": {"page_size": 21, "slots": 63, "q_len": 20, "starts": (3, 7)},
    "pages of one key": {"page_size": 1, "new": 3, "alibi": "batch"},
    "wide pages": {"page_size": 48, "slots": 96, "lengths": (90, 47), "new": 3},
    "other entries": {"entries": True, "new": 3},
    "left padding": {"starts": (21, 7), "new": 3, "q_len": 3, "rotated": 16},
    "window, softcap, slopes": {"window_size": (9, 2), "softcap": 2.0, "alibi": "batch"},
    "odd widths": {"widths": (18, 5), "new": 2},
    "many queries": {"q_len": 33, "new": 33, "lengths": (30, 0)},
    "many queries, pages": {"q_len": 17, "new": 17, "page_size": 16, "rotated": 16},
    "many queries, entries": {"q_len": 17, "new": 5, "entries": True, "starts": (3, 7)},
}


@pytest.mark.parametrize("name, dtype", product(tuple(ON_METAL), DTYPES), ids=str)
def test_on_metal(dtype: torch.dtype, name: str, fresh_stats: None):
    Problem(**ON_METAL[name], dtype=dtype).check("mps")
    assert orchard_ops.stats().fallbacks == 0


@pytest.mark.parametrize("q_len", (1, 20))
def test_wide_heads_run_on_the_reference(q_len: int, fresh_stats: None):
    problem = Problem(widths=(257, 16), q_len=q_len, dtype=torch.float32)
    with pytest.warns(orchard_ops.OrchardFallbackWarning, match="head_dim is above 256"):
        problem.check("mps")


SLICED = {
    "few queries, odd pages": {"page_size": 8, "q_len": 2},
    "many queries, pages": {"page_size": 16, "q_len": 20, "alibi": "batch"},
    "many queries, entries": {"entries": True, "q_len": 20},
}


@pytest.mark.parametrize("name", SLICED)
def test_pages_are_copied_for_some_sequences_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch):
    """The results have the same bits, and no more rooms are there at once than the limit holds."""
    lengths, starts = (40, 7, 63, 0, 16), (3, 0, 7, 0, 16)
    problem = Problem(lengths=lengths, starts=starts, dtype=torch.float16, **SLICED[name])
    whole = flash_attn_with_kvcache(**problem.arguments("mps"))
    room = 64 * 2 * 32 * 2
    for held, most in ((0, 1), (2 * room + 1, 2)):
        monkeypatch.setattr(cache_attention, "GATHERED_BYTES", held)
        with Keys() as keys:
            assert torch.equal(flash_attn_with_kvcache(**problem.arguments("mps")), whole)
        assert {shape[0] for shape in keys.shapes} <= {most, 1}


def test_pages_that_surely_hold_no_key_are_not_copied():
    """As where an int says how many there are; of other lengths nobody knows without a wait."""
    problem = Problem(lengths=(9, 9), page_size=16, q_len=20, new=20, dtype=torch.float32)
    expected = flash_attn_with_kvcache(**problem.arguments())
    with Keys() as keys:
        found = flash_attn_with_kvcache(**problem.arguments() | {"cache_seqlens": 9})
    torch.testing.assert_close(found, expected)
    assert [shape[2] for shape in keys.shapes] == [32]  # of 64


class Keys(TorchDispatchMode):
    """The shapes of the keys that the ops get."""

    def __enter__(self) -> Keys:
        self.shapes: list[tuple[int, ...]] = []
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ops = torch.ops.orchard
        if func in (ops.flash_attn_fwd.default, ops.flash_attn_decode.default):
            self.shapes.append(tuple(args[1].shape))
        return func(*args, **(kwargs or {}))


def test_nothing_is_waited_for():
    import simulator

    problem = Problem(**ON_METAL["pages"], dtype=torch.float16)
    arguments = problem.arguments("mps")
    before = simulator.waits().total
    flash_attn_with_kvcache(**arguments)
    assert simulator.waits().total == before


@pytest.mark.parametrize("page_size", (0, 16))
@pytest.mark.parametrize("device", ("cpu", "mps"))
def test_keys_without_room_are_left_out(device: str, page_size: int):
    """Neither the next page nor another sequence's room is written to."""
    problem = Problem(lengths=(62, 7), new=4, page_size=page_size, dtype=torch.float32)
    arguments = problem.arguments(device)
    old = [arguments[name].clone() for name in ("k_cache", "v_cache")]
    out = flash_attn_with_kvcache(**arguments)
    assert out.isfinite().all()
    written = 0
    for name, x in zip(("k_cache", "v_cache"), old):
        written += int((~arguments[name].isnan() & x.isnan()).any(-1).any(-1).sum())
    assert written == 2 * (2 + 4)


@pytest.mark.parametrize("device", ("cpu", "mps"))
@pytest.mark.parametrize("wrong", (-1, 1 << 20))
def test_wrong_entries_and_pages_are_not_written(device: str, wrong: int):
    for of, name in (({"page_size": 16}, "block_table"), ({"entries": True}, "cache_batch_idx")):
        arguments = Problem(**of, dtype=torch.float32).arguments(device)
        arguments[name] = torch.full_like(arguments[name], wrong)
        old = [arguments[x].clone() for x in ("k_cache", "v_cache")]
        flash_attn_with_kvcache(**arguments)
        for x, y in zip(("k_cache", "v_cache"), old):
            torch.testing.assert_close(arguments[x], y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", ("cpu", "mps"))
@pytest.mark.parametrize("q_len", (1, 20))
def test_a_cache_may_have_entries_to_spare(q_len: int, device: str):
    """As in FlashAttention-2: sequence b has entry b, and the rest stays as it is."""
    problem = Problem(q_len=q_len, new=q_len, rotated=8, dtype=torch.float32)
    right, larger = (problem.arguments(device) for _ in range(2))
    for name in ("k_cache", "v_cache"):
        spare = torch.full((3, *larger[name].shape[1:]), NAN, device=device)
        larger[name] = torch.cat((larger[name], spare))
    results = [flash_attn_with_kvcache(**x, return_softmax_lse=True) for x in (right, larger)]
    for x, y in zip(*results):
        assert torch.equal(x, y)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(larger[name][:2].nan_to_num(), right[name].nan_to_num())
        assert bool(larger[name][2:].isnan().all())


def test_integer_lengths_and_wider_integers():
    """An int stands for all sequences; int64 numbers are taken, whatever they are."""
    problem = Problem(lengths=(9, 9), entries=True, starts=(2, 9), rotated=8)
    names = ("cache_seqlens", "cache_batch_idx", "cache_leftpad")
    expected = flash_attn_with_kvcache(**problem.arguments())
    arguments = problem.arguments()
    arguments |= {name: arguments[name].long() for name in names}
    assert torch.equal(flash_attn_with_kvcache(**arguments), expected)
    arguments = problem.arguments() | {"cache_seqlens": 9}
    assert torch.equal(flash_attn_with_kvcache(**arguments), expected)
    arguments = problem.arguments() | {"cache_seqlens": torch.tensor([1 << 40, -(1 << 40)])}
    flash_attn_with_kvcache(**arguments)


def test_no_lengths_are_all_slots():
    problem = Problem(lengths=(64, 64), new=0)
    expected = flash_attn_with_kvcache(**problem.arguments())
    arguments = problem.arguments() | {"cache_seqlens": None}
    assert torch.equal(flash_attn_with_kvcache(**arguments), expected)


@pytest.mark.parametrize("q_len", (1, 17))
def test_a_loop_of_tokens_is_the_whole_causal_attention(q_len: int):
    """Prompt and tokens one after another: what flash_attn_func gives all at once."""
    q, k, v = (torch.randn(2, 17 + 12, h, 16, device="mps") for h in (4, 2, 2))
    whole = orchard_ops.flash_attn_func(q, k, v, causal=True)
    caches = [torch.full((2, 32, 2, 16), NAN, device="mps") for _ in range(2)]
    done = 0
    for n in (17, *[1] * 12) if q_len == 17 else [1] * 29:
        part = slice(done, done + n)
        out = flash_attn_with_kvcache(
            q[:, part], *caches, k[:, part], v[:, part], cache_seqlens=done, causal=True
        )
        torch.testing.assert_close(out, whole[:, part], rtol=1e-5, atol=1e-5)
        done += n


def test_compiles_whole():
    problem = Problem(**ON_METAL["pages"], dtype=torch.float16)
    compiled = torch.compile(flash_attn_with_kvcache, backend="aot_eager", fullgraph=True)
    one, other = problem.arguments("mps"), problem.arguments("mps")
    assert torch.equal(compiled(**one), flash_attn_with_kvcache(**other))
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(one[name], other[name], equal_nan=True, rtol=0, atol=0)


def _compiles(calls: list[dict[str, Any]], **options: Any) -> int:
    """How many graphs the calls take, whose results are those of eager calls."""
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(flash_attn_with_kvcache, backend=backend, fullgraph=True, **options)
    for call in calls:
        copies = {n: call[n].clone() for n in ("k_cache", "v_cache")}
        assert torch.equal(compiled(**call), flash_attn_with_kvcache(**call | copies))
    return len(graphs)


@pytest.mark.parametrize("device", ("cpu", "mps"))
def test_a_count_of_keys_that_grows_compiles_once_more(device: str):
    problem = Problem(dtype=torch.float32)
    problem.caches = [x.nan_to_num() for x in problem.caches]
    calls = [problem.arguments(device) | {"cache_seqlens": n} for n in range(10, 16)]
    assert _compiles(calls) == 2  # the first number, and any


def test_prompts_of_many_lengths_are_one_graph():
    calls = [Problem(new=n, q_len=n, dtype=torch.float32).arguments() for n in range(3, 10)]
    assert _compiles(calls, dynamic=True) == 1


def test_is_reported():
    problem = Problem(**ON_METAL["pages"], dtype=torch.float16)
    with orchard_ops.report(show=False) as report:
        for _ in range(2):
            flash_attn_with_kvcache(**problem.arguments("mps"))
        flash_attn_with_kvcache(**problem.arguments())
    metal, reference = report.calls
    assert (metal.direction, metal.path, metal.count) == ("decode", "metal", 2)
    assert (reference.path, reference.reason) == (
        "reference",
        "the tensors are on cpu, not on mps",
    )
    assert metal.query == (2, 4, 2, 16) and metal.arguments == (
        "causal, added 20, cache_seqlens (2,) int32, block_table (2, 4) int32"
    )
    assert metal.kernels == (
        "attention_decode_float16_d16_v16_r1_chunks_paged",
        "attention_decode_merge_float16",
    )
