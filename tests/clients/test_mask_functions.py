"""Mask functions that a reading with symbols could mistake: the real mask, or the right interval.

Each is one that a user may pass to transformers, and is compared with the mask that it makes there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import masking_utils as theirs

from orchard_ops.integrations.patterns import interval_of
from orchard_ops.integrations.transformers import attention_mask
from orchard_ops.mask_symbols import Unsayable, said_by

L = 12
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7])
RANKS = torch.tensor([[2, 0, 1, 4, 3, 6, 5, 4, 3, 2, 1, 0]])
TORN = torch.tensor([[0, 1, 0, 1, 2, 2, 0, 0, 1, 1, 2, 2]])


def check(function: Any, is_dense: bool = True, traced: bool = False, **options: Any) -> None:
    arguments: Any = dict(batch_size=1, q_length=L, kv_length=L, mask_function=function, **options)
    made = []

    def seen(x: Tensor) -> Tensor:
        mask = attention_mask(**arguments)
        made.append(mask.visibility.dense is not None)
        return mask.visibility.to_bool() & x

    torch._dynamo.reset()
    found = torch.compile(seen, backend="eager", fullgraph=True) if traced else seen
    expected = theirs.sdpa_mask(**arguments, allow_is_causal_skip=False)
    assert torch.equal(found(torch.tensor(True)), expected)
    assert made == [is_dense]


def logical_and_in_place(b: Any, h: Any, q: Any, k: Any) -> Any:
    near = k <= q
    near.logical_and_(q - k < 3)
    return near


def logical_and_out(b: Any, h: Any, q: Any, k: Any) -> Any:
    near = k <= q
    torch.logical_and(near, q - k < 3, out=near)
    return near


def not_in_place(b: Any, h: Any, q: Any, k: Any) -> Any:
    far = q - k < 3
    torch.Tensor.logical_not_(far)
    return far | (k <= q)


def assigned(b: Any, h: Any, q: Any, k: Any) -> Any:
    near = k <= q
    near[...] = True
    return near & (q - k < 5)


def subtracted(b: Any, h: Any, q: Any, k: Any) -> Any:
    before = q - 0
    before -= 1
    return (k <= before) | (k <= 0)


def by_dimensions(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q - k < 3 if q.ndim == 4 else k <= q


def by_dtype(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q - k < 3 if q.dtype == torch.int64 else k <= q


def by_shape(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q - k < 3 if getattr(q, "shape", ()) == (1, 1, L, 1) else k <= q


def by_kind(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q - k < 3 if isinstance(q, Tensor) else k <= q


def small_numbers(b: Any, h: Any, q: Any, k: Any) -> Any:
    return k.to(torch.uint8) - q.to(torch.uint8) <= 0


def truths_as_numbers(b: Any, h: Any, q: Any, k: Any) -> Any:
    return k.to(torch.bool) <= q.to(dtype=torch.bool)


def caught(b: Any, h: Any, q: Any, k: Any) -> Any:
    try:
        if (q - k).abs().max() > 3:
            return (k <= q) & (q - k < 2)
    except Exception:
        pass
    return k <= q


def caught_number(b: Any, h: Any, q: Any, k: Any) -> Any:
    try:
        int(q.max())
    except Exception:
        return k <= q
    return q - k < 2


MISTAKEN = {
    f.__name__: f
    for f in (
        *(logical_and_in_place, logical_and_out, not_in_place, assigned, subtracted),
        *(by_dimensions, by_dtype, by_shape, by_kind, small_numbers, truths_as_numbers),
        *(caught, caught_number),
    )
}
TRACED = {name: f for name, f in MISTAKEN.items() if not name.startswith(("caught", "by_kind"))}


@pytest.mark.parametrize("name", MISTAKEN)
def test_a_function_that_needs_tensors_is_the_real_mask(name: str):
    check(MISTAKEN[name])


@pytest.mark.parametrize("name", TRACED)
def test_in_a_graph_too(name: str):
    check(TRACED[name], traced=True)


def test_the_device_is_the_real_one():
    def on(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q - k < 3 if q.device.type == "cpu" else k <= q

    check(on, is_dense=False)


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_a_cast_that_changes_nothing_is_read(dtype: torch.dtype):
    check(lambda b, h, q, k: (k.to(dtype) <= q.to(dtype)).to(torch.bool), is_dense=False)


def test_a_reading_changes_no_table():
    table, before = torch.zeros(1, L), torch.zeros(1, L)
    numbers = torch.zeros(1, L)

    def counts(b: Any, h: Any, q: Any, k: Any) -> Any:
        table.add_(1)
        return k <= q

    def keeps(b: Any, h: Any, q: Any, k: Any) -> Any:
        numbers[0] = 1
        return k <= q

    def last(b: Any, h: Any, q: Any, k: Any) -> Any:
        torch.add(table, 1, out=table)
        return k <= q

    for function in (counts, keeps, last):
        with pytest.raises(Unsayable):
            said_by(function, torch.device("cpu"))
    assert torch.equal(table, before) and torch.equal(numbers, before)


def ranked(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (DOCUMENTS[b, q] == DOCUMENTS[b, k]) & (RANKS[b, k] <= RANKS[b, q])


def torn(b: Any, h: Any, q: Any, k: Any) -> Any:
    return TORN[b, q] == TORN[b, k]


def torn_blocks(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (k <= q) | ((TORN[b, q] == TORN[b, k]) & (TORN[b, q] >= 0))


@pytest.mark.parametrize("function", (ranked, torn, torn_blocks), ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", ("alone", "in a graph", "within transformers' own"))
def test_a_users_tables_mean_what_they_say(function: Any, shape: str):
    class Gemma:
        model_type = "gemma3_text"

    if shape.startswith("within"):
        function = theirs.and_masks(theirs.bidirectional_mask_function, function)
    check(function, traced="graph" in shape, config=Gemma)


def test_numbers_with_fractions_are_no_chunks():
    padding = torch.tensor([0.5])
    chunks = theirs.chunked_causal_mask_function(4, padding)
    check(chunks)


def test_what_transformers_packs_is_ranges():
    places = torch.cat((torch.arange(5), torch.arange(7)))[None]
    remapped = theirs.remap_positions_for_packed_sequence(theirs.causal_mask_function, places)
    packed = theirs.and_masks(remapped, theirs.packed_sequence_mask_function(DOCUMENTS))
    check(packed, is_dense=False)
    with pytest.raises(Unsayable):
        interval_of(packed, torch.arange(L)[None], False, is_packed=False)
