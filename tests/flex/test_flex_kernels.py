"""Kernels whose scores and masks are functions, against float64, in the simulator's check mode.

The functions are written by hand here, so that a mistake of the kernels is not taken for one of
what writes functions as Metal.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flex_cases import HEADS, LONGEST, MASKS, SCORES, FlexCase, check_case, run
from representative import product
from torch import Tensor

from orchard_ops.testing import DTYPES, assert_attention_close

pytestmark = pytest.mark.usefixtures("checked")

TOGETHER = (
    ("noop", "causal"),
    ("softcap", "window"),
    ("alibi", "document"),
    ("relative", "heads"),
    ("where", "pairs"),
    ("steps", "hidden"),
    ("beyond", "hidden"),
)
EACH = (*((score, "none") for score in SCORES), *(("none", mask) for mask in MASKS), *TOGETHER)


@pytest.mark.parametrize(("score", "mask"), dict.fromkeys(EACH))
def test_scores_and_masks(score: str, mask: str):
    check_case(FlexCase(75, 90, 64, score, mask))


@pytest.mark.parametrize(("head_dim", "dtype"), product((24, 96, 128, 256), tuple(DTYPES)), ids=str)
def test_dtypes_and_head_dims(head_dim: int, dtype: torch.dtype):
    """One simdgroup or a pair for the key's side, loads in chunks and by elements."""
    check_case(FlexCase(70, 67, head_dim, "relative", "document", dtype))
    check_case(FlexCase(37, 70, head_dim - 1, "alibi", "none", dtype, num_kv_heads=4))


@pytest.mark.parametrize("head_dim", (64, 128))
def test_without_scratch(head_dim: int, recording, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ORCHARD_BACKWARD_SCRATCH_MB", "0")
    with recording() as launches:
        check_case(FlexCase(70, 67, head_dim, "relative", "document", torch.float16))
        check_case(FlexCase(70, 67, head_dim, "beyond", "none"))
    if launches is not None:
        assert not any("_ds_" in launch.kernel for launch in launches)


@pytest.mark.parametrize(("q_len", "kv_len"), ((1, 1), (1, 130), (130, 1), (33, 64), (64, 33)))
def test_ragged_lengths(q_len: int, kv_len: int):
    check_case(FlexCase(q_len, kv_len, 64, "where", "pairs"))
    check_case(FlexCase(q_len, kv_len, 64, "beyond", "none"))


def test_one_key_head_for_all_queries():
    check_case(FlexCase(75, 90, 64, "softcap", "heads", num_kv_heads=1))


def test_a_group_divided_between_threadgroups(recording):
    """A captured tensor has the number that the parts' buffer has in the kernel behind."""
    with recording() as launches:
        check_case(FlexCase(130, 40, 64, "eight", "causal", num_kv_heads=1))
    if launches is not None:
        kernels = [launch.kernel for launch in launches]
        assert sum("_parts_flex_" in kernel for kernel in kernels) == 1
        assert sum("_dkv_sums_" in kernel for kernel in kernels) == 1


@pytest.mark.parametrize("head_dims", ((40, 64), (64, 24), (192, 128)))
def test_values_of_another_width(head_dims: tuple[int, int]):
    head_dim, value_dim = head_dims
    case = FlexCase(50, 60, head_dim, "softcap", "pairs", torch.float16, value_dim=value_dim)
    check_case(case)


def test_strided_operands():
    case = FlexCase(75, 90, 64, "relative", "document", torch.float16)
    operands = case.operands()
    ref, eager = case.math(torch.float64, *operands), case.math(case.dtype, *operands)

    def spread(x: Tensor) -> Tensor:
        """The same numbers in another order of dimensions, two apart, behind others."""
        holder = torch.full((x.shape[2] + 1, *x.shape[:2], x.shape[3], 2), torch.nan, dtype=x.dtype)
        view = holder[1:, ..., 1].permute(1, 2, 0, 3)
        view.copy_(x)
        return view.to("mps") if x.dim() < 4 else holder.to("mps")[1:, ..., 1].permute(1, 2, 0, 3)

    q, k, v, do, dlse = operands
    results = run(case, *(spread(x) for x in (q, k, v, do)), dlse.to("mps"))
    assert_attention_close(results, ref, eager)


def states(rows: int, cols: int, batches: int, heads: int) -> Tensor:
    """At random; some blocks of queries see nothing, and the lists differ from what a mask says."""
    generator = torch.Generator().manual_seed(rows + cols)
    states = torch.randint(0, 3, (batches, heads, rows, cols), generator=generator)
    states[:, :, -1] = 0
    return states.to(torch.uint8)


BLOCKS = ((128, 128), (64, 32), (32, 96), (1, 1), (48, 20), (1000, 40))


OF = ((1, 1), (2, 1), (1, HEADS), (2, HEADS))


@pytest.mark.parametrize(("of", "blocks", "mask"), product(OF, BLOCKS, ("none", "pairs")), ids=str)
def test_block_states(of: tuple[int, int], blocks: tuple[int, int], mask: str):
    """What they say holds, whatever the mask says of blocks that are hidden, or seen."""
    rows, cols = (-(-n // block) for n, block in zip((150, 170), blocks))
    given = states(rows, cols, *of)
    for head_dim, dtype in ((32, torch.float16), (64, torch.float32)):
        case = FlexCase(150, 170, head_dim, "none", mask, dtype, states=given)
        check_case(replace(case, block_q=blocks[0], block_kv=blocks[1]))


def test_block_states_with_a_score():
    case = FlexCase(150, 170, 128, "relative", "heads", torch.float16, states=states(5, 3, 1, 1))
    check_case(replace(case, block_q=32, block_kv=64))


def test_states_of_larger_masks():
    """Blocks behind the queries and keys make no difference; those of no pair are nowhere."""
    given = states(4, 5, 1, 1)
    case = FlexCase(70, 90, 64, "none", "pairs", states=given, block_q=32, block_kv=32)
    check_case(case)


def test_rows_that_see_nothing():
    case = FlexCase(75, 90, 64, "softcap", "hidden")
    out, lse, dq, *_ = check_case(case)
    assert (lse[:, :, 17] == -torch.inf).all()
    assert not out[:, :, 17].any() and not dq[:, :, 17].any()


@pytest.mark.parametrize("score", ("none", "beyond", "where"))
@pytest.mark.parametrize("head_dim", (64, 128))
def test_what_hidden_keys_and_queries_hold_reaches_nothing(score: str, head_dim: int):
    case = FlexCase(75, 90, head_dim, score, "hidden", torch.float16)
    q, k, v, do, dlse = operands = case.operands()
    clean = check_case(case, operands)
    for x in (k, v):
        x[:, :, :41] = torch.nan
        x[:, :, 80:] = torch.inf
    for x in (q, do):
        x[:, :, 17] = torch.nan
    results = run(case, *(x.to("mps") for x in (q, k, v, do, dlse)))
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), results, clean):
        assert torch.equal(x.cpu(), y.cpu()), name


def test_the_same_bits_twice():
    case = FlexCase(150, 170, 64, "relative", "document", torch.float16)
    operands = [x.to("mps") for x in case.operands()]
    for x, y in zip(run(case, *operands), run(case, *operands)):
        assert torch.equal(x.cpu(), y.cpu())


@pytest.mark.parametrize(("q_len", "kv_len"), ((0, 5), (5, 0), (0, 0)))
@pytest.mark.parametrize("mask", ("none", "causal"))
def test_nothing_to_attend_to(q_len: int, kv_len: int, mask: str):
    case = FlexCase(q_len, kv_len, 64, "softcap", mask)
    out, lse, *grads = run(case, *(x.to("mps") for x in case.operands()))
    assert out.shape == (2, HEADS, q_len, 64) and not out.any()
    assert (lse == -torch.inf).all()
    assert not any(x.any() for x in grads)


def test_captures_are_read_where_they_lie():
    """Through strides and offsets, from the end, and never beyond."""
    text = SCORES["steps"].text("score", 0)
    table = torch.arange(6 * LONGEST, dtype=torch.int64).view(LONGEST, 6)
    case = FlexCase(40, 50, 32, "steps")
    scoring = case.scoring()
    lying = table.to("mps")[:, ::2]
    q, k, v, *_ = (x.to("mps") for x in case.operands())
    ops = torch.ops.orchard
    given = scoring._replace(captures=[lying], score=text)
    dense = scoring._replace(captures=[lying.contiguous()], score=text)
    out, _ = ops.flex_attn_fwd(q, k, v, *given, "metal")
    assert torch.equal(out.cpu(), ops.flex_attn_fwd(q, k, v, *dense, "metal")[0].cpu())
    short = scoring._replace(captures=[lying[:1]], score=text)  # all rows are the last
    first = scoring._replace(captures=[lying[:1].expand(LONGEST, 3)], score=text)
    out, _ = ops.flex_attn_fwd(q, k, v, *short, "metal")
    assert torch.equal(out.cpu(), ops.flex_attn_fwd(q, k, v, *first, "metal")[0].cpu())
