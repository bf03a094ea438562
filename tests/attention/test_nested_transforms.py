"""torch.func transforms inside each other: first order is exact, second order is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.func import grad, grad_and_value, jacrev, jvp, vjp

import orchard_ops

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def math(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v


def operands(device: str) -> list[torch.Tensor]:
    return [torch.randn(1, 2, n, 8).to(device) for n in (5, 6, 6)]


def value_of_an_inner_gradient(at: Attention, q, k, v):
    return grad(lambda a: grad_and_value(lambda b: at(a, b, v).square().sum())(k)[1])(q)


def autograd_through_the_value(at: Attention, q, k, v):
    a = q.clone().requires_grad_()
    value = grad_and_value(lambda b: at(a, b, v).square().sum())(k)[1]
    return torch.autograd.grad(value, a)[0]


def autograd_through_aux(at: Attention, q, k, v):
    a = q.clone().requires_grad_()

    def inner(b):
        out = at(a, b, v)
        return out.sum(), out

    return torch.autograd.grad(grad(inner, has_aux=True)(k)[1].square().sum(), a)[0]


def autograd_through_the_primal(at: Attention, q, k, v):
    a = q.clone().requires_grad_()
    out, _ = vjp(lambda b: at(a, b, v), k)
    return torch.autograd.grad(out.square().sum(), a)[0]


def gradient_of_a_tangent_beside(at: Attention, q, k, v):
    one = torch.ones((), device=q.device)
    return grad(lambda a: jvp(lambda s: at(a, k, v).square().sum() * s, (one,), (one,))[1])(q)


FIRST = (
    value_of_an_inner_gradient,
    autograd_through_the_value,
    autograd_through_aux,
    autograd_through_the_primal,
    gradient_of_a_tangent_beside,
)


@pytest.mark.parametrize("device", ("cpu", "mps"))
@pytest.mark.parametrize("pattern", FIRST, ids=lambda f: f.__name__)
def test_first_order(pattern: Callable, device: str):
    q, k, v = operands(device)
    expected = pattern(math, q.cpu(), k.cpu(), v.cpu())
    assert expected.abs().max() > 0.01  # the fault's answer was 0
    actual = pattern(orchard_ops.flash_attn, q, k, v)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-4, atol=1e-5)


SECOND = {
    "grad(grad)": lambda at, q, k, v: grad(
        lambda b: grad(lambda a: at(a, k, v).square().sum())(b).square().sum()
    )(q),
    "jvp(grad)": lambda at, q, k, v: jvp(
        grad(lambda a: at(a, k, v).square().sum()), (q,), (torch.ones_like(q),)
    ),
    "vjp(grad)": lambda at, q, k, v: vjp(grad(lambda a: at(a, k, v).square().sum()), q)[1](q),
    "jacrev(grad)": lambda at, q, k, v: jacrev(grad(lambda a: at(a, k, v).square().sum()))(q),
}


@pytest.mark.parametrize("device", ("cpu", "mps"))
@pytest.mark.parametrize("name", SECOND)
def test_second_order_is_refused(name: str, device: str):
    with pytest.raises(NotImplementedError, match="not implemented"):
        SECOND[name](orchard_ops.flash_attn, *operands(device))
