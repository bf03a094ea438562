"""Mods that fixed kernels compute: each gives what the general reference gives, and only those that
are equal for all numbers are taken."""

from __future__ import annotations

import flex_mods
import pytest
import torch
from torch.nn.attention.flex_attention import and_masks, or_masks

from orchard_ops import flash_attn
from orchard_ops.flex.known import Known, recognise
from orchard_ops.flex.reference import attend
from orchard_ops.flex.trace import MASK, SCORE, trace

BATCH, HEADS, LENGTH, WIDTH = 2, 3, 40, 16
DOCUMENTS = torch.arange(LENGTH) // 9
ROWS_OF_DOCUMENTS = torch.stack((torch.arange(LENGTH) // 7, torch.arange(LENGTH) // 40))
LENGTHS = torch.tensor([25, 40])
PREFIX = torch.tensor([3, 12], dtype=torch.int32)
SLOPES = torch.tensor([0.5, 0.25, 0.125])
OF_ROWS = torch.rand(BATCH, HEADS)
TABLE = torch.randn(HEADS, LENGTH, LENGTH + 2)


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


MASKS = {
    "causal": causal,
    "causal written the other way": lambda b, h, q, kv: ~(kv > q),
    "two-sided window": near,
    "sliding window": and_masks(causal, behind),
    "asymmetric window": lambda b, h, q, kv: (kv - q <= 2) & (q <= kv + 9),
    "documents": documents,
    "documents of each row": lambda b, h, q, kv: (
        ROWS_OF_DOCUMENTS[b, q] == ROWS_OF_DOCUMENTS[b, kv]
    ),
    "causal documents": and_masks(documents, causal),
    "windowed documents": and_masks(causal, documents, behind),
    "prefix": or_masks(prefix, causal),
    "prefix of one length": or_masks(causal, lambda b, h, q, kv: kv < 11),
    "lengths": lambda b, h, q, kv: LENGTHS[b] > kv,
    "causal with lengths": and_masks(causal, lambda b, h, q, kv: LENGTHS[b] > kv),
    "everything": lambda b, h, q, kv: q.new_ones((), dtype=torch.bool),
}
UNKNOWN_MASKS = {
    "strictly behind": lambda b, h, q, kv: q > kv,
    "either end": lambda b, h, q, kv: (q - kv > 3) | (kv - q > 3),
    "dilated": flex_mods.dilated_window,
    "shifted by a tensor": flex_mods.shifted_causal,
    "documents and a prefix": lambda b, h, q, kv: documents(b, h, q, kv) & (kv < 11),
    "windowed prefix": and_masks(or_masks(prefix, causal), behind),
    "not these documents": lambda b, h, q, kv: DOCUMENTS[q] != DOCUMENTS[kv],
    "documents of another place": lambda b, h, q, kv: DOCUMENTS[q] == DOCUMENTS[kv - 1],
    "integers that wrap": lambda b, h, q, kv: q + 2**31 - 1 >= kv + 2**31 - 1,
    "a document's number": lambda b, h, q, kv: DOCUMENTS[kv] + 1 < 3,
    "documents that wrap": lambda b, h, q, kv: FAR_APART[q].int() == FAR_APART[kv].int(),
    "a number that wraps": lambda b, h, q, kv: (
        (q >= torch.full((), 5 - 2**32, dtype=torch.int64).int()) & (q >= kv)
    ),
    "a sum that wraps": lambda b, h, q, kv: (
        kv < torch.full((), 200, dtype=torch.uint8) + torch.full((), 100, dtype=torch.uint8)
    ),
    "a sum of conditions": lambda b, h, q, kv: (
        kv < q.new_ones((), dtype=torch.bool) + q.new_ones((), dtype=torch.bool)
    ),
    "bits, not a condition": lambda b, h, q, kv: (
        torch.logical_not(torch.bitwise_not(q.new_ones(()))) & (q >= kv)
    ),
}
FAR_APART = torch.arange(LENGTH) // 9 << 32


def causal_alibi(score, b, h, q_idx, kv_idx):
    return torch.where(q_idx >= kv_idx, score + SLOPES[h] * (kv_idx - q_idx), -float("inf"))


SCORES = {
    "nothing": lambda s, b, h, q, kv: s,
    "softcap": lambda s, b, h, q, kv: 2.0 * torch.tanh(s / 2.0),
    "softcap by an integer": lambda s, b, h, q, kv: torch.tanh(s / 3) * 3,
    "causal": lambda s, b, h, q, kv: torch.where(q >= kv, s, -float("inf")),
    "causal by filling": lambda s, b, h, q, kv: s.masked_fill(kv > q, float("-inf")),
    "alibi": lambda s, b, h, q, kv: s - SLOPES[h] * (q - kv).abs(),
    "causal alibi": causal_alibi,
    "computed alibi": lambda s, b, h, q, kv: s - torch.exp2(-(h + 1.0)) * torch.abs(kv - q),
    "alibi of rows": lambda s, b, h, q, kv: s - (q - kv).abs() * OF_ROWS[b, h],
    "table": lambda s, b, h, q, kv: s + TABLE[h, q, kv],
    "table of keys": lambda s, b, h, q, kv: s + OF_KEYS[kv],
    "table of rows": lambda s, b, h, q, kv: OF_ROWS[b, h] + s,
    "all": lambda s, b, h, q, kv: torch.where(
        q - kv < 9, torch.tanh(s / 4) * 4 - SLOPES[h] * (q - kv).abs() + TABLE[h, q, kv], -torch.inf
    ),
}
OF_KEYS = torch.randn(LENGTH).half()


class _OwnBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(score):
        return 2.0 * torch.tanh(score / 2.0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient


UNKNOWN_SCORES = {
    "detached": lambda s, b, h, q, kv: s.detach(),
    "detached within": lambda s, b, h, q, kv: 2.0 * torch.tanh(s / 2.0).detach(),
    "detached table": lambda s, b, h, q, kv: s + TABLE.detach()[h, q, kv],
    "a backward of its own": lambda s, b, h, q, kv: _OwnBackward.apply(s),
    "a cap that is rounded": lambda s, b, h, q, kv: (
        torch.full((), 0.1, dtype=torch.half) * torch.tanh(s / 0.1)
    ),
    "two caps": lambda s, b, h, q, kv: 2.0 * torch.tanh(s / 3.0),
    "table before the cap": lambda s, b, h, q, kv: 2.0 * torch.tanh((s + SLOPES[h]) / 2.0),
    "alibi of keys ahead": lambda s, b, h, q, kv: s + SLOPES[h] * (kv - q),
    "alibi that attracts": lambda s, b, h, q, kv: s + SLOPES[h] * (kv - q).abs(),
    "a table's other entries": lambda s, b, h, q, kv: s + TABLE[h, kv, q],
    "relative": flex_mods.relative_bias,
    "subtracted from": lambda s, b, h, q, kv: TABLE[h, q, kv] - s,
    "rounded table": lambda s, b, h, q, kv: s + TABLE[h, q, kv].half().float(),
    "scaled": lambda s, b, h, q, kv: s * 2,
    "bias of what is hidden": lambda s, b, h, q, kv: (
        torch.where(q >= kv, s, -torch.inf) + TABLE[h, q, kv]
    ),
}


def _operands() -> list[torch.Tensor]:
    shape = (BATCH, HEADS, LENGTH, WIDTH)
    return [torch.randn(shape, requires_grad=True) for _ in range(3)]


def _recognised(score=None, mask=None) -> tuple[Known | None, list, list]:
    traced = [
        None if mod is None else trace(mod, kind) for mod, kind in ((score, SCORE), (mask, MASK))
    ]
    captures = [[] if t is None else t.captures for t in traced]
    return recognise(*traced), *captures


def _agree(score=None, mask=None, trained: tuple[torch.Tensor, ...] = ()) -> None:
    known, *captures = _recognised(score, mask)
    assert known is not None
    q, k, v = _operands()
    arguments = known.arguments(*captures, q, k)
    assert arguments is not None
    found = flash_attn(q, k, v, return_lse=True, scale=0.5, **arguments)
    true = attend(q, k, v, score, mask, None, 1, 1, 0.5)
    for x, y in zip(found, true):
        torch.testing.assert_close(x, y)
    upstream = torch.randn_like(q)
    gradients = [
        torch.autograd.grad((out * upstream).sum(), (q, k, v, *trained)) for out, _ in (found, true)
    ]
    for x, y in zip(*gradients):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str):
    _agree(mask=MASKS[name])


@pytest.mark.parametrize("name", SCORES)
def test_scores(name: str):
    _agree(SCORES[name])


@pytest.mark.parametrize("mask", ["causal", "documents", "sliding window"])
def test_scores_with_masks(mask: str):
    _agree(SCORES["all"], MASKS[mask])
    _agree(lambda s, b, h, q, kv: s + SLOPES[h] * (kv - q), causal)


def test_tables_have_gradients(monkeypatch: pytest.MonkeyPatch):
    table = torch.nn.Parameter(torch.randn(HEADS, LENGTH, LENGTH))
    _agree(lambda s, b, h, q, kv: s + table[h, q, kv], trained=(table,))
    slopes = torch.nn.Parameter(torch.rand(HEADS))
    known, *captures = _recognised(lambda s, b, h, q, kv: s - slopes[h] * (q - kv).abs())
    assert known is not None and known.arguments(*captures, *_operands()[:2]) is None


@pytest.mark.parametrize("name", UNKNOWN_MASKS)
def test_masks_that_are_something_else(name: str):
    assert _recognised(mask=UNKNOWN_MASKS[name])[0] is None


@pytest.mark.parametrize("name", UNKNOWN_SCORES)
def test_scores_that_are_something_else(name: str):
    assert _recognised(UNKNOWN_SCORES[name])[0] is None


def test_documents_out_of_order_are_no_ranges():
    ids = torch.tensor([0, 0, 1, 1, 0, 2, 2, 2])
    known, *captures = _recognised(mask=lambda b, h, q, kv: ids[q] == ids[kv])
    q = torch.randn(1, 1, 8, 4)
    assert known is not None and known.arguments(*captures, q, q) is None
    ids.copy_(ids.sort().values)
    assert known.arguments(*captures, q, q) is not None
    assert known.arguments(*captures, torch.randn(1, 1, 9, 4), q) is None  # an id is missing


def test_the_ranges_of_documents_are_made_once():
    ids = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2])
    known, *captures = _recognised(mask=lambda b, h, q, kv: ids[q] == ids[kv])
    assert known is not None
    q = torch.randn(1, 1, 8, 4)
    first, again, shorter = (known.arguments(*captures, x, q) for x in (q, q, q[:, :, :5]))
    assert first["key_ranges"] is again["key_ranges"]
    assert shorter["key_ranges"].tensor.shape[2] == 5
    ids[4] = 2
    changed = known.arguments(*captures, q, q)["key_ranges"]
    assert changed.tensor[0, 0, 2].tolist()[:2] == [2, 4]
    assert first["key_ranges"].tensor[0, 0, 2].tolist()[:2] == [2, 5]


def test_documents_of_one_row_are_not_those_of_its_table():
    """A row has the memory, the offset and, once it is one of a batch, the strides of its table."""
    table = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 2]])
    row = table[0]
    q = torch.randn(2, 1, 8, 4)
    masks = (
        lambda b, h, q, kv: row[q] == row[kv],
        lambda b, h, q, kv: table[b, q] == table[b, kv],
    )
    for mask in (*masks, masks[0]):
        known, *captures = _recognised(mask=mask)
        assert known is not None
        ranges = known.arguments(*captures, q, q)["key_ranges"].tensor
        shared = mask is masks[0]
        assert ranges.shape[0] == (1 if shared else 2)
        assert ranges[-1, 0, 1].tolist()[:2] == ([0, 2] if shared else [1, 7])


def test_documents_of_inference_mode_are_no_ranges():
    with torch.inference_mode():
        ids = torch.tensor([0, 0, 1, 1])
    known, *captures = _recognised(mask=lambda b, h, q, kv: ids[q] == ids[kv])
    q = torch.randn(1, 1, 4, 4)
    assert known is not None and known.arguments(*captures, q, q) is None  # it may change unseen


def test_the_order_of_documents_is_that_of_their_dtype():
    ids = torch.tensor([-1, -1, 0, 0], dtype=torch.int8)
    unsigned, q = ids.view(torch.uint8), torch.randn(1, 1, 4, 4)
    for x, is_known in ((ids, True), (unsigned, False), (ids, True)):
        known, *captures = _recognised(mask=lambda b, h, q, kv, x=x: x[q] == x[kv])
        assert known is not None
        assert (known.arguments(*captures, q, q) is not None) == is_known


def test_a_cap_as_its_dtype_holds_it():
    known, *_ = _recognised(
        lambda s, b, h, q, kv: (
            torch.full((), 0.1, dtype=torch.half)
            * torch.tanh(s / torch.full((), 0.1, dtype=torch.half))
        )
    )
    assert known is not None and known.softcap == torch.tensor(0.1).half().item()


def test_lengths_that_have_no_end():
    ends = torch.tensor([2**63 - 1, 6])
    _agree(mask=lambda b, h, q, kv: kv <= ends[b])
    _agree(mask=lambda b, h, q, kv: kv - 2 < ends[b])


def test_tables_that_are_too_small():
    known, *captures = _recognised(SCORES["table"])
    q = torch.randn(1, HEADS, LENGTH + 1, 4)
    assert known is not None and known.arguments(*captures, q, q) is None
