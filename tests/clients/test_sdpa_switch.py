"""When F.scaled_dot_product_attention is taken over: blocks, threads, compiled code."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sdpa_calls import on_metal, operands, same
from torch import Tensor
from torch.nn import attention as torch_attention

import orchard_ops
from orchard_ops.takeover import switch

pytestmark = pytest.mark.usefixtures("fresh_stats")
ROOT = Path(__file__).resolve().parents[2]


def is_taken_over() -> bool:
    """Whether a call goes to the op, by its own counter."""
    before = orchard_ops.stats().metal["flash_attn_fwd"]
    F.scaled_dot_product_attention(*operands())
    return orchard_ops.stats().metal["flash_attn_fwd"] == before + 1


# ---- on and off ---------------------------------------------------------------------------------


def test_a_block_and_what_it_leaves_behind():
    tag = torch.compiler.config.cache_key_tag
    assert not is_taken_over()
    with orchard_ops.sdpa():
        assert is_taken_over() and switch.active()
        with orchard_ops.sdpa():
            assert is_taken_over()
        assert is_taken_over()
    assert not is_taken_over() and not switch.active()
    assert torch.compiler.config.cache_key_tag == tag


def test_registrations_end_with_the_last_block_unless_another_thread_may_be_calling():
    program = """
import threading, torch, orchard_ops
from torch.nn.functional import scaled_dot_product_attention
def table():
    return torch._C._dispatch_dump_table("aten::scaled_dot_product_attention")
def block():
    with orchard_ops.sdpa():
        assert table() != before
before = table()
block()
assert table() == before
waiting = threading.Thread(target=threading.Event().wait, daemon=True)
waiting.start()
block()
assert table() == before
calls = threading.Event()
stop = False
def call():
    while not stop:
        scaled_dot_product_attention(*[torch.ones(1, 1, 2, 4)] * 3)
        calls.set()
calling = threading.Thread(target=call, daemon=True)
calling.start()
assert calls.wait(60)
block()
assert table() != before
stop = True
calling.join()
block()
assert table() == before
"""
    run_python(program)


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


def test_attention_written_by_hand_is_recognised_by_inductor():
    """It replaces the formula by F.scaled_dot_product_attention, which is taken over."""

    def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1)).div(4.0).softmax(dim=-1) @ v

    expected = step(by_hand)
    torch.compiler.reset()
    with orchard_ops.sdpa():
        found = step(torch.compile(by_hand, fullgraph=True))
    for x, y in zip(found, expected, strict=True):
        same(x, y)
    on_metal(1, 1)


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
