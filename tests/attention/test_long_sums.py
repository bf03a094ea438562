"""float32 dk and dv of many queries: the error of the sums follows the length of a part of them,
not the number of queries.

All weights are 1/8 and all gradients one number c, so that each dk and dv is one c/8 for each query
(and head of the group): a sum of one sign, whose roundings agree in sign. In one sum of n = 16384
terms, those behind the first half are each rounded from 1 + 2^-11 - 2^-23 to 1 (in units of c's
leading bit), which adds up to 2^-12 of the whole.

A sum of n terms of one sign, added one after the other in any order, is wrong by at most
(n - 1) 2^-24 of itself. A part has 1024 terms; then n / 1024 parts are added.
"""

from __future__ import annotations

import pytest
import torch

from orchard_ops import flash_attn

KEYS = 8
QUERIES = 16384
PART = 1024
U = 2.0**-24
#: Besides the sums: the exponential, the products with it, with scale and with dout.
ROUNDINGS = 8


@pytest.mark.parametrize(
    ("head_dim", "heads", "q_len"),
    [
        pytest.param(16, 1, QUERIES, id="one head"),
        pytest.param(15, 1, QUERIES, id="rows without chunks"),
        pytest.param(16, 8, QUERIES // 8 + 1, id="a group"),
        pytest.param(16, 64, QUERIES // 64 - 1, id="a group of short heads"),
        pytest.param(96, 4, QUERIES // 4, id="pairs"),
    ],
)
def test_gradients_of_keys(head_dim: int, heads: int, q_len: int):
    c = 1 + 2.0**-11 - 2.0**-23
    q = torch.ones(1, heads, q_len, head_dim)
    k = torch.zeros(1, 1, KEYS, head_dim)
    v = torch.zeros(1, 1, KEYS, head_dim)
    v[..., 0] = torch.tensor([1.0, -1.0]).repeat(KEYS // 2)  # out is zero, and so is delta
    q, k, v = (x.to("mps").requires_grad_() for x in (q, k, v))
    out = flash_attn(q, k, v, scale=1.0, enable_gqa=True)
    _, dk, dv = torch.autograd.grad(out, (q, k, v), torch.full_like(out, c))

    queries = heads * q_len
    bound = (PART + queries / PART + ROUNDINGS) * U
    expected_dv = torch.full((KEYS, head_dim), c / KEYS * queries, dtype=torch.float64)
    expected_dk = expected_dv * v.detach().cpu().double()[0, 0, :, :1]  # dS is c/8 or -c/8
    for name, found, expected in (("dk", dk, expected_dk), ("dv", dv, expected_dv)):
        error = (found.cpu().double()[0, 0] / expected - 1).abs().max().item()
        assert error <= bound, f"{name}: {error / U:.0f} roundings, at most {bound / U:.0f}"


@pytest.mark.parametrize(
    ("mask_shape", "batch", "q_len", "head_dim", "softcap", "terms"),
    [
        pytest.param((1, 1, 8, KEYS), 16384, 8, 16, 0.0, 14, id="many heads"),
        pytest.param((1, 1, 1, KEYS), 1, 65536, 16, 0.0, 11, id="queries, by the key's side"),
        pytest.param((1, 1, 1, KEYS), 1, 65536, 96, 9.0, 11, id="queries, computed again"),
        pytest.param((1, 1, 1, KEYS), 16384, 1, 16, 0.0, 14, id="heads of a bias of keys"),
    ],
)
def test_gradients_of_masks(
    mask_shape: tuple[int, ...], batch: int, q_len: int, head_dim: int, softcap: float, terms: int
):
    """The same for a mask's gradient, where one sum would have 2^`terms` terms.

    Those behind the first half would be rounded to 1 from nearly 1 + 2^(terms - 25), half a unit in
    the last place of the sum: that adds up to 2^(terms - 2) roundings of the whole.
    """
    c = 1 + 2.0 ** (terms - 25) - 2.0**-20
    q, k = torch.ones(batch, 1, q_len, head_dim), torch.zeros(batch, 1, KEYS, head_dim)
    v = torch.zeros(batch, 1, KEYS, head_dim)
    v[..., 0] = torch.tensor([1.0, -1.0]).repeat(KEYS // 2)
    mask = torch.zeros(mask_shape, device="mps", requires_grad=True)
    q, k, v = (x.to("mps") for x in (q, k, v))
    out = flash_attn(q, k, v, mask, scale=1.0, softcap=softcap)
    (dmask,) = torch.autograd.grad(out, mask, torch.full_like(out, c))

    shared = batch * (q_len if mask_shape[2] == 1 else 1)
    expected = v.cpu().double()[0, 0, :, 0] * (c / KEYS * shared)
    error = (dmask.cpu().double() / expected - 1).abs().max().item()
    assert error <= 160 * U, f"{error / U:.0f} roundings, at most 160"
