"""Which calls stay PyTorch's while F.scaled_dot_product_attention is taken over."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from sdpa_calls import left_to_pytorch, on_metal, operands, same
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, causal_lower_right, causal_upper_left
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import orchard_ops

pytestmark = pytest.mark.usefixtures("fresh_stats")


@pytest.mark.parametrize(
    ("backends", "ours"),
    (
        (SDPBackend.MATH, False),
        (SDPBackend.EFFICIENT_ATTENTION, False),
        ([SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION], False),
        (SDPBackend.FLASH_ATTENTION, True),
        ([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], True),
    ),
    ids=str,
)
@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
def test_sdpa_kernel(backends: object, ours: bool, compiled: bool):
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backends):
            return F.scaled_dot_product_attention(q, k, v)

    torch.compiler.reset()
    function = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
    leaves = operands()
    expected = F.scaled_dot_product_attention(*leaves)
    with orchard_ops.sdpa():
        out = function(*leaves)
    same(out, expected)
    out.sum().backward()
    if ours:
        on_metal(1, 1)
    else:
        reason = (
            "sdpa_kernel or torch.backends.cuda.enable_flash_sdp does not allow "
            "SDPBackend.FLASH_ATTENTION"
        )
        assert set(left_to_pytorch()) == {reason}


CALLS_DIFFERENTIATED_TWICE: dict[str, dict] = {
    "causal": {"is_causal": True},
    "bool mask": {"attn_mask": torch.tensor([[True, False, True]]).repeat(9, 3)},
    "bias": {"bias": (2, 1, 9, 9)},
    "scale": {"scale": 0.4},
    "bias that repeats in the batch": {"bias": (1, 2, 1, 9, 9), "batch": (3, 2)},
}


@pytest.mark.parametrize("name", CALLS_DIFFERENTIATED_TWICE)
def test_second_derivatives(name: str):
    options = dict(CALLS_DIFFERENTIATED_TWICE[name])
    bias, batch = options.pop("bias", None), options.pop("batch", (2,))
    x, k = torch.randn(*batch, 2, 9, 8), torch.randn(*batch, 2, 9, 8)
    tensors = [x, k, *([torch.randn(bias)] if bias else [])]

    def both_derivatives(device: str) -> list[Tensor]:
        leaves = [t.to(device).requires_grad_() for t in tensors]
        arguments = {n: t.to(device) if n == "attn_mask" else t for n, t in options.items()}
        if bias:
            arguments["attn_mask"] = leaves[2]
        # One tensor is the query and the value.
        out = F.scaled_dot_product_attention(leaves[0], leaves[1], leaves[0], **arguments)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        penalty = torch.stack([g.square().sum() for g in first]).sum()
        return [*first, *torch.autograd.grad(penalty, leaves)]

    with sdpa_kernel(SDPBackend.MATH):
        expected = both_derivatives("cpu")
    with orchard_ops.sdpa():
        found = both_derivatives("mps")
    for y, z in zip(found, expected, strict=True):
        torch.testing.assert_close(y.detach().cpu(), z.detach(), rtol=1e-3, atol=1e-3)
    stats = orchard_ops.stats()
    # The last backward is Metal's, as nobody differentiates it.
    assert stats.metal == {"flash_attn_fwd": 1, "flash_attn_bwd": 1} and stats.reference == {}
    assert stats.left_to_pytorch == {"a backward with create_graph=True": 1}


def test_a_gradient_penalty_inside_autocast():
    q, k, v = (x.detach().to("mps").requires_grad_() for x in torch.randn(3, 1, 2, 8, 16))
    found = []
    for block in (orchard_ops.sdpa(), contextlib.nullcontext()):
        with block, torch.autocast("mps", torch.float16):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            (dq,) = torch.autograd.grad(out.float().square().sum(), q, create_graph=True)
            found.append(torch.autograd.grad(dq.float().square().sum(), (q, k, v)))
    for x, y in zip(*found):
        torch.testing.assert_close(x, y, rtol=0.02, atol=0.02 * y.abs().max().item())
    assert orchard_ops.stats().left_to_pytorch["a backward with create_graph=True"] > 0


def test_second_derivatives_see_the_forwards_dropout():
    def gradients(create_graph: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(4)
        leaves = operands()
        out = F.scaled_dot_product_attention(*leaves, dropout_p=0.5)
        return torch.autograd.grad(out.square().sum(), leaves, create_graph=create_graph)

    with orchard_ops.sdpa():
        for x, y in zip(gradients(True), gradients(False)):
            assert x.requires_grad and not y.requires_grad
            same(x, y)


def test_torch_func_differentiates_twice():
    x = torch.randn(1, 2, 5, 8)

    def loss(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True).square().sum()

    def penalty(x: Tensor) -> Tensor:
        return torch.func.grad(loss)(x).square().sum()

    with sdpa_kernel(SDPBackend.MATH):
        wanted = torch.func.grad(penalty)(x)
    there = x.to("mps").requires_grad_()
    with orchard_ops.sdpa():
        found = torch.func.grad(penalty)(there.detach())
        (also,) = torch.autograd.grad(penalty(there), there)  # plain autograd outside
    for y in (found, also):
        torch.testing.assert_close(y.cpu(), wanted, rtol=1e-3, atol=1e-3)
    assert left_to_pytorch() == {"nested transforms of torch.func may differentiate twice": 2}


class Seen(Tensor):
    """A subclass that notes the operators it sees."""

    operators: ClassVar[list[str]] = []

    @staticmethod
    def __new__(cls, inner: Tensor) -> Tensor:
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, requires_grad=False
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        cls.operators.append(function.name())
        args, kwargs = torch.utils._pytree.tree_map_only(
            Seen, lambda x: x.inner, (args, kwargs or {})
        )
        return torch.utils._pytree.tree_map_only(Tensor, Seen, function(*args, **kwargs))


def test_a_subclass_sees_the_operators_of_pytorch():
    q, k, v = (x.detach() for x in operands())
    seen = []
    for block in (False, True):
        Seen.operators.clear()
        if block:
            with orchard_ops.sdpa():
                out = F.scaled_dot_product_attention(Seen(q), Seen(k), Seen(v))
        else:
            out = F.scaled_dot_product_attention(Seen(q), Seen(k), Seen(v))
        seen.append(list(Seen.operators))
        same(out.inner, F.scaled_dot_product_attention(q, k, v))
    assert seen[0] == seen[1] and seen[0]
    reason = "a tensor is of a subclass that sees PyTorch's operators"
    assert left_to_pytorch() == {reason: 1}


def test_a_subclass_without_operators_of_its_own_is_a_plain_tensor():
    class Named(Tensor):
        pass

    q, k, v = (x.detach() for x in operands())
    expected = F.scaled_dot_product_attention(q, k, v)
    with orchard_ops.sdpa():
        out = F.scaled_dot_product_attention(q.as_subclass(Named), k, v)
    assert type(out) is Named
    same(out.as_subclass(Tensor), expected)
    on_metal(1, 0)


def jagged(x: Tensor) -> Tensor:
    lengths = (9, 5)
    rows = [x[i, :, :n].transpose(0, 1) for i, n in enumerate(lengths)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged).transpose(1, 2)


OTHERS: dict[str, Callable[[list[Tensor]], object]] = {
    "heads": lambda x: F.scaled_dot_product_attention(x[0], x[1][:, :1].repeat(1, 3, 1, 1), x[2]),
    "head_dim": lambda x: F.scaled_dot_product_attention(x[0], x[1][..., :4], x[2]),
    "dtypes": lambda x: F.scaled_dot_product_attention(x[0].half(), x[1], x[2]),
    "integers": lambda x: F.scaled_dot_product_attention(*(y.long() for y in x)),
    "mask of a wrong shape": lambda x: F.scaled_dot_product_attention(*x, x[0][..., 0]),
    "mask of more batches": lambda x: F.scaled_dot_product_attention(
        *(y[0] for y in x), torch.ones(3, 1, 9, 9, device="mps")
    ),
    "mask of integers": lambda x: F.scaled_dot_product_attention(
        *x, torch.ones(9, 9, dtype=torch.long, device="mps")
    ),
    "dropout": lambda x: F.scaled_dot_product_attention(*x, dropout_p=1.5),
    "forward mode": lambda x: torch.func.jvp(
        lambda y: F.scaled_dot_product_attention(y, y, y), (x[0].detach(),), (x[0].detach(),)
    ),
    "mask and causal": lambda x: F.scaled_dot_product_attention(
        *x, torch.ones(9, 9, dtype=torch.bool, device="mps"), is_causal=True
    ),
    "devices": lambda x: F.scaled_dot_product_attention(x[0], x[1].cpu(), x[2]),
    "nested": lambda x: F.scaled_dot_product_attention(*map(jagged, (y.detach() for y in x))),
    "query of words": lambda x: F.scaled_dot_product_attention("q", x[1], x[2]),
}


@pytest.mark.usefixtures("quiet_fallback")
@pytest.mark.parametrize("name", OTHERS)
def test_what_pytorch_refuses_or_does_otherwise(name: str):
    """The errors have PyTorch's words; some of these calls it computes, as operands of two
    dtypes."""
    call = OTHERS[name]

    def outcome() -> tuple[type, str] | object:
        try:
            return call(operands())
        except Exception as error:
            return type(error), str(error).splitlines()[0]

    torch.manual_seed(1)
    expected = outcome()
    torch.manual_seed(1)
    with orchard_ops.sdpa():
        found = outcome()
    assert type(found) is type(expected)
    if isinstance(expected, tuple):
        assert found == expected
        assert "orchard" not in expected[1]
    else:
        same(found, expected)
    left_to_pytorch()


def test_a_call_that_only_pytorch_takes_is_said():
    q, k, v = operands()
    expected = F.scaled_dot_product_attention(q.half(), k, v)
    with (
        orchard_ops.sdpa(),
        pytest.warns(orchard_ops.OrchardFallbackWarning, match="does not take such arguments"),
    ):
        same(F.scaled_dot_product_attention(q.half(), k, v), expected)
    assert len(left_to_pytorch()) == 1


@pytest.mark.parametrize("device", ("cpu", "meta"))
def test_other_devices(device: str):
    x = torch.randn(2, 2, 9, 16, device=device)
    expected = F.scaled_dot_product_attention(x, x, x)
    with orchard_ops.sdpa():
        out = F.scaled_dot_product_attention(x, x, x)
        grad = torch.func.grad(lambda y: F.scaled_dot_product_attention(y, y, y).sum())(x)
        batched = torch.vmap(lambda y: F.scaled_dot_product_attention(y, y, y))(x[None])
    assert out.shape == grad.shape == batched[0].shape == expected.shape
    if device == "cpu":
        assert torch.equal(out, expected)
        same(batched[0], expected)
    assert left_to_pytorch() == {}


def test_fake_tensors_have_the_strides_of_the_real_ones():
    from torch._subclasses.fake_tensor import FakeTensorMode

    q = torch.randn(2, 9, 4, 16, device="mps").transpose(1, 2)
    with orchard_ops.sdpa():
        real = F.scaled_dot_product_attention(q, q, q)
        with FakeTensorMode() as mode:
            fake = mode.from_tensor(q)
            out = F.scaled_dot_product_attention(fake, fake, fake)
    assert (out.shape, out.stride()) == (real.shape, real.stride())


# ---- calls that no Metal kernel takes -----------------------------------------------------------


def test_heads_wider_than_any_kernel(monkeypatch: pytest.MonkeyPatch):
    leaves = operands(head_dim=272)
    expected = F.scaled_dot_product_attention(*leaves)
    with orchard_ops.sdpa():
        with pytest.warns(
            orchard_ops.OrchardFallbackWarning, match="head_dim is above 256"
        ) as seen:
            for _ in range(2):
                out = F.scaled_dot_product_attention(*leaves)
        assert len(seen) == 1 and seen[0].filename == __file__
        same(out, expected)
        assert left_to_pytorch() == {"head_dim is above 256": 2}
        monkeypatch.setenv("ORCHARD_STRICT", "1")
        with pytest.raises(RuntimeError, match="head_dim is above 256"):
            F.scaled_dot_product_attention(*leaves)


def test_metal_switched_off(monkeypatch: pytest.MonkeyPatch):
    leaves = operands()
    expected = F.scaled_dot_product_attention(*leaves)
    monkeypatch.setenv("ORCHARD_DISABLE_METAL", "1")
    with (
        orchard_ops.sdpa(),
        pytest.warns(orchard_ops.OrchardFallbackWarning, match="ORCHARD_DISABLE_METAL"),
    ):
        same(F.scaled_dot_product_attention(*leaves), expected)
    assert left_to_pytorch() == {"ORCHARD_DISABLE_METAL is set": 1}


# ---- CausalBias ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", (causal_upper_left, causal_lower_right))
@pytest.mark.parametrize("lengths", ((9, 9), (5, 9), (9, 5)), ids=str)
def test_causal_bias(bias: Callable[..., Tensor], lengths: tuple[int, int]):
    q, k, v = (torch.randn(2, 2, n, 16) for n in (lengths[0], lengths[1], lengths[1]))
    mask = bias(*lengths)
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(q, k, v, mask)
    with orchard_ops.sdpa():
        out = F.scaled_dot_product_attention(q.to("mps"), k.to("mps"), v.to("mps"), mask)
    same(out, expected)
    on_metal(1, 0)


def made_shapes(function: Callable[[], object]) -> set[tuple[int, ...]]:
    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            shapes.update({tuple(result.shape)} if isinstance(result, Tensor) else ())
            return result

    shapes: set[tuple[int, ...]] = set()
    with Look():
        function()
    return shapes


def test_a_lower_right_bias_is_no_mask_of_all_queries_and_keys():
    q, k, v = (torch.randn(2, 2, n, 16, device="mps") for n in (11, 23, 23))
    bias = causal_lower_right(11, 23)
    with orchard_ops.sdpa():
        assert (11, 23) not in made_shapes(lambda: F.scaled_dot_product_attention(q, k, v, bias))
    assert (11, 23) in made_shapes(lambda: F.scaled_dot_product_attention(q, k, v, bias))


WAYS: dict[str, Callable] = {
    "grouped heads": lambda q, k, v, m: F.scaled_dot_product_attention(
        q, k[:, :1], v[:, :1], m, enable_gqa=True
    ),
    "by keywords": lambda q, k, v, m: F.scaled_dot_product_attention(
        query=q, key=k, value=v, attn_mask=m, scale=0.3
    ),
    "two dimensions": lambda q, k, v, m: F.scaled_dot_product_attention(
        q[0, 0], k[0, 0], v[0, 0], m
    ),
    "checkpointed": lambda q, k, v, m: checkpoint(
        F.scaled_dot_product_attention, q, k, v, m, use_reentrant=False
    ),
    "compiled": lambda q, k, v, m: torch.compile(
        lambda *x: F.scaled_dot_product_attention(*x), backend="aot_eager"
    )(q, k, v, m),
    "vmap": lambda q, k, v, m: torch.vmap(
        lambda *x: F.scaled_dot_product_attention(*x, m), (0, 0, 0)
    )(q, k, v),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_lower_right_bias_in_every_way_to_call(way: str):
    leaves = [torch.randn(2, 2, n, 16, requires_grad=True) for n in (5, 9, 9)]
    ours = [x.detach().to("mps").requires_grad_() for x in leaves]
    mask = torch.ones(5, 9, dtype=torch.bool).tril(4)
    torch.compiler.reset()
    out = WAYS["checkpointed" if way in ("compiled", "vmap") else way](*leaves, mask)
    out.sin().sum().backward()
    with orchard_ops.sdpa():
        found = WAYS[way](*ours, causal_lower_right(5, 9))
        found.sin().sum().backward()
    same(found, out)
    for x, y in zip(ours, leaves):
        same(x.grad, y.grad)
    stats = orchard_ops.stats()
    assert stats.left_to_pytorch == {} and sum(stats.metal.values()) >= 2


def test_second_derivatives_of_a_lower_right_bias():
    leaves = [torch.randn(1, 2, n, 8, requires_grad=True) for n in (4, 7, 7)]
    mask = torch.ones(4, 7, dtype=torch.bool).tril(3)

    def penalty(leaves: list[Tensor], mask: Tensor) -> list[Tensor]:
        out = F.scaled_dot_product_attention(*leaves, mask)
        first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(x.square().sum() for x in first), leaves))

    with sdpa_kernel(SDPBackend.MATH):
        expected = penalty(leaves, mask)
    ours = [x.detach().to("mps").requires_grad_() for x in leaves]
    with orchard_ops.sdpa():
        found = penalty(ours, causal_lower_right(4, 7))
    for x, y in zip(found, expected):
        same(x, y)


def test_causal_bias_is_as_it_was_after_the_block():
    before = vars(CausalBias)["__torch_function__"]
    with orchard_ops.sdpa():
        assert vars(CausalBias)["__torch_function__"] is not before
    assert vars(CausalBias)["__torch_function__"] is before


def test_a_lower_right_bias_that_is_not_ours_is_pytorchs():
    q, k = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 6, 8)
    bias = causal_lower_right(4, 6)
    expected = F.scaled_dot_product_attention(q, k, k, bias)
    with orchard_ops.sdpa():
        same(F.scaled_dot_product_attention(q, k, k, bias), expected)  # on another device
        with sdpa_kernel(SDPBackend.MATH):
            same(F.scaled_dot_product_attention(q.to("mps"), *(k.to("mps"),) * 2, bias), expected)
        assert len(left_to_pytorch()) == 1
        with pytest.raises(ValueError, match="CausalBias should not be used with causal=True"):
            F.scaled_dot_product_attention(q, k, k, bias, is_causal=True)
