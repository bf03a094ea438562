"""When F.scaled_dot_product_attention is taken over, and which calls stay PyTorch's."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from sdpa_calls import on_metal
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import orchard_ops
from orchard_ops.takeover import switch

pytestmark = pytest.mark.usefixtures("fresh_stats")
ROOT = Path(__file__).resolve().parents[2]
OPERATOR = "aten::scaled_dot_product_attention"


def operands(head_dim: int = 16, **options: object) -> list[Tensor]:
    return [torch.randn(2, 2, 9, head_dim, **options).to("mps").requires_grad_() for _ in range(3)]


def is_taken_over() -> bool:
    """Whether a call goes to the op, by its own counter."""
    before = orchard_ops.stats().metal["flash_attn_fwd"]
    F.scaled_dot_product_attention(*operands())
    return orchard_ops.stats().metal["flash_attn_fwd"] == before + 1


def left_to_pytorch() -> dict[str, int]:
    stats = orchard_ops.stats()
    assert stats.metal == {"flash_attn_fwd": 0, "flash_attn_bwd": 0} and stats.reference == {}
    return stats.left_to_pytorch


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.detach().cpu(), wanted.detach().cpu(), rtol=1e-4, atol=1e-5)


# ---- on and off ---------------------------------------------------------------------------------


def test_a_block_and_what_it_leaves_behind():
    table = torch._C._dispatch_dump_table(OPERATOR)
    tag = torch.compiler.config.cache_key_tag
    assert not is_taken_over()
    with orchard_ops.sdpa():
        assert is_taken_over() and switch.active()
        with orchard_ops.sdpa():
            assert is_taken_over()
        assert is_taken_over()
    assert not is_taken_over() and not switch.active()
    assert torch._C._dispatch_dump_table(OPERATOR) == table
    assert torch.compiler.config.cache_key_tag == tag


def test_an_exception_ends_the_block():
    with pytest.raises(KeyError), orchard_ops.sdpa(), orchard_ops.sdpa():
        raise KeyError
    assert not is_taken_over()


def test_enable_and_disable_count_once():
    try:
        orchard_ops.enable()
        orchard_ops.enable()
        with orchard_ops.sdpa():
            assert is_taken_over()
        assert is_taken_over()
    finally:
        orchard_ops.disable()
    assert not is_taken_over()
    orchard_ops.disable()
    with orchard_ops.sdpa():
        orchard_ops.disable()
        assert is_taken_over()
    assert not is_taken_over()


def test_as_a_decorator():
    assert orchard_ops.sdpa()(is_taken_over)()
    assert not is_taken_over()


def test_pytorchs_own_switch():
    assert switch.NAME in torch_attention.list_flash_attention_impls()
    assert torch_attention.current_flash_attention_impl() is None
    torch_attention.activate_flash_attention_impl(switch.NAME)
    try:
        assert torch_attention.current_flash_attention_impl() == switch.NAME
        assert is_taken_over()
        torch_attention.activate_flash_attention_impl(switch.NAME)
        with orchard_ops.sdpa():
            pass
        assert is_taken_over()
    finally:
        torch_attention.restore_flash_attention_impl()
    assert not is_taken_over()


def test_all_threads_are_taken_over_until_the_last_block_ends():
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with orchard_ops.sdpa():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert entered.wait(60)
    assert is_taken_over()
    with orchard_ops.sdpa():
        leave.set()
        thread.join()
        assert is_taken_over()
    assert not is_taken_over()


def test_blocks_come_and_go_while_threads_call():
    q, k, v = (x.detach() for x in operands())
    expected = F.scaled_dot_product_attention(q, k, v)
    running, wrong = True, []

    def call() -> None:
        while running:
            try:
                same(F.scaled_dot_product_attention(q, k, v), expected)
            except BaseException as error:
                wrong.append(error)
                return

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        with orchard_ops.sdpa():
            pass
    running = False
    for thread in threads:
        thread.join()
    assert not wrong


def run_python(program: str) -> str:
    environment = dict(os.environ, PYTHONPATH=f"{ROOT}:{ROOT / 'src'}")
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_activates_nothing():
    program = """
import torch
before = torch._C._dispatch_dump_table("aten::scaled_dot_product_attention")
import orchard_ops
assert torch._C._dispatch_dump_table("aten::scaled_dot_product_attention") == before
print(torch.nn.attention.current_flash_attention_impl())
"""
    assert run_python(program) == "None\n"


def test_a_torch_without_the_switch():
    program = """
import torch.nn.attention
del torch.nn.attention.register_flash_attention_impl
import orchard_ops
print(torch.nn.attention.list_flash_attention_impls())
with orchard_ops.sdpa():
    pass
"""
    assert switch.NAME not in run_python(program)


# ---- compiled code ------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def step(call: Callable[..., Tensor]) -> list[Tensor]:
    torch.manual_seed(3)
    leaves = operands()
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
@pytest.mark.parametrize("inside", (True, False), ids=("inside first", "outside first"))
def test_compiled_code_keeps_the_attention_it_was_compiled_with(inside: bool, backend: str):
    expected = step(attention)
    torch.compiler.reset()
    compiled = torch.compile(attention, backend=backend, fullgraph=True)
    if inside:
        with orchard_ops.sdpa():
            found = step(compiled)
        again = step(compiled)
        on_metal(2, 2)
    else:
        found = step(compiled)
        with orchard_ops.sdpa():
            again = step(compiled)
        on_metal(0, 0)
    for x, y, z in zip(found, again, expected, strict=True):
        same(x, z)
        same(y, z)
    torch.compiler.reset()  # after which it is compiled anew
    orchard_ops.reset_stats()
    with orchard_ops.sdpa():
        step(compiled)
    on_metal(1, 1)


def test_caches_of_the_compiler_tell_the_takeover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The graph that the caches on disk go by is the same with and without it."""
    from torch._inductor.utils import fresh_cache

    with fresh_cache(dir=str(tmp_path)):
        for inside in (False, True, False, True):
            torch.compiler.reset()
            orchard_ops.reset_stats()
            compiled = torch.compile(attention, backend="inductor", fullgraph=True)
            if inside:
                with orchard_ops.sdpa():
                    step(compiled)
                on_metal(1, 1)
            else:
                step(compiled)
                on_metal(0, 0)


def test_a_block_inside_of_a_compiled_function():
    def attention_in_a_block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with orchard_ops.sdpa():
            return F.scaled_dot_product_attention(q * 1.0, k, v, is_causal=True)

    torch.compiler.reset()
    expected = step(attention)
    for x, y in zip(step(torch.compile(attention_in_a_block, backend="aot_eager")), expected):
        same(x, y)
    on_metal(1, 1)
    assert not is_taken_over()


def test_exported_programs_follow_the_block():
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v)

    inputs = tuple(x.detach() for x in operands())
    program = torch.export.export(Attention(), inputs).module()
    expected = program(*inputs)
    on_metal(0, 0)
    with orchard_ops.sdpa():
        same(program(*inputs), expected)
    on_metal(1, 0)


def test_a_recomputation_outside_of_the_block_is_an_error():
    leaves = operands()
    with orchard_ops.sdpa():
        out = torch.utils.checkpoint.checkpoint(attention, *leaves, use_reentrant=False)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        out.sum().backward()


# ---- calls that stay PyTorch's ------------------------------------------------------------------


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
        reason = "sdpa_kernel does not allow SDPBackend.FLASH_ATTENTION"
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
    on_metal(1, 1)  # the last backward, which nobody differentiates


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
