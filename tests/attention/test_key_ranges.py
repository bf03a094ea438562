"""`KeyRanges`: each constructor is a boolean mask, made without a wait."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from orchard_ops import KeyRanges

SUITE = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
LENGTHS = st.lists(st.integers(0, 6), min_size=0, max_size=6)


def packed(lengths: list[int]) -> Tensor:
    """0, 0, ..., 1, ...: the sequence of each token."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths).long())


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


# ---- constructors against masks -----------------------------------------------------------------


@SUITE
@given(
    runs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=3),
    kv_len=st.integers(0, 9),
    dtype=st.sampled_from((torch.bool, torch.int64, torch.int32)),
)
def test_padding_masks(runs: list[tuple[int, int]], kv_len: int, dtype: torch.dtype):
    """Left, right, both, none, and rows that are all padding."""
    j = torch.arange(kv_len)
    mask = torch.stack([(j >= min(run)) & (j < max(run)) for run in runs])
    ranges = KeyRanges.from_padding_mask(mask.to(dtype), check=True)
    expected = mask[:, None, None, :].expand(-1, 1, kv_len, -1)
    assert torch.equal(ranges.dense(kv_len), expected)
    assert torch.equal(ranges.tensor[..., 2], torch.arange(kv_len).expand(len(runs), 1, -1))


def test_a_hole_in_a_padding_mask_is_found_if_asked_for():
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0]])
    with pytest.raises(ValueError, match=r"padding between tokens in rows \[1\]: pass it as"):
        KeyRanges.from_padding_mask(mask, check=True)
    assert KeyRanges.from_padding_mask(mask).dense(3)[1, 0, 0].all()


@SUITE
@given(
    samples=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=3),
    has_starts=st.booleans(),
    q_len=st.integers(0, 5),
    diagonal=st.integers(-3, 9),
)
def test_lengths(samples: list, has_starts: bool, q_len: int, diagonal: int):
    lengths, starts = torch.tensor(samples).unbind(1)
    starts = starts if has_starts else torch.zeros_like(starts)
    ranges = KeyRanges.from_lengths(
        lengths, q_len, starts=starts if has_starts else None, diagonal=diagonal
    )
    j = torch.arange(12)
    expected = (j >= starts[:, None]) & (j < (starts + lengths)[:, None])
    assert torch.equal(ranges.dense(12), expected[:, None, None].expand(-1, 1, q_len, -1))
    i = torch.arange(q_len).unsqueeze(1)
    assert torch.equal(
        ranges.dense(12, window_left=2, window_right=0),
        (expected[:, None, None] & (j <= i + diagonal) & (j >= i + diagonal - 2)),
    )


@SUITE
@given(lengths=st.lists(LENGTHS.filter(any), min_size=1, max_size=1), shift=st.integers(-2, 2))
def test_documents(lengths: list, shift: int):
    """By ids and by position ids: a block per document; ids that come again are other documents."""
    number = packed(lengths[0])
    same = (number.unsqueeze(1) == number)[None, None]
    ids = number * 3 + shift
    assert torch.equal(KeyRanges.from_document_ids(ids).dense(len(ids)), same)
    alternating = number % 2 if all(lengths[0]) else number
    assert torch.equal(KeyRanges.from_document_ids(alternating).dense(len(ids)), same)
    places = torch.cat([torch.arange(n) for n in lengths[0]])
    assert torch.equal(KeyRanges.from_position_ids(places).dense(len(ids)), same)


def test_padding_between_documents():
    ids = torch.tensor([[5, 5, -1, 7, 7, -1], [-1, -1, 3, 3, 3, 3]])
    found = KeyRanges.from_document_ids(ids, padding_id=-1).dense(6)
    expected = (ids.unsqueeze(2) == ids.unsqueeze(1)) & (ids != -1).unsqueeze(1)
    assert torch.equal(found, expected[:, None])
    # Left padding, as generation makes position ids of it: each padding token is alone.
    found = KeyRanges.from_position_ids(torch.tensor([1, 1, 0, 1, 2])).dense(5)
    expected = torch.block_diag(torch.eye(2), torch.ones(3, 3)).bool()
    assert torch.equal(found, expected[None, None])


@SUITE
@given(
    lengths=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=5),
    rest=st.integers(0, 3),
    dtype=st.sampled_from((torch.int32, torch.int64)),
)
def test_cu_seqlens(lengths: list[tuple[int, int]], rest: int, dtype: torch.dtype):
    """Sequences of any lengths, empty ones too; each is causal from its own bottom right."""
    of_query, of_key = ([pair[n] for pair in lengths] for n in (0, 1))
    total_q, total_k = sum(of_query) + rest, sum(of_key) + rest
    ranges = KeyRanges.from_cu_seqlens(
        cumulative(of_query).to(dtype), cumulative(of_key).to(dtype), q_len=total_q
    )
    expected = torch.zeros(2, total_q, total_k, dtype=torch.bool)
    row = col = 0
    for q_len, kv_len in lengths:
        block = torch.ones(q_len, kv_len, dtype=torch.bool)
        expected[0, row : row + q_len, col : col + kv_len] = block
        expected[1, row : row + q_len, col : col + kv_len] = block.tril(kv_len - q_len)
        row, col = row + q_len, col + kv_len
    assert torch.equal(ranges.dense(total_k)[0, 0], expected[0])
    assert torch.equal(ranges.dense(total_k, window_right=0)[0, 0], expected[1])


def test_cu_seqlens_of_self_attention():
    cu_seqlens = cumulative([3, 0, 4])
    both = KeyRanges.from_cu_seqlens(cu_seqlens, cu_seqlens, q_len=9)
    one = KeyRanges.from_cu_seqlens(cu_seqlens, q_len=9)
    assert torch.equal(both.dense(9), one.dense(9))
    assert one.diagonal == 0
    assert torch.equal(one.tensor[0, 0, :7, 2], torch.arange(7))
    # Queries before the first sequence see nothing, like those behind the last.
    shifted = KeyRanges.from_cu_seqlens(cu_seqlens + 2, q_len=10).dense(10)[0, 0]
    expected = torch.block_diag(torch.zeros(2, 2), torch.ones(3, 3), torch.ones(4, 4)).bool()
    assert torch.equal(shifted[:9, :9], expected)
    assert not shifted[9].any()


@SUITE
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    q_len=st.integers(0, 8),
    diagonal=st.integers(-3, 4),
)
def test_prefix_lm(lengths: list[int], q_len: int, diagonal: int):
    ranges = KeyRanges.prefix_lm(torch.tensor(lengths), q_len, diagonal=diagonal)
    i, j = torch.arange(q_len).unsqueeze(1), torch.arange(10)
    expected = (j <= i + diagonal) | (j < torch.tensor(lengths)[:, None, None])
    assert torch.equal(ranges.dense(10), expected[:, None])
    one = KeyRanges.prefix_lm(torch.tensor(lengths[0]), q_len, diagonal=diagonal)
    assert torch.equal(one.dense(10), expected[:1, None])


@SUITE
@given(chunk=st.integers(1, 9), q_len=st.integers(0, 12), diagonal=st.integers(-5, 5))
def test_chunks(chunk: int, q_len: int, diagonal: int):
    ranges = KeyRanges.chunked(chunk, q_len, diagonal=diagonal)
    i, j = torch.arange(q_len).unsqueeze(1) + diagonal, torch.arange(12)
    assert torch.equal(ranges.dense(12)[0, 0], i // chunk == j // chunk)


@SUITE
@given(
    window=st.tuples(st.integers(-1, 6), st.integers(-1, 6)),
    prefix=st.integers(0, 5),
    q_len=st.integers(0, 12),
    diagonal=st.integers(-5, 5),
)
def test_sliding_windows(window: tuple[int, int], prefix: int, q_len: int, diagonal: int):
    left, right = window
    ranges = KeyRanges.sliding_window(left, right, q_len, prefix=prefix, diagonal=diagonal)
    i, j = torch.arange(q_len).unsqueeze(1) + diagonal, torch.arange(12)
    expected = torch.ones(q_len, 12, dtype=torch.bool)
    if left >= 0:
        expected &= (j >= i - left) | (j < prefix)
    if right >= 0:
        expected &= j <= i + right
    assert torch.equal(ranges.dense(12)[0, 0], expected)
    # The same by the window of the call: `prefix` alone is in the ranges.
    ranges = KeyRanges.sliding_window(-1, -1, q_len, diagonal=diagonal).tensor.clone()
    ranges[..., 3] = prefix
    by_call = KeyRanges(ranges).dense(12, window_left=left, window_right=right)
    assert torch.equal(by_call[0, 0], expected)


# ---- both at once -------------------------------------------------------------------------------


PARTS: dict[str, Callable[[], KeyRanges]] = {
    "padding": lambda: KeyRanges.from_padding_mask(
        torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    ),
    "lengths": lambda: KeyRanges.from_lengths(torch.tensor([4, 2]), 5),
    "documents": lambda: KeyRanges.from_document_ids(torch.tensor([0, 0, 1, 1, 1])),
    "packed": lambda: KeyRanges.from_cu_seqlens(torch.tensor([0, 3, 5]), q_len=5),
    "prefix": lambda: KeyRanges.prefix_lm(torch.tensor([2, 4]), 5),
    "chunks": lambda: KeyRanges.chunked(2, 5),
    "window": lambda: KeyRanges.sliding_window(1, 1, 5),
    "global": lambda: KeyRanges.sliding_window(1, 0, 5, prefix=2),
    "heads": lambda: KeyRanges(
        torch.cat([KeyRanges.sliding_window(n, 0, 5).tensor for n in (1, 3)], dim=1),
        0,
        has_prefix=False,
    ),
}
INEXACT = {"padding", "documents", "packed", "chunks", "window", "heads", "global"}
"""With "global", which has a prefix: their intervals may begin behind the first key."""


@pytest.mark.parametrize("first", PARTS)
@pytest.mark.parametrize("second", PARTS)
def test_both(first: str, second: str):
    a, b = PARTS[first](), PARTS[second]()
    if "global" in (first, second) and {first, second} <= INEXACT:
        with pytest.raises(ValueError, match="prefix needs others without one that begin at the"):
            a & b
        return
    both = a & b
    assert torch.equal(both.dense(5), a.dense(5) & b.dense(5))
    assert both.tensor.dtype == torch.int32
    assert torch.equal(
        (both & PARTS["lengths"]()).dense(5), both.dense(5) & PARTS["lengths"]().dense(5)
    )


def test_both_is_refused():
    a = KeyRanges.chunked(2, 5)
    for other, message in (
        (KeyRanges.chunked(2, 4), "& needs as many queries; got 5 and 4"),
        (KeyRanges.chunked(2, 5, diagonal=1), "same keys, i .* diagonals 0 and 1"),
        (KeyRanges(a.tensor), "diagonals 0 and None"),
    ):
        with pytest.raises(ValueError, match=message):
            a & other
    with pytest.raises(TypeError):
        a & a.tensor


# ---- no wait, any device, compiled --------------------------------------------------------------


CONSTRUCTORS: dict[str, tuple[Callable[..., KeyRanges], tuple[Tensor, ...]]] = {
    "padding": (KeyRanges.from_padding_mask, (torch.tensor([[True, True, False, False]]),)),
    "lengths": (lambda n: KeyRanges.from_lengths(n, 4), (torch.tensor([3]),)),
    "starts": (
        lambda n, starts: KeyRanges.from_lengths(n, 4, starts=starts),
        (torch.tensor([3]), torch.tensor([1])),
    ),
    "documents": (
        lambda ids: KeyRanges.from_document_ids(ids, padding_id=2),
        (torch.tensor([[0, 0, 1, 2]]),),
    ),
    "positions": (KeyRanges.from_position_ids, (torch.tensor([[0, 1, 0, 1]]),)),
    "packed": (
        lambda q, k: KeyRanges.from_cu_seqlens(q, k, q_len=4),
        (torch.tensor([0, 3, 4]), torch.tensor([0, 1, 4])),
    ),
    "prefix": (lambda n: KeyRanges.prefix_lm(n, 4), (torch.tensor([3]),)),
    "chunks": (lambda x: KeyRanges.chunked(2, 4, device=x.device), (torch.zeros(1),)),
    "window": (
        lambda x: KeyRanges.sliding_window(1, 0, 4, prefix=1, device=x.device),
        (torch.zeros(1),),
    ),
    "both": (
        lambda n, ids: KeyRanges.from_lengths(n, 4) & KeyRanges.from_document_ids(ids),
        (torch.tensor([3]), torch.tensor([[0, 0, 1, 1]])),
    ),
}


class NoWait(TorchDispatchMode):
    """Forbids what waits for the device, or depends on what is there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        assert not any(word in name for word in ("nonzero", "_local_scalar", "unique", "equal")), (
            name
        )
        found = func(*args, **(kwargs or {}))
        assert name != "aten::_to_copy" or found.device == args[0].device, (
            "it goes to another device"
        )
        return found


@pytest.mark.parametrize("device", ("cpu", "meta", "mps", "fake"))
@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_waits_for_nothing(name: str, device: str):
    construct, arguments = CONSTRUCTORS[name]
    expected = construct(*arguments)
    if device == "fake":
        with FakeTensorMode() as mode:
            found = construct(*(mode.from_tensor(x) for x in arguments))
    else:
        arguments = tuple(x.to(device) for x in arguments)
        with NoWait():
            found = construct(*arguments)
    assert found.tensor.shape == expected.tensor.shape
    assert found.tensor.dtype == torch.int32
    if device == "mps":
        assert torch.equal(found.to("cpu").tensor, expected.tensor)


def test_a_wait_would_be_noticed():
    with NoWait(), pytest.raises(AssertionError, match="_local_scalar"):
        KeyRanges.from_padding_mask(torch.ones(1, 2).bool(), check=True)


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_compiles_whole(name: str):
    construct, arguments = CONSTRUCTORS[name]

    def dense(*arguments: Tensor) -> Tensor:
        return construct(*arguments).dense(4, window_right=0)

    torch._dynamo.reset()
    compiled = torch.compile(dense, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), dense(*arguments))


# ---- what is refused ----------------------------------------------------------------------------


IDS = torch.zeros(2, 3, dtype=torch.int64)
RANGES = torch.zeros(1, 1, 3, 4, dtype=torch.int32)
REFUSED = {
    "padding_kind": (lambda: KeyRanges.from_padding_mask(IDS.float()), "from_padding_mask: mask"),
    "padding_shape": (lambda: KeyRanges.from_padding_mask(IDS[0]), r"must have shape \(B, S\)"),
    "lengths_kind": (lambda: KeyRanges.from_lengths([3], 4), "lengths must be a tensor of int"),
    "lengths_bool": (lambda: KeyRanges.from_lengths(IDS[0].bool(), 4), "integers; got torch.bool"),
    "starts": (lambda: KeyRanges.from_lengths(IDS[0], 4, starts=IDS[:, 0]), "starts must have the"),
    "documents": (lambda: KeyRanges.from_document_ids(IDS[None]), r"shape \(B, L\) or \(L\); got"),
    "positions": (lambda: KeyRanges.from_position_ids(IDS.float()), "position_ids must be a tenso"),
    "cu_shape": (lambda: KeyRanges.from_cu_seqlens(IDS, q_len=3), r"\(sequences \+ 1\); got shape"),
    "cu_empty": (lambda: KeyRanges.from_cu_seqlens(IDS[0, :0], q_len=3), "at least one number, 0"),
    "cu_lengths": (lambda: KeyRanges.from_cu_seqlens(IDS[0], IDS[:, 0], q_len=3), "got 3 and 2"),
    "cu_device": (
        lambda: KeyRanges.from_cu_seqlens(IDS[0], IDS[0].to("meta"), q_len=3),
        "same device; got cpu and meta",
    ),
    "prefix": (lambda: KeyRanges.prefix_lm(3, 4), "a tensor of integers; got a int"),
    "chunk": (lambda: KeyRanges.chunked(0, 4), "chunk_size must be at least 1; got 0"),
    "window": (lambda: KeyRanges.sliding_window(-2, 0, 4), "left must be at least -1; got -2"),
    "global": (lambda: KeyRanges.sliding_window(1, 0, 4, prefix=-1), "prefix must be at least 0"),
    "reach": (lambda: KeyRanges(RANGES, reach=-1), "reach must be 0 or more, or None; got -1"),
    "reach_kind": (lambda: KeyRanges(RANGES, reach=2.0), "reach must be an integer or None; got"),
    "tensor": (lambda: KeyRanges(None), "tensor must be a tensor or KeyRanges; got a NoneType"),
    "tensor_dtype": (lambda: KeyRanges(IDS), "tensor must be int32; got torch.int64"),
    "tensor_shape": (lambda: KeyRanges(IDS.int()), r"tensor must have shape \(1 or batch, 1 or he"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str):
    make, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=message) as error:
        make()
    assert str(error.value).startswith("orchard_ops.KeyRanges")
