"""orchard::flex_attn_fwd and orchard::flex_attn_bwd as PyTorch sees them, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from flex_cases import FlexCase
from torch import Tensor

import orchard_ops
from orchard_ops.ops import flex

OPS = torch.ops.orchard


def operands(case: FlexCase, requires_grad: bool = False) -> list[Tensor]:
    q, k, v, *_ = case.operands()
    return [x.to("mps").requires_grad_(requires_grad) for x in (q, k, v)]


CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
"""All but that of the autograd kernel's registration, which PyTorch has for CPU and CUDA alone."""


@pytest.mark.parametrize("mask", ("none", "document"))
def test_opcheck(mask: str):
    states = torch.ones(1, 1, 2, 2, dtype=torch.uint8) if mask == "none" else None
    case = FlexCase(40, 50, 16, "alibi", mask, torch.float16, states=states, block_q=32)
    for requires_grad in (False, True):
        args = (*operands(case, requires_grad), *case.scoring(), "metal")
        torch.library.opcheck(OPS.flex_attn_fwd.default, args, test_utils=CHECKS)
    q, k, v = operands(case)
    out, row_stats = OPS.flex_attn_fwd(q, k, v, *case.scoring(), "metal")
    args = (out, row_stats[..., 0], q, k, v, out, row_stats, *case.scoring(), "metal")
    torch.library.opcheck(OPS.flex_attn_bwd.default, args, test_utils=CHECKS)


@pytest.mark.parametrize("score", ("none", "softcap"))
def test_the_derivative_of_out_and_lse(score: str):
    """Together, and each alone."""
    case = FlexCase(40, 50, 32, score, "causal")
    q, k, v, do, dlse = case.operands()
    for of_out, of_lse in ((1, 1), (1, 0), (0, 1)):
        leaves = operands(case, requires_grad=True)
        out, lse = flex.attend(*leaves, *case.scoring())
        loss = of_out * (out * do.to("mps")).sum() if of_out else 0.0
        loss = loss + (of_lse * (lse * dlse.to("mps")).sum() if of_lse else 0.0)
        loss.backward()
        ref = case.math(torch.float64, q, k, v, do * of_out, dlse * of_lse)
        for x, expected in zip(leaves, (ref.dq, ref.dk, ref.dv)):
            if x.grad is None:
                assert not expected.any()
                continue
            torch.testing.assert_close(x.grad.cpu().double(), expected, rtol=1e-4, atol=1e-5)


def test_second_derivatives_are_refused():
    case = FlexCase(8, 8, 16, "softcap")
    leaves = operands(case, requires_grad=True)
    out, _ = flex.attend(*leaves, *case.scoring())
    (dq,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        dq.sum().backward()


def test_gradients_of_captures_are_refused():
    case = FlexCase(8, 8, 16, "alibi")
    scoring = case.scoring()
    scoring.captures[0].requires_grad_()
    with pytest.raises(NotImplementedError, match="number 0 requires grad: detach it"):
        flex.attend(*operands(case), *scoring)


def test_elsewhere_the_op_says_where_it_runs():
    case = FlexCase(8, 8, 16, "alibi")
    q, k, v, *_ = case.operands()
    with pytest.raises(NotImplementedError, match="runs on mps alone: got cpu"):
        flex.attend(q, k, v, *case.scoring("cpu"))
    why = flex.why_not_metal(q, k, v, *case.scoring("cpu"))
    assert why == "the tensors are on cpu, not on mps"


def test_a_text_that_does_not_compile():
    """The compiler's message is said, at once and when the plan is asked."""
    case = FlexCase(8, 8, 16, "softcap")
    scoring = case.scoring()
    scoring = scoring._replace(score=scoring.score.replace("precise::tanh", "tangent"))
    q, k, v = operands(case)
    assert flex.why_not_metal(q, k, v, *scoring) == ""
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"flex_attn_fwd: the Metal kernels cannot run this "
                           r"call: the shader attention_forward_.*_flex_[0-9a-f]{12} does not "
                           r"compile: .*undeclared identifier 'tangent'") as raised:  # fmt: skip
            flex.attend(q, k, v, *scoring)
    assert flex.why_not_metal(q, k, v, *scoring) in str(raised.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    (
        ((1,) * 4, ""),
        ((1,) * 5, "more than 4 dimensions (got 5)"),
        ((2**31,), "spans more than 2^31 elements"),
    ),
)
def test_captures_that_metal_does_not_take(sizes: tuple[int, ...], message: str):
    case = FlexCase(8, 8, 16, "alibi")
    capture = torch.zeros((1,) * len(sizes), device="mps").expand(sizes)
    q, k, v = operands(case)
    why = flex.why_not_metal(q, k, v, *case.scoring()._replace(captures=[capture]))
    assert message in why and bool(why) == bool(message)


def test_more_captures_than_there_are_buffers():
    case = FlexCase(8, 8, 16, "alibi")
    scoring = case.scoring()
    given = scoring._replace(captures=scoring.captures * 9)
    why = flex.why_not_metal(*operands(case), *given)
    assert why == "score_mod and mask_mod capture more than 8 tensors (got 9)"
    flex.attend(*operands(case), *scoring._replace(captures=scoring.captures * 8))


def test_what_the_plan_refuses():
    case = FlexCase(8, 8, 16, "alibi")
    wide = [torch.zeros(1, 4, 8, 264, device="mps")] * 3
    assert flex.why_not_metal(*wide, *case.scoring()) == "head_dim is above 256 (got 264)"
    double = [torch.zeros(1, 4, 8, 16, device="mps", dtype=torch.int32)] * 3
    assert "the dtype is not" in flex.why_not_metal(*double, *case.scoring())


@pytest.mark.parametrize(
    ("states", "message"),
    (
        (torch.ones(1, 1, 1, 1), "4-D uint8 tensor"),
        (torch.ones(1, 1, 1, dtype=torch.uint8), "4-D uint8 tensor"),
        (torch.ones(3, 1, 1, 1, dtype=torch.uint8), "1 or 2 batches"),
        (torch.ones(1, 2, 1, 1, dtype=torch.uint8), "1 or 4 heads"),
        (torch.ones(1, 1, 1, 1, dtype=torch.uint8), "covers 32 queries and 32 keys"),
    ),
)
def test_block_states_that_are_wrong(states: Tensor, message: str):
    case = FlexCase(40, 50, 16, "none", "causal", block_q=32, block_kv=32)
    with pytest.raises(ValueError, match=message):
        flex.attend(*operands(case), *case.scoring()._replace(block_states=states.to("mps")))


def test_what_a_call_without_functions_is():
    """The plain kernels, under their own names; calls are counted."""
    case = FlexCase(40, 50, 64, dtype=torch.float16)
    q, k, v = operands(case)
    _, _, _, _, names, *_ = OPS.flex_attn_plan(q, k, v, *case.scoring(), "metal")
    assert tuple(names) == orchard_ops.explain(q, k, v, enable_gqa=True).kernels
    before = orchard_ops.stats().metal.get("flex_attn_fwd", 0)
    flex.attend(q, k, v, *case.scoring())
    assert orchard_ops.stats().metal["flex_attn_fwd"] == before + 1


def test_a_variant_is_named_by_what_it_is():
    case = FlexCase(40, 50, 64, "softcap", "causal", torch.float16)
    q, k, v = operands(case)

    def names(scoring: flex.FlexScoring) -> list[str]:
        _, _, _, _, names, *_ = OPS.flex_attn_plan(q, k, v, *scoring, "metal")
        return names

    map_name, forward, *_ = own = names(case.scoring())
    hash_of_texts = map_name.removeprefix("attention_flex_map_")
    assert len(hash_of_texts) == 12 and int(hash_of_texts, 16)
    assert forward == f"attention_forward_float16_d64_r1_k32_b2_chunks_flex_{hash_of_texts}"
    assert names(case.scoring()) == own
    other = case.scoring()._replace(score=case.scoring().score.replace("5.0f", "6.0f"))
    assert not set(names(other)) & {map_name, forward}


def test_plans_are_remembered():
    case = FlexCase(41, 50, 64, "softcap", "causal", torch.float16)
    q, k, v = operands(case)
    flex.attend(q, k, v, *case.scoring())
    before = OPS.plans_computed()
    flex.attend(q, k, v, *case.scoring())
    assert OPS.plans_computed() == before
