"""flash_attn_varlen_func with keys in pages, seqused_k and leftpad_k: each sequence alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from bottom_right import mathematics
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import orchard_ops
from orchard_ops import KeyRanges, cache_attention, flash_attn_varlen, flash_attn_varlen_func
from orchard_ops.cache import MOST_QUERIES

NAN = float("nan")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BASE: dict[str, Any] = {
    "lengths": ((1, 40), (3, 7), (0, 12), (2, 0)),  # queries and keys of the sequences
    "padding": None,
    "page_size": 16,
    "pages": 3,
    "used": True,
    "heads": (4, 2),
    "widths": (16, 16),
    "rest": 0,
    "causal": True,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "softmax_scale": None,
    "alibi": "",
    "dtype": torch.float64,
    "seed": 1,
}


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


class Problem:
    """Keys in pages, or packed with places to spare (page_size 0); what no sequence has is NaN."""

    def __init__(self, **changed: Any):
        self.of = of = BASE | changed
        generator = torch.Generator().manual_seed(of["seed"])
        (heads, kv_heads), widths = of["heads"], of["widths"]
        self.q_lens, self.k_lens = ([pair[n] for pair in of["lengths"]] for n in (0, 1))
        count = len(self.q_lens)
        self.starts = of["padding"] or [0] * count

        def draw(*shape: int) -> Tensor:
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            return x.to(of["dtype"])

        self.q = draw(sum(self.q_lens) + of["rest"], heads, widths[0])
        self.rows = [[draw(n, kv_heads, w) for n in self.k_lens] for w in widths]
        self.table, self.tensors = None, []
        room = of["page_size"] * of["pages"]
        if of["page_size"]:
            order = torch.randperm(count * of["pages"] + 2, generator=generator)
            self.table = order[: count * of["pages"]].view(count, of["pages"]).int()
            shape = (count * of["pages"] + 2, of["page_size"])
        else:  # every sequence has three places more than keys
            places = [n + 3 for n in self.k_lens]
            self.of_place = cumulative(places)
            shape = (sum(places) + 2,)
        for rows in self.rows:
            tensor = torch.full((*shape, *rows[0].shape[1:]), NAN, dtype=of["dtype"])
            for n, x in enumerate(rows):
                kept = x.clone()
                kept[: self.starts[n]] = NAN
                if self.table is not None:
                    whole = torch.full((room, *x.shape[1:]), NAN, dtype=of["dtype"])
                    whole[: len(x)] = kept
                    tensor[self.table[n].long()] = whole.unflatten(0, (-1, of["page_size"]))
                else:
                    first = int(self.of_place[n])
                    tensor[first : first + len(x)] = kept
            self.tensors.append(tensor)
        self.slopes = None
        if of["alibi"]:
            shape = (count, heads) if of["alibi"] == "sequence" else (heads,)
            self.slopes = torch.rand(shape, generator=generator)

    def arguments(self, device: str = "cpu") -> dict[str, Any]:
        of = self.of
        used = torch.tensor(self.k_lens) if of["used"] or self.table is None else None
        arguments = {
            "q": self.q,
            "k": self.tensors[0],
            "v": self.tensors[1],
            "cu_seqlens_q": cumulative(self.q_lens),
            "cu_seqlens_k": self.of_place if self.table is None else cumulative(self.k_lens),
            "max_seqlen_q": max(self.q_lens, default=0),
            "max_seqlen_k": max(self.k_lens, default=0),
            "block_table": self.table,
            "seqused_k": used,
            "leftpad_k": None if of["padding"] is None else torch.tensor(of["padding"]),
            **{x: of[x] for x in ("causal", "window_size", "softcap", "softmax_scale")},
            "alibi_slopes": self.slopes,
        }
        return {n: x.to(device) if isinstance(x, Tensor) else x for n, x in arguments.items()}

    def run(self, device: str = "cpu", **changed: Any) -> tuple[Tensor, Tensor]:
        arguments = self.arguments(device) | changed
        out, lse, _ = flash_attn_varlen_func(**arguments, return_attn_probs=True)
        return out.cpu(), lse.cpu()

    def expected(self) -> tuple[Tensor, Tensor]:
        """In float64, from each sequence's own keys."""
        heads, of = self.of["heads"][0], self.of
        longest = max(self.k_lens, default=0)
        total = self.q.shape[0]
        out = torch.zeros(total, heads, of["widths"][1], dtype=torch.float64)
        lse = torch.full((heads, total), -math.inf, dtype=torch.float64)
        first = 0
        for n, q_len in enumerate(self.q_lens):
            if q_len == 0:
                continue
            k, v = (rows[n][self.starts[n] :].double() for rows in self.rows)
            sides = tuple(-1 if side >= longest else side for side in of["window_size"])
            one = mathematics(
                self.q[None, first : first + q_len].double(),
                k[None],
                v[None],
                softmax_scale=of["softmax_scale"],
                causal=of["causal"],
                window_size=sides,
                softcap=of["softcap"],
                alibi_slopes=self.slopes[n] if of["alibi"] == "sequence" else self.slopes,
                longest_key=1 << 30,
            )
            out[first : first + q_len], lse[:, first : first + q_len] = one[0][0], one[1][0]
            first += q_len
        return out, lse

    def check(self, device: str = "cpu") -> None:
        out, lse = self.run(device)
        right, right_lse = self.expected()
        eps = torch.finfo(self.of["dtype"]).eps
        size = right.abs().max().item() if right.numel() else 0.0
        torch.testing.assert_close(out.double(), right, rtol=0, atol=8 * eps * (size + 0.1))
        tolerance = 1e-9 if self.of["dtype"] == torch.float64 else 1e-5
        torch.testing.assert_close(lse.double(), right_lse, rtol=tolerance, atol=tolerance)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads = draw(st.integers(1, 2))
    page_size, pages = draw(st.sampled_from((0, 1, 7, 16, 32))), draw(st.integers(1, 3))
    most = page_size * pages or 40
    longest_query = draw(st.sampled_from((1, 4, 16, 20)))
    lengths = draw(
        st.lists(
            st.tuples(st.integers(0, longest_query), st.integers(0, most)), min_size=1, max_size=4
        )
    )
    side = st.one_of(st.just(-1), st.integers(0, 25))
    return {
        "lengths": lengths,
        "padding": [draw(st.integers(0, n)) for _, n in lengths] if draw(st.booleans()) else None,
        "page_size": page_size,
        "pages": pages,
        "used": draw(st.booleans()),
        "heads": (kv_heads * draw(st.integers(1, 3)), kv_heads),
        "widths": draw(st.sampled_from(((8, 8), (5, 12)))),
        "rest": draw(st.integers(0, 2)),
        "causal": draw(st.booleans()),
        "window_size": (draw(side), draw(side)),
        "softcap": draw(st.sampled_from((0.0, 1.5))),
        "softmax_scale": draw(st.sampled_from((None, 0.7))),
        "alibi": draw(st.sampled_from(("", "head", "sequence"))),
        "seed": draw(st.integers(0, 2**31)),
    }


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(problem=problems())
def test_each_sequence_is_what_it_is_alone(problem: dict[str, Any]):
    """Every argument; NaN in padding, in unused places and in pages of nobody."""
    Problem(**problem).check()


ON_METAL: dict[str, dict[str, Any]] = {
    "few queries": {},
    "many queries": {"lengths": ((20, 40), (1, 7), (0, 12))},
    "odd pages": {"page_size": 10, "pages": 4},
    "odd pages, many queries": {"page_size": 5, "pages": 8, "lengths": ((33, 40), (2, 7))},
    "padding, few": {"padding": [31, 7, 0, 0], "rest": 2},
    "padding, many": {"padding": [31, 0], "lengths": ((20, 40), (1, 7)), "rest": 2},
    "windows, softcap, slopes": {
        "causal": False, "window_size": (9, 2), "softcap": 2.0, "alibi": "sequence"
    },
    "the same, many queries": {
        "lengths": ((20, 40), (1, 7)), "window_size": (9, 2), "softcap": 2.0, "alibi": "sequence"
    },
    "widths": {"widths": (18, 5)},
    "packed": {"page_size": 0, "padding": [3, 0, 5, 0]},
}  # fmt: skip


@pytest.mark.parametrize("name", ON_METAL)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_metal(dtype: torch.dtype, name: str, checked: None, fresh_stats: None):
    Problem(**ON_METAL[name], dtype=dtype).check("mps")
    assert orchard_ops.stats().fallbacks == 0


@pytest.mark.parametrize("device", ("cpu", "mps"))
@pytest.mark.parametrize("q_len", (2, 20))
@pytest.mark.parametrize("alibi", ("", "sequence"))
def test_slices_of_the_sequences_are_all_of_them(
    alibi: str, q_len: int, device: str, monkeypatch: pytest.MonkeyPatch
):
    """Pages are copied for some sequences at a time; on Metal the results have the same bits."""
    problem = Problem(
        page_size=5, pages=8, alibi=alibi, dtype=torch.float16,
        lengths=((q_len, 40), (1, 7), (0, 12), (2, 0), (q_len, 38)), padding=[1, 0, 2, 0, 5],
    )  # fmt: skip
    whole = problem.run(device)
    room = 40 * 2 * 32 * 2
    for held in (0, 2 * room):
        monkeypatch.setattr(cache_attention, "GATHERED_BYTES", held)
        for x, y in zip(problem.run(device), whole):
            # The matrix products of the CPU have other bits in other shapes.
            tolerance = 0.0 if device == "mps" else 1e-3
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", ("cpu", "mps"))
@pytest.mark.parametrize("q_len", (2, 20))
def test_a_sequence_does_not_depend_on_its_neighbours(q_len: int, device: str):
    """Bit for bit, whatever numbers the others hold; few queries: NaN, too."""
    problem = Problem(lengths=((q_len, 31), (3, 17), (q_len, 40)), dtype=torch.float16)
    middle = slice(q_len, q_len + 3)
    out, lse = problem.run(device)
    problem.q[:q_len] *= 50
    problem.q[q_len + 3 :] *= -50
    for x in problem.tensors:
        for n in (0, 2):
            x[problem.table[n].long()] = NAN if q_len == 2 else 1e3
    again = problem.run(device)
    assert torch.equal(again[0][middle], out[middle])
    assert torch.equal(again[1][:, middle], lse[:, middle])


class Calls(TorchDispatchMode):
    """The ops that run attention: their names, and where and how large their keys are."""

    def __enter__(self) -> Calls:
        self.seen: list[tuple[str, int, tuple[int, ...]]] = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        ops = torch.ops.orchard
        if func in (ops.flash_attn_fwd.default, ops.flash_attn_decode.default):
            key = args[1]
            name = func.__name__.partition(".")[0]
            self.seen.append((name, key.untyped_storage().data_ptr(), tuple(key.shape)))
        return func(*args, **(kwargs or {}))


def test_few_queries_read_pages_in_place():
    problem = Problem()
    with Calls() as calls:
        arguments = problem.arguments()
        flash_attn_varlen_func(**arguments)
    ((name, place, _),) = calls.seen
    assert (name, place) == ("flash_attn_decode", arguments["k"].untyped_storage().data_ptr())


def test_no_more_pages_are_copied_than_the_longest_sequence_has():
    problem = Problem(lengths=((20, 30), (1, 7)), page_size=8, pages=40)
    with Calls() as calls:
        problem.run()
    assert [(name, shape[2]) for name, _, shape in calls.seen] == [("flash_attn_fwd", 2 * 32)]


@pytest.mark.parametrize("name", ("few queries", "many queries", "packed"))
def test_nothing_is_waited_for(name: str):
    import simulator

    arguments = Problem(**ON_METAL[name], dtype=torch.float16).arguments("mps")
    before = simulator.waits().total
    flash_attn_varlen_func(**arguments)
    assert simulator.waits().total == before


@pytest.mark.parametrize("name", ("few queries", "many queries", "packed"))
def test_compiles_whole(name: str):
    torch._dynamo.reset()
    problem = Problem(**ON_METAL[name], dtype=torch.float32)
    compiled = torch.compile(flash_attn_varlen_func, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(**problem.arguments()), flash_attn_varlen_func(**problem.arguments())
    )


@pytest.mark.parametrize("name", ("few queries", "many queries", "packed"))
def test_compiles_whole_while_debugged(name: str, monkeypatch: pytest.MonkeyPatch):
    """What a compiler traces has no numbers yet to look at."""
    monkeypatch.setenv("ORCHARD_DEBUG", "1")
    test_compiles_whole(name)


@pytest.mark.parametrize("q_len", (2, 20))
@pytest.mark.parametrize("broken", ({"max_seqlen_q": 1}, {"max_seqlen_k": 39}), ids=str)
def test_a_broken_promise_is_nan(broken: dict[str, int], q_len: int):
    """In the rows of that sequence alone."""
    problem = Problem(lengths=((1, 12), (q_len, 40), (1, 39)), causal=False)
    right, _ = problem.run()
    out, lse = problem.run(**broken)
    rows = slice(1, 1 + q_len)
    assert bool(out[rows].isnan().all()) and bool(lse[:, rows].isnan().all())
    for other in (slice(0, 1), slice(1 + q_len, None)):
        torch.testing.assert_close(out[other], right[other])


@pytest.mark.parametrize("longest", (2**31 - 1, 2**31, 2**63 - 1))
@pytest.mark.parametrize("lengths", ((1, 40), (20, 40)), ids=str)
def test_a_promise_may_be_any_integer(lengths: tuple[int, int], longest: int):
    """A program that knows no bound passes a large one."""
    problem = Problem(lengths=(lengths, (1, 39)))
    right = problem.run()
    promises = {"max_seqlen_k": longest}
    if lengths[0] > MOST_QUERIES:  # else many queries would be another kernel
        promises["max_seqlen_q"] = longest
    for x, y in zip(problem.run(**promises), right):
        assert torch.equal(x, y)


def test_a_length_beyond_int32_keeps_no_promise():
    """It has no other number than its own when it comes in int64."""
    problem = Problem(lengths=((1, 12), (1, 40)), used=False)
    of_key = torch.tensor([0, 12, 12 + 2**32 + 40])
    out, _ = problem.run(cu_seqlens_k=of_key)
    assert bool(out[0].isfinite().all()) and bool(out[1].isnan().all())


@pytest.mark.parametrize("lengths", ((), ((0, 5),)), ids=("no sequence", "no query"))
def test_nothing_to_do(lengths: tuple):
    q, pages = torch.randn(len(lengths) and 0, 2, 8), torch.randn(3, 16, 2, 8)
    table = torch.zeros(len(lengths), 1).int()
    of_query, of_key = (cumulative([pair[n] for pair in lengths]) for n in (0, 1))
    out, lse, _ = flash_attn_varlen_func(
        q, pages, pages, of_query, of_key, 0, 5, block_table=table, return_attn_probs=True
    )
    assert (out.shape, lse.shape) == ((0, 2, 8), (2, 0))


# ---- packed keys, with gradients ----------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problem=problems())
def test_packed_gradients(problem: dict[str, Any]):
    """Those of each sequence alone; keys that are not used and padding get none."""
    packed = Problem(**problem | {"page_size": 0, "alibi": ""})
    arguments = packed.arguments()
    for name in ("q", "k", "v"):
        arguments[name] = arguments[name].nan_to_num().requires_grad_()
    leaves = [arguments[name] for name in ("q", "k", "v")]
    out = flash_attn_varlen_func(**arguments)
    right = torch.zeros_like(out)
    for n, q_len in enumerate(packed.q_lens):
        if q_len == 0:
            continue
        rows = slice(sum(packed.q_lens[:n]), sum(packed.q_lens[: n + 1]))
        first = int(packed.of_place[n])
        keys = slice(first + packed.starts[n], first + packed.k_lens[n])
        longest = max(packed.k_lens)
        one, _ = mathematics(
            *(x[None, part] for x, part in zip(leaves, (rows, keys, keys))),
            softmax_scale=packed.of["softmax_scale"],
            causal=packed.of["causal"],
            window_size=tuple(-1 if x >= longest else x for x in packed.of["window_size"]),
            softcap=packed.of["softcap"],
            longest_key=1 << 30,
        )
        right = right.slice_scatter(one[0], 0, rows.start, rows.stop)
    right = right + 0.0 * sum(x.sum() for x in leaves)
    torch.testing.assert_close(out, right, rtol=1e-9, atol=1e-9)
    grad = torch.randn_like(out)
    for x, y in zip(*(torch.autograd.grad(o, leaves, grad) for o in (out, right))):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_our_names_have_them_too():
    problem = Problem(**ON_METAL["packed"])
    arguments = problem.arguments()
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")
    numbers = {name: arguments[name] for name in ("seqused_k", "leftpad_k")}
    found = flash_attn_varlen(*(arguments[x] for x in names), is_causal=True, **numbers)
    assert torch.equal(found, problem.run()[0])
    ranges = KeyRanges.from_cu_seqlens(*(arguments[x] for x in names[3:]), q_len=6, **numbers)
    seen = ranges.dense(arguments["k"].shape[0])
    for n, first in enumerate(problem.of_place[:-1].tolist()):
        for i in range(*cumulative(problem.q_lens)[n : n + 2].tolist()):
            keys = range(first + problem.starts[n], first + problem.k_lens[n])
            assert seen[0, 0, i].nonzero().flatten().tolist() == list(keys)


# ---- what is refused ----------------------------------------------------------------------------

WRONG: dict[str, dict[str, Any]] = {
    "k must be .pages, page_size, heads, head_dim. beside a block_table; got": {
        "k": torch.ones(7, 2, 16)
    },
    "k and v must have as many pages; got 14 and 3": {"v": torch.ones(3, 16, 2, 16)},
    "q, k and v must have the same dtype": {"q": torch.ones(6, 4, 16).half()},
    "the heads of q must be a multiple": {"q": torch.ones(6, 3, 16)},
    r"block_table must have shape \(4, pages\); got \(3, 3\)": {
        "block_table": torch.zeros(3, 3).int()
    },
    "block_table must be int32 or int64; got torch.float32": {"block_table": torch.zeros(4, 3)},
    r"seqused_k must have shape \(4,\); got \(3,\)": {"seqused_k": torch.zeros(3).int()},
    "leftpad_k must be a tensor; got the list": {"leftpad_k": [1, 2, 3, 4]},
    "keys in pages know no dropout; got dropout_p 0.5": {"dropout_p": 0.5},
    "the longest sequence must be an integer": {"max_seqlen_q": 1.5},
    "no gradient; got a k that requires grad": {
        "k": torch.ones(14, 16, 2, 16, requires_grad=True)
    },
    "cu_seqlens must be on the device of the operands": {
        name: torch.zeros(5, device="meta").int() for name in ("cu_seqlens_q", "cu_seqlens_k")
    },
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_malformed_calls(message: str):
    arguments = Problem(dtype=torch.float32).arguments() | WRONG[message]
    with pytest.raises(
        (ValueError, TypeError, NotImplementedError),
        match=rf"^orchard_ops\.flash_attn_varlen_func: .*{message}",
    ):
        flash_attn_varlen_func(**arguments)


def test_without_gradients_what_requires_them_is_taken():
    arguments = Problem(dtype=torch.float32).arguments()
    arguments["q"].requires_grad_()
    with torch.no_grad():
        assert not flash_attn_varlen_func(**arguments).requires_grad


DEBUGGED: dict[str, dict[str, Any]] = {
    r"cu_seqlens_q must be at least 0 and not fall; got \[0, 1, 4, 3, 6\]": {
        "cu_seqlens_q": torch.tensor([0, 1, 4, 3, 6])
    },
    "cu_seqlens_q must end within the 6 tokens of its tensor; got 7": {
        "cu_seqlens_q": torch.tensor([0, 1, 4, 4, 7])
    },
    r"cu_seqlens_k must be at least 0 and not fall; got \[0, -1, 4, 4, 6\]": {
        "cu_seqlens_k": torch.tensor([0, -1, 4, 4, 6])
    },
    "seqused_k must be from 0 to 48; got 49 among 4": {
        "seqused_k": torch.tensor([49, 0, 0, 0]), "max_seqlen_k": 49
    },
    "leftpad_k must be from 0 to .*; got -1": {"leftpad_k": torch.tensor([-1, 0, 0, 0])},
    "leftpad_k must be at most the keys of its sequence.*; got 8 beside 7": {
        "leftpad_k": torch.tensor([0, 8, 0, 0])
    },
    "block_table must be from 0 to 13 .* got -2": {"block_table": torch.full((4, 3), -2)},
    "max_seqlen_q must be at least the longest sequence's 3 .* got 2": {"max_seqlen_q": 2},
    "max_seqlen_k must be at least the longest sequence's 40 .* got 39": {"max_seqlen_k": 39},
}  # fmt: skip
PACKED: dict[str, dict[str, Any]] = {
    "cu_seqlens_k must end within the 73 tokens of its tensor; got 74": {
        "cu_seqlens_k": torch.tensor([0, 43, 53, 68, 74])
    },
    "seqused_k must be from 0 to the length .*; got 44 beside 43": {
        "seqused_k": torch.tensor([44, 7, 12, 0])
    },
    "leftpad_k must be at most .*; got 8 beside 7": {"leftpad_k": torch.tensor([3, 8, 5, 0])},
}


@pytest.mark.parametrize("message", (*DEBUGGED, *PACKED))
def test_debug_names_the_argument(message: str, monkeypatch: pytest.MonkeyPatch):
    """Without it such numbers are no error, and reach nothing outside of the tensors."""
    problem = Problem(dtype=torch.float32, **ON_METAL["packed"] if message in PACKED else {})
    arguments = problem.arguments() | (DEBUGGED | PACKED)[message]
    flash_attn_varlen_func(**arguments)
    monkeypatch.setenv("ORCHARD_DEBUG", "1")
    problem.run()
    with pytest.raises(ValueError, match=rf"^orchard_ops\.flash_attn_varlen_func: {message}"):
        flash_attn_varlen_func(**arguments)
