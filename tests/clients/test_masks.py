"""The descriptor of a mask is the mask that transformers makes, and says it in linear memory."""

from __future__ import annotations

import importlib
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import masking_utils as theirs

from orchard_ops.integrations.patterns import NUMBER_EACH_BLOCK
from orchard_ops.integrations.transformers import attention_forward, attention_mask
from orchard_ops.integrations.visibility import LazyMask

L, BATCH = 24, 2
WINDOW, CHUNK = 5, 6
POSITIONS = torch.cat([torch.arange(n) for n in (7, 1, 10, 6)]).expand(BATCH, -1)
DOCUMENTS = theirs.find_packed_sequence_indices(POSITIONS)
BLOCKS = torch.tensor([[-1] * 3 + [0] * 6 + [-1] * 4 + [1] * 2 + [2] * 5 + [-1] * 4] * BATCH)
BLOCKS[1] = BLOCKS[1].roll(3)
GEMMA = SimpleNamespace(model_type="gemma3_text")

BASES = {
    "causal": (theirs.causal_mask_function, None),
    "full": (theirs.bidirectional_mask_function, None),
    "sliding": (theirs.sliding_window_causal_mask_function(WINDOW), WINDOW),
    "sliding both ways": (theirs.sliding_window_bidirectional_mask_function(WINDOW), WINDOW),
    "chunks": (theirs.chunked_causal_mask_function(CHUNK, torch.tensor([0, 2])), CHUNK),
}
PADDINGS = {
    "no padding": None,
    "right": torch.ones((BATCH, L)).bool(),
    "left": torch.ones((BATCH, L)).bool(),
    "holes": torch.ones((BATCH, L)).bool(),
}
PADDINGS["right"][0, 17:] = False
PADDINGS["left"][1, :9] = False
PADDINGS["holes"][0, 4:7], PADDINGS["holes"][1, 20:] = False, False


def packed(function: Any) -> Any:
    """As `create_causal_mask` packs."""
    return theirs.and_masks(
        theirs.remap_positions_for_packed_sequence(function, POSITIONS),
        theirs.packed_sequence_mask_function(DOCUMENTS),
    )


def with_blocks(function: Any) -> Any:
    return theirs.or_masks(function, theirs.blockwise_overlay(BLOCKS))


def packed_blocks(function: Any) -> Any:
    return theirs.and_masks(
        with_blocks(theirs.remap_positions_for_packed_sequence(function, POSITIONS)),
        theirs.packed_sequence_mask_function(DOCUMENTS),
    )


def gemma3_sliding(function: Any) -> Any:
    """The order in which Gemma 3 puts its sliding layers' mask together."""
    return theirs.and_masks(with_blocks(function), theirs.sliding_window_overlay(WINDOW))


SHAPES = {"": lambda f: f, "packed": packed, "blocks": with_blocks, "packed blocks": packed_blocks}
SHAPES["blocks in a window"] = gemma3_sliding
CASES = [
    (base, shape, padding)
    for base, shape, padding in itertools.product(BASES, SHAPES, PADDINGS)
    if not (shape and base in ("full", "sliding both ways"))
]


def both(function: Any, **sizes: Any) -> tuple[Any, torch.Tensor]:
    """Our descriptor and their mask."""
    arguments = dict(batch_size=BATCH, q_length=L, kv_length=L, mask_function=function) | sizes
    ours = attention_mask(**arguments, config=GEMMA)
    return ours, theirs.sdpa_mask(**arguments, allow_is_causal_skip=False)


def check(ours: Any, mask: torch.Tensor, linear: bool = True) -> None:
    assert isinstance(ours, LazyMask)
    seen = ours.visibility
    assert (seen.dense is None) == linear
    assert torch.equal(seen.to_bool().expand(mask.shape), mask)
    lowest = torch.finfo(torch.float32).min
    assert torch.equal(ours + 0.0, torch.where(mask, 0.0, lowest))


@pytest.mark.parametrize(("base", "shape", "padding"), CASES, ids=lambda x: x or "plain")
def test_each_pattern_is_their_mask(base: str, shape: str, padding: str):
    function, _ = BASES[base]
    check(*both(SHAPES[shape](function), attention_mask=PADDINGS[padding]))


@pytest.mark.parametrize("base", ("causal", "sliding", "chunks"))
@pytest.mark.parametrize("tensor", (False, True), ids=("a number", "a tensor"))
@pytest.mark.parametrize("padding", PADDINGS)
def test_queries_may_stand_behind_a_cache(base: str, tensor: bool, padding: str):
    offset: Any = torch.tensor(9) if tensor else 9
    sizes = dict(q_length=4, kv_length=L - 3, q_offset=offset, kv_offset=3)
    ours, mask = both(BASES[base][0], attention_mask=PADDINGS[padding], **sizes)
    if tensor:
        offset.add_(4)  # as a static cache does when its layers run
    check(ours, mask)


def test_full_attention_without_padding_needs_no_mask():
    function = theirs.bidirectional_mask_function
    arguments = dict(batch_size=BATCH, q_length=L, kv_length=L, mask_function=function)
    assert attention_mask(**arguments, allow_is_bidirectional_skip=True) is None
    assert attention_mask(**arguments) is not None


@pytest.mark.parametrize(
    "index",
    (
        (slice(None), slice(None), slice(-4, None), slice(None)),
        (slice(None), slice(None), slice(None), slice(0, 11)),
        (Ellipsis, slice(None, 11)),
        (slice(None), 0),
        (slice(0, 1),),
        (slice(None), slice(None), 3, slice(None)),
    ),
    ids=str,
)
def test_a_slice_is_a_slice_of_the_mask(index: tuple):
    ours, mask = both(packed(BASES["sliding"][0]), attention_mask=PADDINGS["holes"])
    expected = torch.where(mask, 0.0, torch.finfo(torch.float32).min)[index]
    assert torch.equal(ours[index] + 0.0, expected)
    slices = all(isinstance(x, slice) for x in index if x is not Ellipsis)
    assert isinstance(ours[index], LazyMask) == (slices and index != (slice(0, 1),))


TOUCHES = {
    "added": lambda scores, m: scores + m,
    "added in place": lambda scores, m: scores.clone().add_(m),
    "masked_fill": lambda scores, m: scores.masked_fill(m < 0, -9.0),
    "where": lambda scores, m: torch.where(m == 0, scores, -9.0),
    "to": lambda scores, m: scores + m.to(torch.float64),
    "expanded": lambda scores, m: scores + m.expand(BATCH, 4, L, L),
    "repeated": lambda scores, m: scores[:1] + m.repeat(1, 4, 1, 1)[0],
    "to bool": lambda scores, m: scores.masked_fill(m.bool(), -9.0),
    "multiplied": lambda scores, m: (1.0 - m) * scores,
    "F.sdpa": lambda scores, m: torch.nn.functional.scaled_dot_product_attention(
        scores, scores, scores, attn_mask=m
    ),
    "concatenated": lambda scores, m: torch.cat([m, m], -1)[..., L:] + scores,
    "squeezed": lambda scores, m: scores[:, 0] + m.squeeze(1),
    "a minimum": lambda scores, m: scores * (m.min() < 0),
    "to the device": lambda scores, m: scores + m.to(scores.device).contiguous().detach(),
}


@pytest.mark.parametrize("traced", (False, True), ids=("eager", "compiled"))
@pytest.mark.parametrize("touch", TOUCHES)
def test_code_that_touches_it_sees_eagers_float_mask(touch: str, traced: bool):
    ours, mask = both(BASES["causal"][0], attention_mask=PADDINGS["left"])
    dense = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    scores = torch.randn(BATCH, 4, L, L)

    def in_a_graph(scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return TOUCHES[touch](scores, attention_mask(BATCH, L, L, attention_mask=tokens))

    expected = TOUCHES[touch](scores, dense)
    if traced:
        torch._dynamo.reset()
        compiled = torch.compile(in_a_graph, backend="eager", fullgraph=True)
        found = compiled(scores, PADDINGS["left"])
    else:
        found = TOUCHES[touch](scores, ours)
    assert type(found) is torch.Tensor
    assert torch.equal(found, expected)


def test_what_is_asked_of_a_mask_without_touching_it():
    ours, _ = both(BASES["causal"][0])
    assert isinstance(ours, torch.Tensor)
    assert ours.shape == (BATCH, 1, L, L) and ours.ndim == ours.dim() == 4 and len(ours) == BATCH
    assert ours.dtype == torch.float32 and ours.device.type == "cpu" and ours.size(-1) == L
    assert ours.to("cpu") is ours and ours.to(torch.float32) is ours and ours.detach() is ours
    assert ours.visibility._float is None and ours.visibility._bool is None


COMPILED = list(dict.fromkeys((base, shape) for base, shape, _ in CASES))


@pytest.mark.parametrize(("base", "shape"), COMPILED, ids=lambda x: x or "plain")
def test_a_compiled_graph_makes_the_same_ranges(base: str, shape: str):
    """In one graph, and no mask of all queries and keys."""
    made = []

    def seen(ids: torch.Tensor) -> torch.Tensor:
        function = SHAPES[shape](BASES[base][0])
        sizes = dict(q_offset=8, kv_offset=3, config=GEMMA, attention_mask=ids)
        mask = attention_mask(BATCH, L - 8, L - 3, mask_function=function, **sizes)
        made.append(mask.visibility.dense is None)
        return mask.visibility.to_bool()

    torch._dynamo.reset()
    compiled = torch.compile(seen, backend="eager", fullgraph=True)
    assert torch.equal(compiled(PADDINGS["holes"]), seen(PADDINGS["holes"]))
    assert made == [True, True]


USERS = {
    "every third": lambda b, h, q, k: (q - k) % 3 != 1,
    "a table": lambda b, h, q, k: BLOCKS[b, q] * 2 <= BLOCKS[b, k],
    "one table, both ways round": lambda b, h, q, k: BLOCKS[b, q] <= BLOCKS[b, k],
    "documents that come again": theirs.packed_sequence_mask_function(BLOCKS),
    "a choice": lambda b, h, q, k: torch.where(q > 5, k < 9, k < 3),
    "a number of theirs": lambda b, h, q, k: k - 4 < float("inf"),
    "a tensor first": lambda b, h, q, k: torch.tensor(9) > k,
    "its batch": lambda b, h, q, k: (k > b) & (h >= 0),
    "numbers that may be negative": lambda b, h, q, k: BLOCKS[b, q] >= -1,
    "both ways in one document": lambda b, h, q, k: (BLOCKS[b, q] == BLOCKS[b, k]) & (k <= q),
}


@pytest.mark.parametrize("traced", (False, True), ids=("eager", "compiled"))
@pytest.mark.parametrize("user", USERS)
def test_what_is_no_interval_is_the_real_mask(user: str, traced: bool):
    arguments: Any = dict(batch_size=BATCH, q_length=L, kv_length=L, use_vmap=True)

    def seen(tokens: torch.Tensor) -> torch.Tensor:
        function = theirs.and_masks(theirs.causal_mask_function, USERS[user])
        mask = attention_mask(**arguments, mask_function=function, attention_mask=tokens)
        assert mask.visibility.dense is not None
        return mask.visibility.to_bool()

    torch._dynamo.reset()
    found = torch.compile(seen, backend="eager", fullgraph=True) if traced else seen
    function = theirs.and_masks(theirs.causal_mask_function, USERS[user])
    theirs_too = dict(mask_function=function, allow_is_causal_skip=False)
    expected = theirs.sdpa_mask(**arguments, **theirs_too, attention_mask=PADDINGS["left"])
    assert torch.equal(found(PADDINGS["left"]), expected)


SAYABLE = {
    "T5Gemma 2's window": (
        theirs.bidirectional_mask_function,
        lambda b, h, q, k: ((q - k >= 0) & (q - k < 6)) | ((q - k < 0) & (-(q - k) < 3)),
    ),
    "a window written otherwise": (
        theirs.causal_mask_function,
        lambda b, h, q, k: q - k < 7,
    ),
}


@pytest.mark.parametrize("what", SAYABLE)
def test_intervals_of_a_models_own_functions_are_ranges_too(what: str):
    check(*both(theirs.and_masks(*SAYABLE[what]), use_vmap=True))


@pytest.mark.parametrize("or_mask", (False, True), ids=("window", "all"))
def test_both_ways_of_embedding_gemma_is_a_window(or_mask: bool):
    more = (lambda *_: torch.tensor(True)) if or_mask else (lambda b, h, q, k: abs(q - k) < WINDOW)
    check(*both(theirs.or_masks(BASES["sliding"][0], more), use_vmap=True))


def test_images_that_share_one_number_see_each_other():
    """Molmo 2, GIT and PaliGemma number all images 0: no interval says what these see."""
    ids = torch.where(BLOCKS >= 0, 0, -1)
    function = theirs.or_masks(theirs.causal_mask_function, theirs.blockwise_overlay(ids))
    arguments: Any = dict(batch_size=BATCH, q_length=L, kv_length=L, mask_function=function)
    ours = attention_mask(**arguments, config=SimpleNamespace(model_type="molmo2_text"))
    check(ours, theirs.sdpa_mask(**arguments, allow_is_causal_skip=False), linear=False)


@pytest.mark.parametrize("family", sorted(NUMBER_EACH_BLOCK))
def test_these_families_number_each_image(family: str):
    name = family.removesuffix("_text")
    model = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    kinds = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0, 0, 1]])
    ids = model.get_block_sequence_ids_for_mask(kinds, device=torch.device("cpu"))
    assert ids.tolist() == [[-1, 0, 0, -1, 1, 1, 1, -1, -1, 2]]


# ---- written to

LOWEST = torch.finfo(torch.float32).min
WRITES = {
    "an assignment": lambda x: x.__setitem__((..., slice(3, 5)), LOWEST),
    "masked_fill_": lambda x: x.masked_fill_(torch.arange(L) == 2, LOWEST),
    "add_": lambda x: x.add_(-(torch.arange(L) % 3).float()),
    "a view": lambda x: x.view(1, 1, L, L)[..., 2].fill_(LOWEST),
    "a slice without heads": lambda x: x[:, 0][..., 2].fill_(LOWEST),
    "data": lambda x: x.data[..., 2].fill_(LOWEST),
}


def one_mask() -> Any:
    return attention_mask(1, L, L, attention_mask=torch.ones(1, L).bool(), dtype=torch.float32)


@pytest.mark.parametrize("inference", (False, True))
@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_to_a_mask_counts(write: str, inference: bool):
    module = torch.nn.Module().eval()
    module.is_causal = True
    q, k, v = torch.randn(3, 1, 2, L, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(inference):
        mask = one_mask()
        plain = (mask + 0).clone()
        WRITES[write](mask)
        WRITES[write](plain)
        out, _ = attention_forward(module, q, k, v, mask)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, plain)
    torch.testing.assert_close(out.transpose(1, 2), expected)
    assert (out - attention_forward(module, q, k, v, one_mask())[0]).abs().max() > 0.01


def attended(q: torch.Tensor, change: Any) -> torch.Tensor:
    """What attention makes of a mask after code has touched it."""
    module = torch.nn.Module().eval()
    module.is_causal = True
    mask = one_mask()
    change(mask)
    return attention_forward(module, q, q.cos(), q.sin(), mask)[0]


def multiply_in_place(x: Any) -> None:
    x *= 0.0


GRAPH_WRITES = WRITES | {
    "*=": multiply_in_place,
    "through expand": lambda x: x.expand(1, 1, L, L)[..., 2].fill_(LOWEST),
    "through unsqueeze": lambda x: torch.unsqueeze(x, 0)[..., 2].fill_(LOWEST),
    "through a slice": lambda x: x[:, :, 4:9].masked_fill_(torch.arange(L) == 2, LOWEST),
    "through a slice of a slice": lambda x: x[:, :, 4:9][..., :3].fill_(LOWEST),
    "through a view of a slice": lambda x: x[..., :7].squeeze(0)[..., 2].fill_(LOWEST),
    "through .to": lambda x: x.to(torch.float32)[..., 2].fill_(LOWEST),
    "through a function in place": lambda x: torch.nn.functional.threshold(x, 1.0, -2.0, True),
    "out=": lambda x: torch.add(x, -(torch.arange(L) % 3).float(), out=x),
    "clamp_": lambda x: torch.clamp_(x, min=-1.0),
}


@pytest.mark.parametrize("write", GRAPH_WRITES)
def test_what_is_written_to_a_mask_counts_under_compile(write: str):
    q = torch.randn(1, 2, L, 8, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    compiled = torch.compile(attended, backend="eager")
    expected = attended(q, GRAPH_WRITES[write])
    torch.testing.assert_close(compiled(q, GRAPH_WRITES[write]), expected)
    assert (expected - attended(q, lambda x: None)).abs().max() > 0.01


@pytest.mark.parametrize("write", GRAPH_WRITES)
def test_a_compiled_layer_sees_what_an_eager_model_wrote(write: str):
    module = torch.nn.Module().eval()
    module.is_causal = True
    q = torch.randn(1, 2, L, 8, generator=torch.Generator().manual_seed(0))
    mask = one_mask()
    GRAPH_WRITES[write](mask)
    torch._dynamo.reset()
    layer = lambda q, m: attention_forward(module, q, q.cos(), q.sin(), m)[0]  # noqa: E731
    compiled = torch.compile(layer, backend="eager")
    torch.testing.assert_close(compiled(q, mask), attended(q, GRAPH_WRITES[write]))


FIRST = torch.tensor([True, False])[:, None, None, None]
OF_ONE_SAMPLE = {
    "an assignment": lambda x: x.__setitem__((0, 0, slice(None), 1), LOWEST),
    "a view": lambda x: x[0].fill_(0.0),
    "a view of a slice": lambda x: x[:, :, 2:9][0].fill_(0.0),
    "masked_fill_": lambda x: x.masked_fill_(FIRST & (torch.arange(L) == 2), LOWEST),
    "add_": lambda x: x.add_(FIRST * -(torch.arange(L) % 3.0)),
    "out=": lambda x: torch.add(x, FIRST * -(torch.arange(L) % 3.0), out=x),
    "where with out=": lambda x: torch.where(
        FIRST & (torch.arange(L) == 2), torch.tensor(LOWEST), x, out=x
    ),
}


@pytest.mark.parametrize("write", OF_ONE_SAMPLE)
@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
def test_what_is_written_to_one_sample_is_that_samples(write: str, compiled: bool):
    """Without padding, where all samples have the same mask."""
    module = torch.nn.Module().eval()
    q = torch.randn(2, 2, L, 8, generator=torch.Generator().manual_seed(0))

    def attend(q: torch.Tensor) -> torch.Tensor:
        mask = attention_mask(2, L, L)
        OF_ONE_SAMPLE[write](mask)
        return attention_forward(module, q, q.cos(), q.sin(), mask)[0].transpose(1, 2)

    causal = torch.full((L, L), LOWEST).triu(1)
    plain = causal.repeat(2, 1, 1, 1)
    OF_ONE_SAMPLE[write](plain)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    expected = sdpa(q, q.cos(), q.sin(), plain)
    torch._dynamo.reset()
    found = torch.compile(attend, backend="aot_eager")(q) if compiled else attend(q)
    torch.testing.assert_close(found, expected)
    other = sdpa(q, q.cos(), q.sin(), causal)
    assert (expected - other)[0].abs().max() > 0.01 and torch.equal(expected[1], other[1])


def test_a_view_that_was_taken_may_be_written_to_later():
    q = torch.randn(1, 2, L, 8, generator=torch.Generator().manual_seed(0))

    def two_layers(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        module = torch.nn.Module().eval()
        module.is_causal = True
        mask = one_mask()
        view, part = mask.squeeze(0), mask[:, :, :, :L]
        first, _ = attention_forward(module, q, q, q, mask)
        view[..., 2].fill_(LOWEST)
        second, _ = attention_forward(module, q, q, q, part)
        return first, second

    torch._dynamo.reset()
    first, second = two_layers(q)
    assert (first - second).abs().max() > 0.01
    torch.testing.assert_close(torch.compile(two_layers, backend="eager")(q), (first, second))


def test_reading_a_mask_in_a_graph_keeps_its_ranges():
    def read(q: torch.Tensor) -> torch.Tensor:
        mask = one_mask()
        scores = q @ q.mT + mask + mask.masked_fill(mask < 0, -1.0) + (1.0 - mask) * (mask != 0)
        assert mask.visibility.edited is None
        return scores.softmax(-1)

    q = torch.randn(1, 2, L, 8)
    torch._dynamo.reset()
    compiled = torch.compile(read, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q), read(q))
