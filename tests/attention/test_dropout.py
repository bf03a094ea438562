"""Dropout: one function of seed and position, the same bits in Metal and in the reference."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import SEED, Case, run

import orchard_ops
from orchard_ops import dropout

# Known answers of Philox4x32-10, from the Random123 distribution (kat_vectors).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        0xFFFFFFFF_FFFFFFFF,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0_A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, seed, expected", KNOWN_ANSWERS)
def test_philox_known_answers(counter: tuple[int, ...], seed: int, expected: tuple[int, ...]):
    words = dropout.philox_4x32(tuple(torch.tensor(c) for c in counter), seed)
    assert tuple(int(w) for w in words) == expected


def _metal_forward_mask(p: float, batch: int, heads: int, q_len: int, kv_len: int) -> torch.Tensor:
    """With q = k = 0 every weight is 1 / S; one-hot value rows show 64 weights at a time."""
    case = Case(q_len, kv_len, 64, batch=batch, num_heads=heads, num_kv_heads=1, dropout_p=p)
    q = torch.zeros(batch, heads, q_len, 64, device="mps")
    k = torch.zeros(batch, 1, kv_len, 64, device="mps")
    parts = []
    for j in range(0, kv_len, 64):
        v = torch.zeros(kv_len, 64)
        width = min(64, kv_len - j)
        v[j : j + width, :width] = torch.eye(width)
        v = v.expand(batch, 1, kv_len, 64).contiguous().to("mps")
        out, _ = torch.ops.orchard.flash_attn_fwd(q, k, v, *case.scoring(), "metal")
        parts.append(out[..., :width].cpu())
    weights = torch.cat(parts, dim=-1)
    kept = weights > 0
    torch.testing.assert_close(
        weights[kept], torch.tensor(dropout.rescale(p) / kv_len).expand(int(kept.sum()))
    )
    return kept


SHAPES = [(2, 3, 37, 150), (1, 2, 100, 33), (1, 1, 1, 1), (2, 1, 130, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("p", (0.1, 0.5, 0.9))
def test_forward_mask_is_the_references(p: float, shape: tuple[int, int, int, int]):
    expected = orchard_ops.dropout_mask(SEED, p, shape)
    assert torch.equal(_metal_forward_mask(p, *shape), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_masks_are_the_references(shape: tuple[int, int, int, int]):
    """dv and dq are linear in the dropped weights: one-hot operands show them one by one."""
    batch, heads, q_len, kv_len = shape
    p = 0.4
    case = Case(q_len, kv_len, 256, batch=batch, num_heads=heads, num_kv_heads=heads, dropout_p=p)
    expected = orchard_ops.dropout_mask(SEED, p, shape)
    zeros_q = torch.zeros(batch, heads, q_len, 256, device="mps")
    zeros_k = torch.zeros(batch, heads, kv_len, 256, device="mps")

    # dV = drop(P)^T dO with dO one-hot by query row.
    do = torch.eye(q_len, 256).expand(batch, heads, q_len, 256).contiguous().to("mps")
    dv = run(case, zeros_q, zeros_k, zeros_k, do)[4].cpu()[..., :q_len]
    assert torch.equal(dv.transpose(-1, -2) > 0, expected)

    # dQ = scale * dS K with K one-hot by key, scores still 0: dS = P (keep * rescale * dP - delta).
    do = torch.zeros(batch, heads, q_len, 256)
    do[..., 0] = 1.0
    v = torch.zeros(batch, heads, kv_len, 256)
    v[..., 0] = 1.0
    k = torch.eye(kv_len, 256).expand(batch, heads, kv_len, 256).contiguous().to("mps")
    case = case.but(scale=1.0)
    results = run(case, zeros_q, k, v.to("mps"), do.to("mps"))
    kept_fraction = expected.double().mean(-1, keepdim=True) * dropout.rescale(p)
    mixed = (kept_fraction > 0).expand(expected.shape)  # a row without kept weights shows nothing
    ds = results[2].cpu()[..., :kv_len] * kv_len + kept_fraction
    assert torch.equal((ds > 0.5)[mixed], expected[mixed])


def test_fallback_keeps_the_mask():
    case = Case(50, 70, 64, dropout_p=0.3)
    operands = [x.to("mps") for x in case.operands()]
    metal, reference = run(case, *operands), run(case, *operands, impl="reference")
    for a, b in zip(metal, reference):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("p", (0.01, 0.1, 0.5, 0.9))
def test_share_of_dropped_weights(p: float):
    kept = orchard_ops.dropout_mask(7, p, (4, 4, 256, 256)).double()
    n = kept.numel()
    assert abs((1 - kept.mean().item()) - p) < 5 * math.sqrt(p * (1 - p) / n) + 2**-17
    # Neighbours and the elements that share a Philox block are uncorrelated.
    centred = kept - kept.mean()
    variance = centred.square().mean()
    for dim, shift in ((2, 1), (3, 1), (2, 8), (3, 8), (0, 1), (1, 1)):
        correlation = (centred * centred.roll(shift, dim)).mean() / variance
        assert abs(correlation) < 5 / math.sqrt(n)


def test_mask_block_is_a_window_of_the_whole_mask():
    whole = orchard_ops.dropout_mask(3, 0.3, (1, 2, 100, 90))
    part = dropout.keep_block(3, 0.3, 1, 2, (19, 77), (5, 71))
    assert torch.equal(part, whole[:, :, 19:77, 5:71])


@pytest.mark.parametrize("p, expected", [(0.0, 0), (2**-16, 1), (0.5, 32768), (1 - 2**-20, 65535)])
def test_threshold_is_rounded_to_its_resolution(p: float, expected: int):
    assert dropout.threshold(p) == expected
    assert dropout.rescale(p) == 65536 / (65536 - expected)


def test_the_seed_follows_the_cpu_generator():
    q = torch.randn(1, 2, 20, 16, device="mps")

    def call() -> torch.Tensor:
        return torch.ops.orchard.flash_attn(q, q, q, dropout_p=0.5).cpu()

    torch.manual_seed(11)
    first, second = call(), call()
    torch.manual_seed(11)
    assert torch.equal(call(), first)
    assert not torch.equal(first, second)


def test_no_seed_is_drawn_without_dropout():
    q = torch.randn(1, 2, 20, 16)
    state = torch.get_rng_state()
    orchard_ops.flash_attn(q, q, q)
    orchard_ops.explain(q, q, q, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), state)
