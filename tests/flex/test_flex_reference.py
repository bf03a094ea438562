"""The reference of flex_attention: results and gradients of everything against dense float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from orchard_ops.flex.block_mask import ASK, HIDDEN, SEEN
from orchard_ops.flex.reference import attend

BATCH, HEADS, KV_HEADS, Q_LEN, KV_LEN, WIDTH = 2, 4, 2, 150, 140, 8
SCALE = 0.3


def _operands(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = [(BATCH, HEADS, Q_LEN, WIDTH), *[(BATCH, KV_HEADS, KV_LEN, WIDTH)] * 2]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def _dense(q: Tensor, k: Tensor, v: Tensor, change, seen: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse of scores that `change` makes of the products, where `seen`."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    x = change(q @ k.transpose(2, 3) * SCALE)
    any_key = seen.any(-1, keepdim=True)
    x = torch.where(seen | ~any_key, x, -torch.inf)
    out = torch.where(any_key, torch.softmax(x, -1) @ v, 0.0)
    return out, torch.where(any_key.squeeze(-1), x.logsumexp(-1), -torch.inf)


def _places() -> tuple[Tensor, ...]:
    sizes = (BATCH, HEADS, Q_LEN, KV_LEN)
    return torch.meshgrid(*(torch.arange(n) for n in sizes), indexing="ij")


def _agree(found: tuple, true: tuple, leaves: tuple[Tensor, ...]) -> None:
    finite = true[1].isfinite()
    assert torch.equal(found[1] == -torch.inf, ~finite)
    upstream, of_lse = torch.randn_like(true[0]), torch.randn_like(true[1])
    gradients = []
    for out, lse in (found, true):
        total = (out * upstream).sum() + (lse[finite] * of_lse[finite]).sum()
        gradients.append(torch.autograd.grad(total, leaves))
    for x, y in zip((*found, *gradients[0]), (*true, *gradients[1])):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("listed", [False, True])
def test_gradients_of_operands_and_captures(listed: bool):
    q, k, v = _operands()
    table = torch.randn(HEADS, Q_LEN + KV_LEN, dtype=torch.float64, requires_grad=True)
    factor = torch.randn(BATCH, dtype=torch.float64, requires_grad=True)

    def score_mod(score, b, h, q_idx, kv_idx):
        return 5 * torch.tanh(score / 5) + table[h, q_idx - kv_idx + KV_LEN] * factor[b]

    def mask_mod(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx + 3) & (kv_idx != 7) & (h + b < 4)

    b, h, i, j = _places()
    seen = mask_mod(b, h, i, j)
    states = None
    if listed:
        states = torch.randint(0, 3, (BATCH, HEADS, 5, 9), dtype=torch.uint8)
        assert {HIDDEN, ASK, SEEN} == set(states.flatten().tolist())
        whole = states.repeat_interleave(32, 2)[:, :, :Q_LEN].repeat_interleave(16, 3)[..., :KV_LEN]
        seen = (whole == SEEN) | ((whole == ASK) & seen)
    found = attend(q, k, v, score_mod, mask_mod, states, 32, 16, SCALE)
    bias = table[h, i - j + KV_LEN] * factor[b]
    true = _dense(q, k, v, lambda x: 5 * torch.tanh(x / 5) + bias, seen)
    _agree(found, true, (q, k, v, table, factor))


def test_it_is_pytorchs():
    q, k, v = (x.detach() for x in _operands(torch.float32))
    offsets = torch.randn(HEADS)

    def score_mod(score, b, h, q_idx, kv_idx):
        return score * 0.5 + offsets[h] * (q_idx - kv_idx).abs()

    def mask_mod(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) | (kv_idx < 4)

    blocks = create_block_mask(mask_mod, None, None, Q_LEN, KV_LEN, device="cpu", BLOCK_SIZE=64)
    true, lse = flex_attention(
        q, k, v, score_mod, blocks, scale=SCALE, enable_gqa=True, return_lse=True
    )
    found = attend(q, k, v, score_mod, mask_mod, None, 1, 1, SCALE)
    torch.testing.assert_close(found, (true, lse), rtol=1e-5, atol=1e-5)


def test_one_batch_of_keys_serves_all():
    q, k, v = _operands()
    found = attend(q, k[:1], v[:1], None, None, None, 1, 1, SCALE)
    seen = torch.ones((), dtype=torch.bool).expand(BATCH, HEADS, Q_LEN, KV_LEN)
    same = [x[:1].expand(BATCH, -1, -1, -1) for x in (k, v)]
    _agree(found, _dense(q, *same, lambda x: x, seen), (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_it_computes_in_float32(dtype: torch.dtype):
    q, k, v = _operands(dtype)
    found = attend(q, k, v, None, None, None, 1, 1, SCALE)
    assert (found[0].dtype, found[1].dtype) == (dtype, torch.float32)
    wide = [x.double() for x in (q, k, v)]
    seen = torch.ones(BATCH, HEADS, Q_LEN, KV_LEN, dtype=torch.bool)
    true = _dense(*wide, lambda x: x, seen)
    step = max(torch.finfo(dtype).eps, 8 * torch.finfo(torch.float32).eps)  # sums of 140
    torch.testing.assert_close(found[0].double(), true[0], rtol=step, atol=step)
    torch.testing.assert_close(found[1].double(), true[1], rtol=1e-5, atol=1e-5)


def test_keys_that_are_not_listed_may_hold_anything():
    q, k, v = _operands()
    states = torch.full((1, 1, 2, 2), SEEN, dtype=torch.uint8)
    states[..., 1] = HIDDEN
    with torch.no_grad():
        k[:, :, 100:], v[:, :, 100:] = torch.nan, torch.inf
    found = attend(q, k, v, None, None, states, 100, 100, SCALE)
    rest = [x.detach()[:, :, :100].requires_grad_() for x in (k, v)]
    true = attend(q, *rest, None, None, None, 1, 1, SCALE)
    torch.testing.assert_close(found, true)
    gradients = torch.autograd.grad(found[0].sum(), (q, k, v))
    assert all(x.isfinite().all() for x in gradients)
    assert not gradients[1][:, :, 100:].any() and not gradients[2][:, :, 100:].any()


@pytest.mark.parametrize("listed", [False, True])
def test_what_is_hidden_needs_no_derivative(listed: bool):
    """As in PyTorch: padding is often 0, where a root has no derivative."""
    q, k, v = _operands()
    with torch.no_grad():
        k[:, :, 4:] = 0
    states = torch.tensor([1, 0], dtype=torch.uint8).expand(1, 1, 1, 2) if listed else None
    out, _ = attend(
        *(q, k, v),
        lambda s, b, h, q_idx, kv_idx: s.abs().sqrt(),
        None if listed else lambda b, h, q_idx, kv_idx: kv_idx < 4,
        *(states, 1 << 20, 4, 0.5),
    )
    for x in torch.autograd.grad(out.sum(), (q, k, v)):
        assert x.isfinite().all()


def test_rows_without_a_key():
    q, k, v = _operands()
    table = torch.randn(HEADS, dtype=torch.float64, requires_grad=True)
    out, lse = attend(
        q,
        k,
        v,
        lambda s, b, h, i, j: s + table[h],
        lambda b, h, i, j: (i > 5) & (j < 90),
        None,
        1,
        1,
        SCALE,
    )
    assert not out[:, :, :6].any() and (lse[:, :, :6] == -torch.inf).all()
    gradients = torch.autograd.grad(out.sum() + lse[:, :, 6:].sum(), (q, k, v, table))
    assert all(x.isfinite().all() for x in gradients) and not gradients[0][:, :, :6].any()


@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)])
def test_nothing_to_compute(sizes: tuple[int, int, int, int]):
    batch, heads, q_len, kv_len = sizes
    q = torch.randn(batch, heads, q_len, WIDTH, requires_grad=True)
    k = torch.randn(batch, heads, kv_len, WIDTH, requires_grad=True)
    out, lse = attend(q, k, k, lambda s, *_: s * 2, lambda b, h, i, j: i >= j, None, 1, 1, SCALE)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    assert not out.any() and (lse == -torch.inf).all()
    out.sum().backward()
    assert q.grad is not None and not q.grad.any()


def test_memory_is_that_of_a_block_of_queries():
    """What autograd keeps between forward and backward does not grow with L times S."""

    def kept(q_len: int) -> int:
        sizes = []
        q = torch.randn(1, 1, q_len, 8, requires_grad=True)
        k = torch.randn(1, 1, 512, 8, requires_grad=True)
        table = torch.randn(512, requires_grad=True)

        def pack(x: Tensor) -> Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            attend(q, k, k, lambda s, b, h, i, j: s.tanh() + table[j], None, None, 1, 1, SCALE)
        return sum(sizes)

    assert kept(1024) < 1024 * 512 / 4


def test_the_same_bits_each_time():
    q, k, v = _operands(torch.float32)
    table = torch.randn(HEADS, KV_LEN, requires_grad=True)

    def gradients() -> tuple[Tensor, ...]:
        out, _ = attend(q, k, v, lambda s, b, h, i, j: s + table[h, j], None, None, 1, 1, SCALE)
        return torch.autograd.grad(out.square().sum(), (q, k, v, table))

    for x, y in zip(gradients(), gradients()):
        assert torch.equal(x, y)


def test_on_mps():
    q, k, v = (x.detach().to("mps").requires_grad_() for x in _operands(torch.float32))
    table = torch.randn(HEADS, KV_LEN, device="mps", requires_grad=True)
    leaves = (q, k, v, table)
    out, lse = attend(
        q, k, v, lambda s, b, h, i, j: s + table[h, j], lambda b, h, i, j: i >= j,
        None, 1, 1, SCALE,
    )  # fmt: skip
    found = torch.autograd.grad(out.square().sum() + lse.sum(), leaves)
    q, k, v, table = (x.detach().cpu().double().requires_grad_() for x in leaves)
    bias, seen = table[:, None, :], _places()[2] >= _places()[3]
    true = _dense(q, k, v, lambda x: x + bias, seen)
    exact = torch.autograd.grad(true[0].square().sum() + true[1].sum(), (q, k, v, table))
    for x, y in zip((out, lse, *found), (*true, *exact)):
        torch.testing.assert_close(x.cpu().double(), y, rtol=1e-4, atol=1e-4)
