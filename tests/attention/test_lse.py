"""The public lse is unit * (origin + log_sum), rounded once."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

import orchard_ops
from orchard_ops.ops.schema import public_lse
from orchard_ops.testing import DTYPES, Case

LN2 = math.log(2.0)
EXACT_LN2 = Fraction(LN2) + Fraction(2.3190468138462996e-17)
LOWEST = torch.finfo(torch.float32).min
DEVICES = ("cpu", "mps")


def _draw(n: int, power: int) -> Tensor:
    return torch.randn(n) * 2.0**power


PAIRS = {  # origin, log_sum
    "usual": lambda n: (_draw(n, 3), torch.rand(n) * 12.0),
    "equal_scores": lambda n: (torch.zeros(n), torch.rand(n) * 15.0),
    "one_key": lambda n: (_draw(n, 2), torch.zeros(n)),
    "cancelling": lambda n: (-torch.rand(n) * 10.0, torch.rand(n) * 10.0),
    "far_origin": lambda n: (_draw(n, 6), _draw(n, 7)),
    "large": lambda n: (_draw(n, 20), torch.rand(n) * 12.0),
    "huge": lambda n: (_draw(n, 124).clamp(LOWEST, -LOWEST), torch.rand(n) * 12.0),
    "any_power": lambda n: (_draw(n, 0) * torch.exp2(torch.randint(-40, 80, (n,))), _draw(n, 1)),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("device", DEVICES)
def test_one_rounding_in_float32(device: str, name: str):
    row_stats = torch.stack(PAIRS[name](200_000), dim=-1)
    exact = row_stats.double().sum(-1) * LN2
    ulp = torch.exp2(exact.abs().clamp(min=2.0**-126).log2().floor() - 23)
    lse = public_lse(row_stats.to(device), LN2).cpu()
    assert lse.dtype == torch.float32
    error = ((lse.double() - exact) / ulp).abs().max().item()
    assert error <= 0.51, f"{error} units in the last place"


def test_one_rounding_in_float64():
    origin = torch.randn(2000, dtype=torch.float64) * 100.0
    row_stats = torch.stack((origin, torch.rand_like(origin) * 12.0), dim=-1)
    for pair, x in zip(row_stats.tolist(), public_lse(row_stats, LN2).tolist()):
        exact = (Fraction(pair[0]) + Fraction(pair[1])) * EXACT_LN2
        assert abs(Fraction(x) - exact) <= Fraction(0.51) * Fraction(math.ulp(x))


@pytest.mark.parametrize("unit", (1.0, LN2))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_infinite_and_huge_rows(dtype: torch.dtype, unit: float):
    lowest = torch.finfo(dtype).min
    pairs = (
        (lowest, -math.inf), (-math.inf, 0.0), (math.inf, 0.0), (math.inf, 3.0),
        (lowest, 0.0), (-lowest, 0.0), (lowest, 5.0), (0.0, 0.0), (-0.0, 0.0),
    )  # fmt: skip
    row_stats = torch.tensor(pairs, dtype=dtype)
    expected = row_stats.sum(-1) * unit
    lse = public_lse(row_stats, unit)
    assert torch.equal(lse[:4], expected[:4])
    torch.testing.assert_close(lse, expected, rtol=torch.finfo(dtype).eps, atol=0.0)
    assert public_lse(torch.tensor([[math.nan, 0.0]], dtype=dtype), unit).isnan().all()


@pytest.mark.parametrize("unit", (1.0, LN2))
def test_natural_units_are_the_sum_alone(unit: float):
    row_stats = torch.randn(2, 3, 5, 2)
    assert unit != 1.0 or torch.equal(public_lse(row_stats, unit), row_stats.sum(-1))
    assert public_lse(row_stats, unit).shape == (2, 3, 5)
    assert public_lse(row_stats[:, :, :0], unit).shape == (2, 3, 0)


@pytest.mark.parametrize("unit", (1.0, LN2))
def test_derivative_is_that_of_sum_and_product(unit: float):
    """To the bit, also where a row is infinite; under torch.func and vmap too."""
    row_stats = torch.randn(4, 5, 2)
    row_stats[0, 0] = torch.tensor([LOWEST, -math.inf])
    dlse = torch.randn(4, 5)
    expected = (dlse * unit).unsqueeze(-1).expand(4, 5, 2)
    leaf = row_stats.clone().requires_grad_()
    (found,) = torch.autograd.grad(public_lse(leaf, unit), leaf, dlse)
    assert torch.equal(found, expected)
    lse, pull = torch.func.vjp(lambda x: public_lse(x, unit), row_stats)
    assert torch.equal(pull(dlse)[0], expected)
    assert torch.equal(lse, public_lse(row_stats, unit))
    assert torch.equal(torch.vmap(lambda x: public_lse(x, unit))(row_stats), lse)


def test_compiled():
    row_stats = torch.randn(1000, 2) * 30.0
    compiled = torch.compile(public_lse, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(row_stats, LN2), public_lse(row_stats, LN2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("quiet_fallback")
def test_a_sink_that_has_all_the_weight_is_lse(device: str, dtype: torch.dtype):
    """Exactly: it is not rounded to powers of two."""
    q, k, v, _ = (x.to(device) for x in Case(9, 11, 16, num_heads=4, num_kv_heads=4).operands())
    sinks = torch.tensor([1e3, 12345.678, 3e4, 54321.0]).to(dtype)
    q, k, v, sinks = q.to(dtype), k.to(dtype), v.to(dtype), sinks.to(device)
    _, lse = orchard_ops.flash_attn(q, k, v, sinks=sinks, return_lse=True)
    assert torch.equal(lse, sinks.float().view(1, 4, 1).expand(1, 4, 9))


@pytest.mark.parametrize("kv_len, head_dim", ((1, 256), (1, 128), (2, 128), (3, 64)))
def test_few_products_are_summed_as_well_as_many(kv_len: int, head_dim: int):
    """The lse of one key is its score. BLAS sums few products one after another."""
    q, k = torch.randn(3000, 1, 1, head_dim), torch.randn(3000, 1, kv_len, head_dim)
    keys = k[..., :1, :]
    _, lse = orchard_ops.flash_attn(q, k, k, scale=1.0, is_causal=True, return_lse=True)
    exact = (q.double() * keys.double()).sum(-1)
    size = (q * keys).abs().sum(-1)
    error = ((lse - exact).abs() / size).max().item() * 2.0**24
    assert error <= 2.0, f"{error} roundings at the size of the terms"
