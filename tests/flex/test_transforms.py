"""torch.func's transforms of `flex_attention`: by its operands, and by what its mods capture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import orchard_ops

pytestmark = pytest.mark.usefixtures("fresh_stats")


def some(device: str, *shape: int) -> Tensor:
    return torch.randn(shape or (1, 2, 20, 8)).to(device)


def metal() -> dict[str, int]:
    return {name: n for name, n in orchard_ops.stats().metal.items() if n}


def attend(mod: Any, q: Tensor) -> Tensor:
    return orchard_ops.flex_attention(q, q, q, mod)


@pytest.mark.parametrize("device", ("cpu", "mps"))
def test_transforms_of_torch_func(device: str, quiet_fallback: None):
    q, gain = some(device), torch.tensor([0.5, 2.0]).to(device)

    def loss(q: Tensor) -> Tensor:
        out = orchard_ops.flex_attention(q, q, q, lambda score, b, h, *_: score * gain[h])
        return out.sin().sum()

    leaf = q.clone().requires_grad_()
    (right,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(q), right)
    assert ("flex_attn_bwd" in metal()) == (device != "cpu")
    each = torch.vmap(loss)(torch.stack([q, 2.0 * q]))
    torch.testing.assert_close(each, torch.stack([loss(q), loss(2.0 * q)]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_followed", (True, False), ids=("followed", "a property"))
@pytest.mark.parametrize("device", ("cpu", "mps"))
def test_transforms_of_torch_func_by_what_a_mod_captures(
    device: str, is_followed: bool, quiet_fallback: None
):
    """A trace has the tensors within the transforms, of which they hear nothing."""
    q, gains = some(device), torch.tensor([[0.5, 2.0], [1.0, -0.3]]).to(device)

    class Asked:
        def __init__(self, gain: Tensor) -> None:
            self.kept = gain

        @property
        def gain(self) -> Tensor:
            return self.kept

    def loss(gain: Tensor) -> Tensor:
        asked = Asked(gain)
        if is_followed:
            out = attend(lambda score, b, h, *_: score * gain[h], q)
        else:
            out = attend(lambda score, b, h, *_: score * asked.gain[h], q)
        return out.sin().sum()

    leaves = [gain.clone().requires_grad_() for gain in gains]
    losses = [loss(x) for x in leaves]
    right = torch.stack([torch.autograd.grad(one, x)[0] for one, x in zip(losses, leaves)])
    assert right.abs().min() > 1e-3
    torch.testing.assert_close(torch.vmap(loss)(gains), torch.stack(losses).detach())
    grads = torch.stack([torch.func.grad(loss)(gain) for gain in gains])
    torch.testing.assert_close(grads, right, rtol=1e-4, atol=1e-5)
    each = torch.vmap(torch.func.grad(loss))(gains)
    torch.testing.assert_close(each, right, rtol=1e-4, atol=1e-5)
    tangent = torch.func.jvp(loss, (gains[0],), (torch.ones_like(gains[0]),))[1]
    torch.testing.assert_close(tangent, right[0].sum(), rtol=1e-4, atol=1e-5)


def test_a_mask_of_documents_stays_on_metal_within_torch_func():
    """torch.func.grad wraps all arguments; a mask has no gradient that could be lost."""
    documents = torch.tensor([0] * 7 + [1] * 13).to("mps")

    def loss(q: Tensor, documents: Tensor) -> Tensor:
        mask = create_block_mask(
            lambda b, h, q_idx, kv_idx: documents[q_idx] == documents[kv_idx],
            *(None, None, 20, 20),
            device="mps",
        )
        return orchard_ops.flex_attention(q, q, q, block_mask=mask).sin().sum()

    q = some("mps")
    leaf = q.clone().requires_grad_()
    (right,) = torch.autograd.grad(loss(leaf, documents), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(q, documents), right)
    assert orchard_ops.stats().reference == {}


def test_several_gradients_of_one_output_at_once():
    """jacrev maps the backward alone, which stays on Metal."""
    q, gain = some("mps"), torch.tensor([0.5, 2.0]).to("mps")

    def out(x: Tensor) -> Tensor:
        return attend(lambda score, b, h, *_: score * gain[h], x)

    leaf = q.clone().requires_grad_()
    result, douts = out(leaf), torch.randn(3, *q.shape).to("mps")
    right = [torch.autograd.grad(result, leaf, x, retain_graph=True)[0] for x in douts]
    vjp = torch.func.vjp(out, q)[1]
    assert torch.equal(torch.vmap(vjp)(douts)[0], torch.stack(right))
    none = torch.empty(0, *q.shape).to("mps")
    assert torch.vmap(vjp)(none)[0].shape == none.shape
    with pytest.raises(NotImplementedError, match="is_grads_batched=True is not"):
        torch.autograd.grad(result, leaf, douts, is_grads_batched=True)
    jacobian = torch.func.jacrev(lambda x: out(x)[0, 1, 2, :3])(q)
    for n in range(3):
        (row,) = torch.autograd.grad(out(leaf)[0, 1, 2, n], leaf)
        assert torch.equal(jacobian[n], row)
    assert orchard_ops.stats().reference == {}
