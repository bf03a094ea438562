"""PyTorch's own flex_attention taken over: `orchard_ops.flex` and `orchard_ops.enable`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from flex_calls import CASES, assert_same, expected, operands, run
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as module
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import orchard_ops
from orchard_ops.flex import switch

pytestmark = pytest.mark.usefixtures("fresh_stats")


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def twice(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return 2.0 * score


def tensors(device: str = "mps") -> Tensor:
    return torch.randn(1, 2, 12, 8).to(device)


def ours() -> int:
    return orchard_ops.stats().metal.get("flex_attn_fwd", 0)


def is_taken_over(function: Any = flex_attention) -> bool:
    """Whether a call goes to the op, by its own counter."""
    before, q = ours(), tensors()
    function(q, q, q, score_mod=twice)
    return ours() == before + 1


@pytest.mark.parametrize("compiled", (False, True))
@pytest.mark.parametrize("name", CASES)
def test_training_within_a_block(name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch):
    case = CASES[name]
    captured, given = case.captured(), operands(case)
    right = expected(monkeypatch, case, given, captured)
    function = flex_attention
    if compiled:
        function = torch.compile(flex_attention, fullgraph=True, backend="aot_eager")
    with orchard_ops.flex():
        actual = run(function, case, given, captured, "mps", torch.float32)
    assert_same(actual, right, torch.float32)
    assert sum(orchard_ops.stats().metal.values()) == 2
    assert orchard_ops.stats().reference == {}


def test_a_block_and_what_it_leaves_behind():
    code = flex_attention.__code__
    assert not is_taken_over()
    with orchard_ops.flex():
        assert is_taken_over() and is_taken_over(module.flex_attention) and switch.active()
        with orchard_ops.flex():
            assert is_taken_over()
        assert is_taken_over()
    assert not is_taken_over() and not switch.active()
    assert flex_attention.__code__ is code
    with pytest.raises(KeyError), orchard_ops.flex():
        raise KeyError
    assert flex_attention.__code__ is code


def test_outside_of_a_block_pytorch_refuses_what_it_refused():
    q = tensors().requires_grad_()
    with pytest.raises(NotImplementedError, match="does not support backward on MPS"):
        flex_attention(q, q, q)
    with orchard_ops.flex():
        flex_attention(q, q, q).sum().backward()
    assert q.grad is not None
    with pytest.raises(NotImplementedError, match="does not support backward on MPS"):
        flex_attention(q, q, q)


def test_other_devices_stay_pytorchs():
    q = tensors("cpu")
    right = flex_attention(q, q, q, score_mod=twice)
    with orchard_ops.flex():
        assert torch.equal(flex_attention(q, q, q, score_mod=twice), right)
        q.requires_grad_()
        with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
            flex_attention(q, q, q)
    assert orchard_ops.stats().reference == {}


def test_enable_and_sdpa():
    """`enable` is for all of PyTorch's attention, a block for what it names."""
    try:
        orchard_ops.enable()
        assert is_taken_over()
        with orchard_ops.flex():
            assert is_taken_over()
        assert is_taken_over()
    finally:
        orchard_ops.disable()
    assert not is_taken_over()
    with orchard_ops.sdpa():
        assert not is_taken_over()
    with orchard_ops.flex():
        orchard_ops.disable()
        assert is_taken_over()


def test_all_threads_are_meant():
    found: list[bool] = []
    with orchard_ops.flex():
        thread = threading.Thread(target=lambda: found.append(is_taken_over()))
        thread.start()
        thread.join()
    assert found == [True]


def test_compiled_code_follows_the_switch():
    """Code that was compiled outside is compiled again inside, and once only."""
    counter = CompileCounterWithBackend("aot_eager")

    def call(q: Tensor) -> Tensor:
        return flex_attention(q, q, q, score_mod=twice)

    function = torch.compile(call, fullgraph=True, backend=counter)
    q = tensors()
    for _ in range(2):
        function(q)
        assert ours() == 0
        with orchard_ops.flex():
            function(q)
            function(q)
        assert ours() == 2
        orchard_ops.reset_stats()
    assert counter.frame_count == 2


def test_a_block_mask_made_by_pytorch_on_mps():
    mask = create_block_mask(
        lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, None, None, 12, 12, device="mps"
    )
    q = tensors()
    with orchard_ops.flex():
        out = flex_attention(q, q, q, block_mask=mask)
    right = torch.nn.functional.scaled_dot_product_attention(
        q.cpu(), q.cpu(), q.cpu(), is_causal=True
    )
    torch.testing.assert_close(out.cpu(), right, rtol=1e-5, atol=1e-5)


def test_a_pytorch_with_other_arguments_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(switch, "_original", lambda query, key, value, more=None: None)
    code = flex_attention.__code__
    with (
        pytest.raises(
            NotImplementedError, match=r"has other arguments.*got query, key, value, more"
        ),
        orchard_ops.flex(),
    ):
        raise AssertionError
    assert flex_attention.__code__ is code and not switch.active()
