"""flash_attn_decode: attention of few queries to a cache, against float64, sequence by sequence."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from attention_cases import DTYPES
from cached_cases import NAN, Cached, decode, on, on_metal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from representative import pairs, product

import orchard_ops

pytestmark = pytest.mark.usefixtures("checked")

GROUPS = ((4, 4, 1), (8, 2, 1), (8, 1, 1), (4, 1, 3), (6, 2, 8), (24, 1, 2))
"""Query heads, key/value heads and queries: 1 to 48 rows for a key/value head."""


@pytest.mark.parametrize("dtype, heads, paged", pairs(DTYPES, GROUPS, (0, 16)), ids=str)
def test_each_sequence_is_the_mathematics_of_its_keys(
    dtype: torch.dtype, heads: tuple[int, int, int], paged: int
):
    """Ragged lengths, grouped heads, pages; what no sequence uses is NaN."""
    problem = Cached(
        (130, 5, 64),
        heads=heads[:2],
        q_len=heads[2],
        dtype=dtype,
        page_size=paged,
        options={"window_right": 0},
    )
    problem.check(*on_metal(problem))


WIDTHS = (
    (16, 16),
    (40, 24),
    (80, 80),
    (96, 112),
    (128, 128),
    (192, 128),
    (64, 256),
    (256, 256),
    (37, 5),
)


@pytest.mark.parametrize("widths, dtype", product(WIDTHS, tuple(DTYPES)), ids=str)
def test_widths(dtype: torch.dtype, widths: tuple[int, int]):
    """Values have a width of their own; rows that are not whole chunks are read by element."""
    problem = Cached((70, 33), q_len=2, widths=widths, dtype=dtype, heads=(6, 1))
    problem.check(*on_metal(problem))


FEATURES = {
    "causal": Cached(q_len=5, options={"window_right": 0}),
    "more queries than keys": Cached((3, 40), q_len=9, options={"window_right": 0}),
    "window": Cached(q_len=3, options={"window_left": 20, "window_right": 4}),
    "a window of no earlier key": Cached(options={"window_left": 0, "window_right": 0}),
    "softcap": Cached(options={"softcap": 1.5}),
    "alibi": Cached(q_len=3, alibi="head", options={"window_right": 0}),
    "alibi by sequence": Cached(q_len=3, alibi="batch"),
    "sinks": Cached(sinks=True),
    "sinks and no key": Cached((0, 3), q_len=5, sinks=True, options={"window_right": 0}),
    "left padding": Cached(starts=(31, 76), q_len=3, options={"window_right": 0}),
    "added keys": Cached(added=5),
    "entries in another order": Cached(entries=(3, 0)),
    "negative scale": Cached(options={"scale": -0.3}),
    "all of them": Cached(
        (180, 77, 208), (3, 70, 0), heads=(6, 2), q_len=4, page_size=48, capacity=240, added=3,
        alibi="batch", sinks=True, options={"window_left": 100, "window_right": 0, "softcap": 3.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("feature, dtype", product(tuple(FEATURES), tuple(DTYPES)), ids=str)
def test_features(dtype: torch.dtype, feature: str):
    problem = replace(FEATURES[feature], dtype=dtype)
    problem.check(*on_metal(problem))


@pytest.mark.parametrize("feature", FEATURES)
def test_the_reference_is_the_same_mathematics(feature: str):
    problem = replace(FEATURES[feature], dtype=torch.float64)
    out, lse = decode(problem.call())
    for b, right in enumerate(problem.math(torch.float64)):
        torch.testing.assert_close(out[b : b + 1], right.out, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(lse[b : b + 1], right.lse, rtol=1e-9, atol=1e-12)


@st.composite
def problems(draw: st.DrawFn) -> Cached:
    kv_heads = draw(st.integers(1, 2))
    batch = draw(st.integers(1, 3))
    page_size = draw(st.sampled_from((0, 0, 16, 24)))
    pages = draw(st.integers(1, 3))
    capacity = page_size * pages if page_size else draw(st.integers(1, 50))
    lengths = [draw(st.integers(0, capacity)) for _ in range(batch)]
    padded = draw(st.booleans())
    starts = [draw(st.integers(0, n)) for n in lengths] if padded else None
    side = st.one_of(st.just(-1), st.integers(0, 25))
    return Cached(
        lengths,
        starts,
        heads=(kv_heads * draw(st.integers(1, 5)), kv_heads),
        q_len=draw(st.integers(1, 6)),
        widths=draw(st.sampled_from(((8, 8), (4, 12)))),
        dtype=torch.float64,
        capacity=capacity,
        page_size=page_size,
        added=draw(st.integers(0, min(lengths))),
        entries=draw(st.permutations(range(batch + 2)))[:batch] if draw(st.booleans()) else (),
        alibi=draw(st.sampled_from(("", "head", "batch"))),
        sinks=draw(st.booleans()),
        options={
            "window_left": draw(side),
            "window_right": draw(side),
            "softcap": draw(st.sampled_from((0.0, 1.5))),
            "scale": draw(st.sampled_from((0.5, -0.2))),
        },
    )


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(problem=problems())
def test_any_problem_on_the_reference(problem: Cached):
    out, lse = decode(problem.call())
    for b, right in enumerate(problem.math(torch.float64)):
        torch.testing.assert_close(out[b : b + 1], right.out, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(lse[b : b + 1], right.lse, rtol=1e-9, atol=1e-12)


ENDS = {
    "the only key": (Cached((1,)), 0),
    "the only key of a part": (Cached((65,)), 64),
    "the last key": (Cached((77,)), 76),
    "the first key": (Cached((77,), (41,)), 41),
    "the first key of a window": (Cached((130,), options={"window_left": 70}), 59),
    "the last key, in pages": (Cached((77,), page_size=16), 76),
    "the last key, for many rows": (Cached((77,), heads=(12, 1), widths=(128, 128)), 76),
    "the last key, by elements": (Cached((77,), widths=(24, 37)), 76),
    "the last key, of a wide head": (Cached((77,), widths=(256, 256)), 76),
}
"""A problem of one query, and a key that shares its block with keys that are not of its part."""


@pytest.mark.parametrize("device", ("cpu", "mps"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", ENDS)
def test_an_infinite_value_is_infinite(place: str, dtype: torch.dtype, device: str):
    """Not NaN: the keys of its block that are not there have a weight of zero, and no number."""
    problem, key = ENDS[place]
    call = replace(problem, dtype=dtype).call()
    finite = decode(on(device, call))[0]
    entry, row = 0, key
    if problem.page_size:
        assert call.block_table is not None
        entry, row = int(call.block_table[0, key // problem.page_size]), key % problem.page_size
    call.value[entry, :, row, 3] = math.inf
    call.value[entry, :, row, 4] = -math.inf
    out = decode(on(device, call))[0]
    assert bool((out[..., 3] == math.inf).all()) and bool((out[..., 4] == -math.inf).all())
    finite[..., 3], finite[..., 4] = math.inf, -math.inf
    assert torch.equal(out, finite)


@pytest.mark.parametrize("device", ("cpu", "mps"))
@pytest.mark.parametrize("page_size", (0, 16))
def test_what_no_sequence_uses_reaches_nothing(page_size: int, device: str):
    problem = FEATURES["left padding"]
    problem = replace(problem, page_size=page_size, dtype=torch.float16)
    results = [decode(on(device, problem.call(garbage))) for garbage in (0.0, NAN, math.inf, 6e4)]
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@pytest.mark.parametrize("page_size", (0, 16))
def test_a_sequence_is_what_it_is_alone(page_size: int):
    """Bit for bit, whatever else is in the batch; and in every run."""
    problem = Cached((130, 5, 200), page_size=page_size, q_len=2, dtype=torch.float16)
    call = on("mps", problem.call(impl="metal"))
    out, lse = decode(call)
    for b in range(3):
        one = {
            name: x[b : b + 1]
            for name, x in call._asdict().items()
            if name in ("query", "cache_seqlens", "block_table") and x is not None
        }
        if not page_size:
            one |= {name: getattr(call, name)[b : b + 1] for name in ("key", "value")}
        alone = decode(call._replace(**one))
        assert torch.equal(alone[0][0], out[b]) and torch.equal(alone[1][0], lse[b])
    again = decode(call)
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)


def test_rooms_and_pages_have_the_same_bits():
    rooms = Cached((130, 5, 200), q_len=2, dtype=torch.float16)
    for page_size in (16, 208):
        for x, y in zip(on_metal(replace(rooms, page_size=page_size)), on_metal(rooms)):
            assert torch.equal(x, y)


@pytest.mark.parametrize("device", ("cpu", "mps"))
@pytest.mark.parametrize("paged", (0, 16))
def test_numbers_outside_of_the_cache_are_taken_for_its_ends(paged: int, device: str):
    """Nothing else is read, as check mode sees, and nothing is waited for."""
    right = Cached((208, 0), page_size=paged, q_len=2, options={"window_right": 0})
    call = on(device, right.call())
    far = torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32, device=device)
    expected = decode(call)
    for x, y in zip(decode(call._replace(cache_seqlens=far)), expected):
        assert torch.equal(x, y)
    for x, y in zip(decode(call._replace(cache_leftpad=-far.abs())), expected):
        assert torch.equal(x, y)
    padded = decode(call._replace(cache_leftpad=far.abs().clamp(min=0)))
    assert not padded[0][0].any() and bool((padded[1][0] == -math.inf).all())
    if paged:
        assert call.block_table is not None
        wild = torch.where(call.block_table % 2 == 0, far[0], far[1])
        decode(call._replace(block_table=wild))
    else:
        decode(call._replace(cache_batch_idx=far))


def test_a_cache_is_read_once():
    """By the simulator's counters: each byte of keys and values, and 2 % besides."""
    import simulator

    length, kv_heads, width = 4096, 1, 128
    problem = Cached(
        (length,), heads=(8, kv_heads), widths=(width, width), dtype=torch.float16, capacity=length
    )
    call = on("mps", problem.call(impl="metal"))
    with simulator.checking(), simulator.recording() as launches:
        decode(call)
    assert launches[1].kernel.startswith("attention_decode_merge")
    cache_bytes = length * kv_heads * width * 2 * 2
    of_query = launches[0].threads[1] * 8 * width * 2
    read = launches[0].counters.device_bytes_read - of_query
    assert cache_bytes <= read <= 1.02 * cache_bytes
    assert launches[0].counters.threadgroup_barriers == 4 * launches[0].counters.threads


@pytest.mark.parametrize("length", (256, 4096))
@pytest.mark.parametrize(("heads", "width"), ((8, 128), (1, 64), (8, 256), (8, 80)))
def test_what_joining_reads(heads: int, width: int, length: int):
    """docs/decoding.md: the sums of each row once, and their statistics for each 64 of them."""
    import simulator

    problem = Cached(
        (length,), heads=(heads, 1), widths=(width, width), dtype=torch.float16, capacity=length
    )
    call = on("mps", problem.call(impl="metal"))
    with simulator.checking(), simulator.recording() as launches:
        decode(call)
    parts = min(length // 256, 32)
    read = launches[1].counters.device_bytes_read
    of_a_part = width + 2 * -(-width // 64)
    assert read == heads * parts * 4 * of_a_part
    of_a_row = read / heads / (2 * length * width * 2)
    assert of_a_row <= of_a_part / width / 256


@pytest.mark.parametrize(
    ("dtype", "rows", "length"),
    ((torch.float16, 8, 4096), (torch.bfloat16, 16, 8192), (torch.float32, 8, 2048)),
    ids=str,
)
def test_both_kernels_read_the_cache_and_a_fiftieth(dtype: torch.dtype, rows: int, length: int):
    """docs/decoding.md: from so many keys on, where a sequence has 8 key/value heads."""
    import simulator

    kv_heads, width = 8, 96
    problem = Cached(
        (length,), heads=(rows * kv_heads, kv_heads), widths=(width, width), dtype=dtype,
        capacity=length,
    )  # fmt: skip
    call = on("mps", problem.call(impl="metal"))
    with simulator.checking(), simulator.recording() as launches:
        decode(call)
    of_query = launches[0].threads[1] * rows * kv_heads * width * dtype.itemsize
    cache_bytes = 2 * length * kv_heads * width * dtype.itemsize
    read = sum(launch.counters.device_bytes_read for launch in launches) - of_query
    assert cache_bytes < read <= 1.02 * cache_bytes


@pytest.mark.parametrize("width", (128, 80))
@pytest.mark.parametrize("q_len", (1, 16))
@pytest.mark.parametrize("slots", (40, 512, 8192))
def test_sums_take_as_much_as_documented(slots: int, q_len: int, width: int):
    """docs/decoding.md: however many rows there are, and however short the sequences."""
    import simulator

    batch, kv_heads = 2, 2
    problem = Cached(
        (3, 2), heads=(8 * kv_heads, kv_heads), q_len=q_len, widths=(width, width),
        capacity=slots, dtype=torch.float16,
    )  # fmt: skip
    call = on("mps", problem.call(impl="metal"))
    before = simulator.memory().allocated
    simulator.reset_peak()
    decode(call)
    results = batch * 8 * kv_heads * q_len * (width * 2 + 4)
    block = 8 if q_len == 1 else 16
    threadgroups = min(32, 8 * q_len // block * -(-slots // 256))
    sums = batch * kv_heads * threadgroups * block * (width + 2) * 4
    taken = simulator.memory().peak - before - results
    assert sums <= taken <= sums + 4096


def test_a_window_reads_its_keys_alone():
    import simulator

    problem = Cached((4000,), dtype=torch.float16, capacity=4096, options={"window_left": 127})
    call = on("mps", problem.call(impl="metal"))
    with simulator.recording() as launches:
        decode(call)
    blocks = 128 // 16 + 1
    products = 2 * (64 // 8) * 2 * problem.heads[1]  # of a block of 16 keys
    assert launches[0].counters.mma <= blocks * products


def test_runs_on_metal_and_is_counted(fresh_stats: None):
    problem = Cached()
    decode(on("mps", problem.call()))
    stats = orchard_ops.stats()
    assert stats.metal["flash_attn_decode"] == 1 and stats.fallbacks == 0
    orchard_ops.reset_stats()
    assert "flash_attn_decode" not in orchard_ops.stats().metal


REFUSED = {
    "the page size is not a multiple of 16": Cached(page_size=24, capacity=216),
    "head_dim is above 256": Cached(widths=(257, 16)),
    'impl="reference" was asked for': Cached(options={"impl": "reference"}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_run_on_the_reference(reason: str, fresh_stats: None, quiet_fallback: None):
    options, problem = REFUSED[reason].options, replace(REFUSED[reason], options={})
    call = on("mps", problem.call())._replace(**options)
    problem.check(*decode(call))
    assert orchard_ops.stats().reference == {reason: {"flash_attn_decode": 1}}
    if "reference" not in reason:
        with pytest.raises(RuntimeError, match=reason):
            decode(call._replace(impl="metal"))


WRONG = {
    r"cache_seqlens must be int32; got torch\.int64": {"cache_seqlens": torch.tensor([1, 2])},
    r"cache_seqlens must have shape \(2,\); got \(3,\)": {
        "cache_seqlens": torch.ones(3, dtype=torch.int32)
    },
    r"block_table must have shape \(2, pages\)": {"block_table": torch.ones(2, dtype=torch.int32)},
    "added must be at least 0; got -1": {"added": -1},
    "value must have key's length 208; got 5": {"value": torch.ones(2, 2, 5, 64)},
    "key must have query's batch size 3": {"query": torch.ones(3, 4, 1, 64)},
    "window_left must be": {"window_left": -2},
    r"query must be \(batch, .* got shape \(4,\)": {
        "query": torch.ones(4),
        "alibi_slopes": torch.ones(4),
    },
    "must be a multiple": {"query": torch.ones(2, 3, 1, 64)},
}


@pytest.mark.parametrize("device", ("cpu", "mps"))
@pytest.mark.parametrize("message", WRONG)
def test_malformed_calls(message: str, device: str):
    call = on(device, Cached().call()._replace(**WRONG[message]))
    if "batch size" in message:
        call = call._replace(cache_seqlens=None)
    with pytest.raises((ValueError, TypeError), match=f"^orchard::flash_attn_decode: .*{message}"):
        torch.ops.orchard.flash_attn_decode(*call)


def test_two_places_for_the_keys_are_refused():
    call = Cached(page_size=16).call()
    call = call._replace(cache_batch_idx=torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="cache_batch_idx and block_table both"):
        torch.ops.orchard.flash_attn_decode(*call)


@pytest.mark.parametrize("device", ("cpu", "mps"))
def test_gradients_are_refused(device: str):
    call = on(device, Cached().call())
    call = call._replace(query=call.query.detach().requires_grad_())
    with pytest.raises(NotImplementedError, match="has no gradient; got a query that requires"):
        torch.ops.orchard.flash_attn_decode(*call)
    with torch.no_grad():
        torch.ops.orchard.flash_attn_decode(*call)


@pytest.mark.parametrize("device", ("cpu", "mps"))
@pytest.mark.parametrize("empty", ("batch", "queries", "keys"))
def test_nothing_to_do(empty: str, device: str):
    problem = Cached((0, 0), q_len=0 if empty == "queries" else 2)
    call = on(device, problem.call())
    if empty == "batch":
        names = ("query", "key", "value", "cache_seqlens")
        call = call._replace(**{name: getattr(call, name)[:0] for name in names})
    if empty == "keys":
        call = call._replace(key=call.key[:, :, :0], value=call.value[:, :, :0])
    out, lse = decode(call)
    assert out.shape == (*call.query.shape[:3], 64) and not out.any()
    assert bool((lse == -math.inf).all())


def test_opcheck():
    call = Cached(page_size=16, alibi="head").call()
    torch.library.opcheck(torch.ops.orchard.flash_attn_decode, tuple(call))


def test_compiles_whole():
    problem = Cached(dtype=torch.float16)
    call = on("mps", problem.call(impl="metal"))
    compiled = torch.compile(
        lambda x: torch.ops.orchard.flash_attn_decode(*x), backend="aot_eager", fullgraph=True
    )
    for x, y in zip(compiled(call), torch.ops.orchard.flash_attn_decode(*call)):
        assert torch.equal(x, y)
