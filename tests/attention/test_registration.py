"""The ops as PyTorch sees them: opcheck, compile, autograd, transforms, autocast, checkpoint."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attention_cases import SEED
from torch.utils.checkpoint import checkpoint

import orchard_ops
from orchard_ops.scoring import Scoring

DEVICES = ("cpu", "mps")
# PyTorch's own autograd-registration check knows cpu, cuda and xpu only.
UTILITIES = {
    "cpu": (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    ),
    "mps": ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
}


def qkv(device: str, requires_grad: bool = True) -> list[torch.Tensor]:
    """q contiguous, k as (B, L, H, D) memory, v a slice."""
    q = torch.randn(2, 4, 9, 16, device=device)
    k = torch.randn(2, 11, 2, 16, device=device).transpose(1, 2)
    v = torch.randn(2, 2, 20, 16, device=device)[:, :, 3:14]
    return [x.requires_grad_(requires_grad) for x in (q, k, v)]


def scoring(p: float) -> Scoring:
    return Scoring(
        dropout_seed=torch.tensor(SEED), dropout_p=p, scale=0.25, window_right=0, diagonal=2
    )


@pytest.mark.parametrize("device", DEVICES)
class TestOpcheck:
    @pytest.mark.parametrize("kwargs", [{}, {"is_causal": True}, {"window_left": 3, "scale": 0.3}])
    def test_flash_attn(self, device: str, kwargs: dict):
        torch.library.opcheck(
            torch.ops.orchard.flash_attn,
            qkv(device),
            kwargs | {"enable_gqa": True},
            test_utils=UTILITIES[device],
        )

    @pytest.mark.parametrize("p", (0.0, 0.3))
    def test_forward(self, device: str, p: float):
        torch.library.opcheck(
            torch.ops.orchard.flash_attn_fwd,
            (*qkv(device), *scoring(p)),
            test_utils=UTILITIES[device],
        )

    @pytest.mark.parametrize("p", (0.0, 0.3))
    @pytest.mark.parametrize("with_dlse", (False, True))
    def test_backward(self, device: str, p: float, with_dlse: bool):
        q, k, v = qkv(device, requires_grad=False)
        out, row_stats = torch.ops.orchard.flash_attn_fwd(q, k, v, *scoring(p))
        dlse = torch.randn_like(row_stats[..., 1]) if with_dlse else None
        torch.library.opcheck(
            torch.ops.orchard.flash_attn_bwd,
            (torch.randn_like(out), dlse, q, k, v, out, row_stats, *scoring(p), False),
            test_utils=UTILITIES[device],
        )

    def test_mask_and_sinks(self, device: str, quiet_fallback: None):
        mask = torch.randn(2, 1, 9, 11, device=device, requires_grad=True)
        sinks = torch.randn(4, device=device, requires_grad=True)
        torch.library.opcheck(
            torch.ops.orchard.flash_attn,
            (*qkv(device), mask),
            {"sinks": sinks, "enable_gqa": True},
            test_utils=UTILITIES[device],
        )


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: float = 0.0) -> torch.Tensor:
    out = torch.ops.orchard.flash_attn(q, k, v, dropout_p=p, is_causal=True, enable_gqa=True)
    return out.square()


def gradients(out: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return [g.cpu() for g in torch.autograd.grad(out.sum(), inputs)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("p", (0.0, 0.3))
@pytest.mark.parametrize("dynamic", (False, True))
def test_compile_fullgraph(device: str, p: float, dynamic: bool):
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    inputs = qkv(device)
    torch.manual_seed(3)
    expected = attention(*inputs, p)
    torch.manual_seed(3)
    out = compiled(*inputs, p)
    assert out.stride() == expected.stride()
    torch.testing.assert_close(out, expected)
    for x, y in zip(gradients(out, *inputs), gradients(expected, *inputs)):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_graph_holds_the_op_and_no_matrix(device: str):
    """Forward and backward graphs call the functional ops; nothing of size L x S appears."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    graphs = []

    def keep(graph: torch.fx.GraphModule, _: list) -> object:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(
        attention, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)
    )
    inputs = qkv(device)
    compiled(*inputs, 0.1).sum().backward()
    targets = [{str(n.target) for n in g.graph.nodes if n.op == "call_function"} for g in graphs]
    assert "orchard.flash_attn_fwd.default" in targets[0]
    assert "orchard.flash_attn_bwd.default" in targets[1]
    shapes = [
        tuple(n.meta["val"].shape)
        for g in graphs
        for n in g.graph.nodes
        if isinstance(n.meta.get("val"), torch.Tensor)
    ]
    assert not any(s[-2:] == (9, 11) for s in shapes)


@pytest.mark.parametrize("device", DEVICES)
def test_double_backward_is_refused(device: str):
    q, k, v = qkv(device)
    (dq,) = torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not implemented"):
        dq.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
def test_forward_mode_is_refused(device: str):
    """Forward-mode AD raises; it must not take the result for a constant."""
    q, k, v = qkv(device, requires_grad=False)
    message = "forward-mode differentiation"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(lambda x: attention(x, k, v), (q,), (torch.ones_like(q),))
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jacfwd(lambda x: attention(x, k, v).sum())(q)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match=message):
            attention(dual, k, v)
        assert attention(q, k, v).shape == q.shape  # nothing is refused without a tangent


def test_meta_tensors_have_shapes():
    q, k, v = (torch.empty(2, h, n, 16, device="meta") for h, n in ((4, 9), (2, 11), (2, 11)))
    out, lse = orchard_ops.flash_attn(
        q, k, v, dropout_p=0.1, is_causal=True, enable_gqa=True, return_lse=True
    )
    assert (out.shape, lse.shape) == ((2, 4, 9, 16), (2, 4, 9))
    grads = torch.autograd.grad(
        attention(*(x.requires_grad_() for x in (q, k, v))).sum(), (q, k, v)
    )
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("device", DEVICES)
def test_func_grad(device: str):
    inputs = qkv(device)
    expected = gradients(attention(*inputs), *inputs)
    detached = [x.detach() for x in inputs]
    grads = torch.func.grad(lambda *a: attention(*a).sum(), argnums=(0, 1, 2))(*detached)
    for x, y in zip(grads, expected):
        torch.testing.assert_close(x.cpu(), y)


def _stacked(device: str, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(s, device=device) for s in shapes]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 0, 1)], ids=str)
def test_vmap(device: str, in_dims: tuple, fresh_stats: None):
    """One call over the folded batch, equal to a loop; gradients too."""
    samples = [_stacked(device, (2, 4, 5, 16), (2, 2, 7, 16), (2, 2, 7, 16)) for _ in range(3)]
    inputs = [
        samples[0][i] if d is None else torch.stack([s[i] for s in samples], dim=d)
        for i, d in enumerate(in_dims)
    ]

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v).sum()

    def sample(n: int) -> list[torch.Tensor]:
        return [x if d is None else x.select(d, n) for x, d in zip(inputs, in_dims)]

    orchard_ops.reset_stats()
    out = torch.vmap(attention, in_dims=in_dims)(*inputs)
    counted = orchard_ops.stats()
    calls = counted.metal if device == "mps" else next(iter(counted.reference.values()))
    assert calls["flash_attn_fwd"] == 1
    expected = torch.stack([attention(*sample(n)) for n in range(3)])
    torch.testing.assert_close(out, expected)
    gradient = torch.func.grad(loss, argnums=(0, 1, 2))
    grads = torch.vmap(gradient, in_dims=in_dims)(*inputs)
    for i, g in enumerate(grads):
        torch.testing.assert_close(g, torch.stack([gradient(*sample(n))[i] for n in range(3)]))


def test_vmap_over_masks_and_slopes():
    q, k, v = _stacked("cpu", (3, 2, 4, 5, 16), (2, 2, 7, 16), (2, 2, 7, 16))
    for mask, slopes in (
        (torch.randn(3, 5, 7), None),
        (torch.randn(3, 2, 1, 5, 7), torch.rand(3, 4)),
        (None, torch.rand(3, 2, 4)),
    ):
        in_dims = (0, None if mask is None else 0, None if slopes is None else 0)

        def call(q, mask, slopes):
            return torch.ops.orchard.flash_attn(q, k, v, mask, alibi_slopes=slopes, enable_gqa=True)

        out = torch.vmap(call, in_dims=in_dims)(q, mask, slopes)
        loop = [
            call(q[n], None if mask is None else mask[n], None if slopes is None else slopes[n])
            for n in range(3)
        ]
        torch.testing.assert_close(out, torch.stack(loop))


@pytest.mark.parametrize("device", DEVICES)
def test_vmapped_vjp_keeps_the_forwards_dropout_mask(device: str):
    q, k, v = qkv(device, requires_grad=False)
    out, vjp = torch.func.vjp(lambda *a: attention(*a, 0.4), q, k, v)
    cotangents = torch.randn(3, *out.shape, device=device)
    mapped = torch.vmap(vjp)(cotangents)
    for i, grads in enumerate(zip(*(vjp(g) for g in cotangents))):
        torch.testing.assert_close(mapped[i], torch.stack(grads))


def test_vmap_with_dropout():
    q = torch.randn(1, 2, 4, 5, 16).expand(3, -1, -1, -1, -1)

    def call(q):
        return torch.ops.orchard.flash_attn(q, q, q, dropout_p=0.5)

    out = torch.vmap(call, randomness="different")(q)
    assert not torch.equal(out[0], out[1])
    with pytest.raises(NotImplementedError, match="needs randomness='different'; got 'same'"):
        torch.vmap(call, randomness="same")(q)


@pytest.mark.parametrize("device", DEVICES)
def test_inference_mode_and_no_grad(device: str):
    inputs = qkv(device)
    expected = attention(*inputs)
    for context in (torch.inference_mode(), torch.no_grad()):
        with context:
            out = attention(*inputs)
        assert not out.requires_grad
        torch.testing.assert_close(out, expected.detach())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("frozen", ([0], [1, 2], [0, 1]))
def test_only_wanted_gradients_are_returned(device: str, frozen: list[int]):
    inputs = qkv(device)
    expected = gradients(attention(*inputs), *inputs)
    for i in frozen:
        inputs[i] = inputs[i].detach()
    attention(*inputs).sum().backward()
    for i, x in enumerate(inputs):
        if i in frozen:
            assert x.grad is None
        else:
            torch.testing.assert_close(x.grad.cpu(), expected[i])


@pytest.mark.parametrize("device", DEVICES)
def test_lse_alone_has_a_gradient(device: str):
    q, k, v = qkv(device)
    _, lse = orchard_ops.flash_attn(q, k, v, enable_gqa=True, return_lse=True)
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v), allow_unused=True)
    scores = torch.matmul(q, k.repeat_interleave(2, dim=1).transpose(-1, -2)) / 4.0
    expected = torch.autograd.grad(torch.logsumexp(scores, -1).sum(), (q, k))
    torch.testing.assert_close(dq, expected[0])
    torch.testing.assert_close(dk, expected[1])
    assert not dv.any()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device: str, dtype: torch.dtype):
    inputs = qkv(device)
    with torch.autocast(device, dtype=dtype):
        out = torch.ops.orchard.flash_attn(*inputs, enable_gqa=True)
    assert out.dtype == dtype
    expected = torch.ops.orchard.flash_attn(*(x.to(dtype) for x in inputs), enable_gqa=True)
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in inputs)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_unites_mixed_dtypes(device: str):
    """Rotary embeddings often leave q and k in float32 where v is half already."""
    q, k, v = qkv(device, requires_grad=False)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = torch.ops.orchard.flash_attn(q, k, v.bfloat16(), enable_gqa=True)
    halves = [x.bfloat16() for x in (q, k, v)]
    expected = torch.ops.orchard.flash_attn(*halves, enable_gqa=True)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_does_not_reach_into_the_reference(device: str):
    inputs = [x.detach() for x in qkv(device)]
    expected = torch.ops.orchard.flash_attn_fwd(*inputs, *scoring(0.0), "reference")
    with torch.autocast(device, dtype=torch.bfloat16):
        out = torch.ops.orchard.flash_attn_fwd(*inputs, *scoring(0.0), "reference")
    assert torch.equal(out[0], expected[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("use_reentrant", (False, True))
def test_checkpoint_replays_the_dropout_mask(device: str, use_reentrant: bool):
    inputs = qkv(device)
    torch.manual_seed(9)
    expected_out = attention(*inputs, 0.4)
    expected = gradients(expected_out, *inputs)
    torch.manual_seed(9)
    out = checkpoint(attention, *inputs, 0.4, use_reentrant=use_reentrant)
    torch.rand(5)  # the generator moves on between forward and backward
    out.sum().backward()
    assert torch.equal(out, expected_out)
    for x, y in zip(inputs, expected):
        assert torch.equal(x.grad.cpu(), y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (1, 2, 2)], ids=str)
def test_batch_dimensions_as_sdpa_takes_them(device: str, batch: tuple[int, ...]):
    q, k, v = (torch.randn(*batch, 2, n, 16) for n in (5, 7, 7))
    out, lse = orchard_ops.flash_attn(*(x.to(device) for x in (q, k, v)), return_lse=True)
    assert lse.shape == (*batch, 2, 5)
    torch.testing.assert_close(out.cpu(), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("mask_batch", ("none", "full", "ones"))
def test_masks_broadcast_over_batch_dimensions(batch: tuple[int, ...], mask_batch: str):
    q, k, v = (torch.randn(*batch, 2, n, 16) for n in (5, 7, 7))
    leading = {"none": (), "full": (*batch, 2), "ones": (*(1 for _ in batch), 1)}[mask_batch]
    mask = torch.randn(*leading, 5, 7, requires_grad=True)
    out = orchard_ops.flash_attn(q, k, v, mask)
    expected = F.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(out, expected)
    for x, y in zip(
        torch.autograd.grad(out.sum(), mask), torch.autograd.grad(expected.sum(), mask)
    ):
        torch.testing.assert_close(x, y)
