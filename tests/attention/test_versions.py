"""torch.func, torch.compile and torch.export on the CPU: what `make versions` asks of a release."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import orchard_ops


def operands(dtype: torch.dtype = torch.float32, q_len: int = 9, kv_len: int = 12) -> list[Tensor]:
    shapes = ((2, 4, q_len, 16), (2, 2, kv_len, 16), (2, 2, kv_len, 16))
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return orchard_ops.flash_attn(q, k, v, is_causal=True, enable_gqa=True)


def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )


def gradients(function, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_compile_forward_and_backward(dynamic: bool):
    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for q_len, kv_len in ((9, 12), (7, 20)):
        inputs = operands(q_len=q_len, kv_len=kv_len)
        assert_same(gradients(compiled, inputs), gradients(expected, inputs))


def test_compile_of_the_operator():
    torch.compiler.reset()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.orchard.flash_attn(q, k, v, is_causal=True, enable_gqa=True)

    inputs = operands()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(gradients(compiled, inputs), gradients(expected, inputs))


def test_export():
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v)

    inputs = operands()
    program = torch.export.export(Attention(), tuple(inputs))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(target.startswith("orchard.") for target in targets), targets
    assert_same([program.module()(*inputs)], [expected(*inputs)])


@pytest.mark.parametrize("transform", ("grad", "vjp", "jacrev"))
def test_func_gives_autograds_gradients(transform: str):
    q, k, v = operands(torch.float64, 5, 6)
    wanted = gradients(expected, [q, k, v])[1]

    def loss(q: Tensor) -> Tensor:
        return attend(q, k, v).square().sum()

    if transform == "grad":
        found = torch.func.grad(loss)(q)
    elif transform == "vjp":
        value, pull = torch.func.vjp(loss, q)
        (found,) = pull(torch.ones_like(value))
    else:
        found = torch.func.jacrev(loss)(q)
    torch.testing.assert_close(found, wanted)


def test_vmap():
    q, k, v = (torch.stack([x, x + 1]) for x in operands())
    found = torch.vmap(attend)(q, k, v)
    torch.testing.assert_close(found, torch.stack(list(map(expected, q, k, v))))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_autocast(dtype: torch.dtype):
    q, k, v = operands()
    with torch.autocast("cpu", dtype=dtype):
        out = attend(q, k, v)
    assert out.dtype == dtype
    wanted = expected(*(x.to(dtype) for x in (q, k, v)))
    torch.testing.assert_close(out, wanted, rtol=2e-2, atol=2e-2)


def test_the_takeover_leaves_other_devices_alone_and_can_be_undone():
    def table() -> str:
        return torch._C._dispatch_dump_table("aten::scaled_dot_product_attention")

    (q, _, _), before = operands(), table()
    call = torch.nn.functional.scaled_dot_product_attention
    wanted = gradients(lambda x: call(x, x, x), [q])
    torch.compiler.reset()
    compiled = torch.compile(lambda x: call(x, x, x), backend="aot_eager", fullgraph=True)
    with orchard_ops.sdpa():
        assert table() != before
        assert_same(gradients(lambda x: call(x, x, x), [q]), wanted)
        assert_same(gradients(compiled, [q]), wanted)
        found = torch.func.grad(lambda x: call(x, x, x).square().sum())(q)
        torch.testing.assert_close(found, wanted[1])
        batched = torch.vmap(lambda x: call(x, x, x))(q[None])
        torch.testing.assert_close(batched[0], wanted[0])
    assert table() == before
    assert orchard_ops.stats().left_to_pytorch == {}


def test_pytorchs_switch_where_it_has_one():
    from torch.nn import attention

    if not hasattr(attention, "activate_flash_attention_impl"):
        assert not hasattr(attention, "register_flash_attention_impl")
        return
    before = torch._C._dispatch_dump_table("aten::scaled_dot_product_attention")
    attention.activate_flash_attention_impl("orchard")
    assert attention.current_flash_attention_impl() == "orchard"
    assert torch._C._dispatch_dump_table("aten::scaled_dot_product_attention") != before
    if hasattr(attention, "restore_flash_attention_impl"):
        attention.restore_flash_attention_impl()
        assert attention.current_flash_attention_impl() is None
    else:  # torch 2.10: what was activated stays so, and PyTorch keeps what would end it
        attention._registry._FLASH_ATTENTION_HANDLES.pop("orchard").remove()
        attention._registry._FLASH_ATTENTION_ACTIVE = None
    assert torch._C._dispatch_dump_table("aten::scaled_dot_product_attention") == before
