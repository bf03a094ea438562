"""BlockMasks of known masks take the fixed kernels where their lists say what the mask_mod says."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import SIMULATED
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, create_mask

import orchard_ops
from orchard_ops.flex import block_lists, route
from orchard_ops.flex.block_lists import Said, lists_follow
from orchard_ops.flex.block_mask import ASK, HIDDEN, SEEN, Blocks
from orchard_ops.flex.traces import known_call, of_function

if SIMULATED:
    import simulator

BATCH, HEADS, LENGTH, WIDTH = 2, 3, 40, 16
DOCUMENTS = torch.arange(LENGTH) // 9
PREFIX = torch.tensor([3, 12], dtype=torch.int32)


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def near(b, h, q_idx, kv_idx):
    return (q_idx - kv_idx).abs() <= 5


def behind(b, h, q_idx, kv_idx):
    return q_idx - kv_idx < 7


def documents(b, h, q_idx, kv_idx):
    return DOCUMENTS[q_idx] == DOCUMENTS[kv_idx]


def prefix(b, h, q_idx, kv_idx):
    return kv_idx < PREFIX[b]


def _made(mask_mod, batch=None, heads=None, device="cpu", length=LENGTH) -> BlockMask:
    return create_block_mask(mask_mod, batch, heads, length, length, device=device, BLOCK_SIZE=16)


def _of_lists(made: BlockMask, *lists: Tensor | None) -> BlockMask:
    return BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=16, mask_mod=made.mask_mod, seq_lengths=made.seq_lengths
    )


# ---- whether lists say what the mask_mod says ---------------------------------------------------


def _follows(made: BlockMask, mask_mod: Any, batch: int = BATCH) -> bool:
    query = torch.empty(batch, HEADS, made.seq_lengths[0], WIDTH)
    use = of_function(mask_mod, "mask", query)
    known = known_call(None, use)
    assert known is not None
    rule = known.rule((), use.captures)
    ranges = None if rule is None else rule.key_ranges(query, query)
    assert (ranges is None) == (rule is None)
    said = Said.of(known.window_left, known.window_right, ranges, rule)
    sizes = (*query.shape[:3], query.shape[2])
    return lists_follow(Blocks.of(made), said, sizes)


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The first of the lists, as often as they are judged."""
    seen: list[Tensor] = []
    judge = block_lists._judge

    def judged(blocks: Blocks, *rest: Any) -> bool:
        seen.append(blocks.lists[0])
        return judge(blocks, *rest)

    monkeypatch.setattr(block_lists, "_judge", judged)
    return seen


def test_lists_of_create_block_mask_follow():
    assert _follows(_made(causal), causal)
    assert _follows(_made(prefix, BATCH), prefix)
    assert _follows(_made(prefix, BATCH, HEADS), prefix)
    assert _follows(_made(documents), documents)


def test_long_masks_are_judged_by_parts(monkeypatch: pytest.MonkeyPatch):
    sliding = and_masks(causal, behind)
    monkeypatch.setattr(block_lists, "_NUMBERS_AT_ONCE", 1)
    made = _made(sliding, length=75)
    assert _follows(made, sliding)
    for row in range(5):
        fewer = made.kv_num_blocks.clone()
        fewer[..., row] = 0
        lists = (fewer, made.kv_indices, made.full_kv_num_blocks, made.full_kv_indices)
        assert not _follows(_of_lists(made, *lists), sliding)


@pytest.mark.parametrize("name", ("causal", "near", "behind", "documents", "of rows", "mixed"))
@pytest.mark.parametrize("block", ((16, 16), (8, 24), (40, 7), (64, 64)))
def test_each_block_is_judged(name: str, block: tuple[int, int]):
    """One block at a time is another than the mask_mod says. Where it is asked, all is well."""
    of_rows = torch.tensor([3, 33])
    mask_mod = {
        "causal": causal, "near": near, "behind": behind, "documents": documents,
        "of rows": lambda b, h, q, kv: (kv < of_rows[b]) | (q >= kv),
        "mixed": and_masks(documents, causal, behind),
    }[name]  # fmt: skip
    made = create_block_mask(mask_mod, BATCH, None, LENGTH, LENGTH, "cpu", BLOCK_SIZE=block)
    right = Blocks.of(made).states(LENGTH, LENGTH)
    seen = create_mask(mask_mod, BATCH, 1, LENGTH, LENGTH, "cpu")
    assert _follows(made, mask_mod)
    for place in itertools.product(*map(range, right.shape)):
        rows, columns = (slice(n * x, (n + 1) * x) for n, x in zip(place[2:], block))
        pairs = seen[place[0], place[1], rows, columns]
        for state, is_right in ((HIDDEN, not pairs.any()), (ASK, True), (SEEN, bool(pairs.all()))):
            states = right.clone()
            states[place] = state
            rest = (made.BLOCK_SIZE, made.mask_mod, (LENGTH, LENGTH))
            lists = [x for n in (ASK, SEEN) for x in _listed(states == n)]
            other = BlockMask.from_kv_blocks(*lists, *rest)
            assert _follows(other, mask_mod) == is_right


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are listed, and which."""
    order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1).int(), order.int()


def test_other_lists_do_not_follow():
    made = _made(near)
    full = made.full_kv_num_blocks, made.full_kv_indices
    partial = made.kv_num_blocks, made.kv_indices
    assert _follows(_of_lists(made, *partial, *full), near)
    assert not _follows(_of_lists(made, (partial[0] - 1).clamp(min=0), partial[1], *full), near)
    as_full = (torch.zeros_like(partial[0]), partial[1], *partial)
    assert not _follows(_of_lists(made, *as_full), near)


def test_a_full_block_may_be_asked():
    """The mask_mod says that all of it is seen."""
    made = _made(causal)
    assert made.full_kv_num_blocks.sum() > 0
    every = made.to_dense().to(torch.int32)  # listed at all
    counts = every.sum(-1).to(torch.int32)
    indices = torch.argsort(every, dim=-1, descending=True, stable=True).to(torch.int32)
    asked = _of_lists(made, counts, indices, None, None)
    assert _follows(asked, causal)


def test_lists_of_one_row_do_not_follow_a_mask_of_each_row():
    lengths = torch.tensor([3, 33])
    mask_mod = lambda b, h, q, kv: kv < lengths[b]  # noqa: E731
    assert not _follows(_made(mask_mod), mask_mod)
    assert _follows(_made(mask_mod), mask_mod, batch=1)
    assert _follows(_made(prefix), prefix)  # asks in the block that both lengths are in


def test_a_mask_is_judged_once(judged: list[Tensor]):
    made, other = _made(causal), _made(causal)
    for _ in range(3):
        assert _follows(made, lambda b, h, q, kv: q >= kv)
    assert judged == [made.kv_num_blocks]
    assert _follows(other, causal)
    assert judged == [made.kv_num_blocks, other.kv_num_blocks]


def test_lists_are_judged_again_when_numbers_change(judged: list[Tensor]):
    ids = torch.arange(LENGTH) // 9
    mask_mod = lambda b, h, q, kv: ids[q] == ids[kv]  # noqa: E731
    made = _made(mask_mod)
    assert _follows(made, mask_mod)
    ids.zero_()
    assert not _follows(made, mask_mod)
    assert len(judged) == 2
    made.kv_num_blocks.zero_()
    assert not _follows(made, mask_mod)
    assert len(judged) == 3


def test_lists_are_judged_again_for_another_mask_mod(judged: list[Tensor]):
    made = _made(causal)
    assert _follows(made, causal)
    made.mask_mod = near
    assert not _follows(made, near)
    assert len(judged) == 2


def test_where_nothing_tells_of_changes_lists_are_not_trusted(judged: list[Tensor]):
    with torch.inference_mode():
        made = _made(causal)
    assert not _follows(made, causal)
    assert judged == []


def test_a_mask_mod_that_is_traced_in_every_call(judged: list[Tensor]):
    class Positions:
        def __getitem__(self, n: Any) -> Any:
            return n

    positions = Positions()
    mask_mod = lambda b, h, q, kv: positions[q] >= positions[kv]  # noqa: E731
    made = _made(mask_mod)
    assert _follows(made, mask_mod) and _follows(made, mask_mod)
    assert len(judged) == 1


# ---- which kernels run --------------------------------------------------------------------------

MASKS = {
    "causal": causal,
    "two-sided window": near,
    "sliding window": and_masks(causal, behind),
    "documents": documents,
    "causal documents": and_masks(documents, causal),
    "prefix": lambda b, h, q, kv: (kv < PREFIX[b]) | (q >= kv),
    "everything": torch.nn.attention.flex_attention.noop_mask,
}


def _on_mps(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    for captured in ("DOCUMENTS", "PREFIX"):
        monkeypatch.setitem(globals(), captured, globals()[captured].to("mps"))
    return MASKS[name]


def _operands(device: str = "mps") -> list[Tensor]:
    shape = (BATCH, HEADS, LENGTH, WIDTH)
    return [torch.randn(shape).to(device).requires_grad_() for _ in range(3)]


def _fixed(kernels: list[str]) -> bool:
    """Whether these are kernels of `flash_attn`."""
    assert any(name.startswith("attention_forward") for name in kernels)
    assert any(name.startswith("attention_backward") for name in kernels)
    return not any("flex" in name for name in kernels)


def _run(operands: list[Tensor], *mods: Any) -> tuple[list[Tensor], list[str]]:
    """out and gradients, and the names of the kernels."""
    with orchard_ops.report(show=False) as report:
        out = orchard_ops.flex_attention(*operands, *mods)
        found = [out, *torch.autograd.grad(out.sin().sum(), operands)]
    assert report.count("metal") == 2 == len(report.calls)
    return found, [name for call in report.calls for name in call.kernels]


@pytest.mark.parametrize("name", MASKS)
def test_known_masks_take_the_fixed_kernels(name: str, monkeypatch: pytest.MonkeyPatch):
    mask_mod = _on_mps(name, monkeypatch)
    made = _made(mask_mod, BATCH if name == "prefix" else None, device="mps")
    operands = _operands()
    found, kernels = _run(operands, None, made)
    assert _fixed(kernels)
    monkeypatch.setattr(route, "lists_follow", lambda *_: False)
    right, others = _run(operands, None, made)
    assert not _fixed(others)
    for x, y in zip(found, right):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_known_scores_go_with_known_masks():
    made = _made(causal, device="mps")
    q, k, v = _operands()
    found, kernels = _run([q, k, v], lambda s, *_: 4.0 * torch.tanh(s / 4.0), made)
    assert _fixed(kernels)
    assert torch.equal(found[0], orchard_ops.flash_attn(q, k, v, is_causal=True, softcap=4.0))
    _, kernels = _run([q, k, v], lambda s, *_: 0.5 * s, made)
    assert not _fixed(kernels)


def test_lists_of_the_users_mean_what_they_say():
    """Only the block on the diagonal: less than the mask_mod."""
    rows = torch.arange(3, dtype=torch.int32, device="mps")
    made = BlockMask.from_kv_blocks(
        torch.ones_like(rows)[None, None], rows[None, None, :, None].expand(1, 1, 3, 3).clone(),
        BLOCK_SIZE=16, mask_mod=causal, seq_lengths=(LENGTH, LENGTH),
    )  # fmt: skip
    operands = _operands()
    found, kernels = _run(operands, None, made)
    assert not _fixed(kernels)
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    seen = (i // 16 == j // 16) & (i >= j)
    right = torch.nn.functional.scaled_dot_product_attention(*(x.cpu() for x in operands), seen)
    torch.testing.assert_close(found[0].cpu(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ("causal", "sliding window", "documents"))
def test_only_the_first_call_waits(name: str, monkeypatch: pytest.MonkeyPatch):
    mask_mod = _on_mps(name, monkeypatch)
    made, operands = _made(mask_mod, device="mps"), _operands()
    _run(operands, None, made)  # traces
    again = _made(mask_mod, device="mps")
    waits = [simulator.waits().total]
    for _ in range(3):
        orchard_ops.flex_attention(*operands, None, again)
        waits.append(simulator.waits().total)
    assert [b - a for a, b in itertools.pairwise(waits)] == [1, 0, 0]


def test_recomputation_sees_the_same_kernels():
    """A checkpoint runs the call again; the mask was judged in between."""
    from torch.utils.checkpoint import checkpoint

    made, operands = _made(causal, device="mps"), _operands()
    direct = orchard_ops.flash_attn(*operands, is_causal=True)
    out = checkpoint(
        lambda *x: orchard_ops.flex_attention(*x, None, made), *operands, use_reentrant=False
    )
    assert torch.equal(out, direct)
    pairs = zip(
        torch.autograd.grad(out.sin().sum(), operands),
        torch.autograd.grad(direct.sin().sum(), operands),
    )
    assert all(torch.equal(x, y) for x, y in pairs)
