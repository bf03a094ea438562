"""The reference kernels: against float64, against SDPA, by finite differences, and their memory."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import DTYPES, Case, check_case, lse_of, run
from torch.utils._python_dispatch import TorchDispatchMode

import orchard_ops
from orchard_ops import dropout, reference
from orchard_ops.reference import products, scores
from orchard_ops.scoring import Scoring
from orchard_ops.testing import assert_attention_close, math_attention

CASES = [
    Case(37, 51, 24, batch=2, num_heads=4, num_kv_heads=2),
    Case(130, 70, 40, window_right=0),
    Case(20, 90, 300, window_right=0, diagonal=70),
    Case(90, 20, 16, window_right=0, diagonal=-70),
    Case(65, 129, 64, window_left=10, window_right=4, diagonal=3, dropout_p=0.3),
    Case(1, 1, 8),
    Case(200, 200, 32, dropout_p=0.2, window_right=0, scale=-0.3),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_obeys_the_tolerance_rule(case: Case, dtype: torch.dtype):
    check_case(case.but(dtype=dtype), device="cpu", impl="auto")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_is_exact(case: Case):
    operands = [x.double() for x in case.operands()]
    ref = case.math(torch.float64, *operands)
    for x, expected in zip(
        run(case, *operands, impl="auto"), (ref.out, ref.lse, ref.dq, ref.dk, ref.dv)
    ):
        torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)


SMALL_BLOCKS = scores.Limits(1, 1, 1)  # each a single group of rows


@pytest.mark.parametrize("rows", (16, 48, 10**9), ids=lambda n: f"rows{n}")
def test_block_size_does_not_matter(rows: int, monkeypatch: pytest.MonkeyPatch):
    case = Case(130, 70, 16, dropout_p=0.2, window_left=20, window_right=5)
    monkeypatch.setattr(scores, "CPU_LIMITS", scores.Limits(rows * 2 * 70, 1, 1))
    check_case(case, device="cpu", impl="auto")


FEATURES = {
    "plain": {},
    "causal": {"is_causal": True},
    "dropout": {"dropout_p": 0.4},
    "window": {"window_left": 3, "window_right": 2},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25])},
    "alibi_per_batch": {"alibi_slopes": torch.tensor([[0.5, 0.25], [0.1, 0.9]])},
    "all": {
        "is_causal": True,
        "dropout_p": 0.3,
        "window_left": 4,
        "softcap": 2.0,
        "alibi_slopes": torch.tensor([0.5, 0.25]),
        "scale": 0.7,
    },
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("mask_shape", [None, (2, 2, 5, 7), (5, 7), (2, 1, 1, 7)], ids=str)
def test_gradcheck(feature: str, mask_shape: tuple[int, ...] | None):
    """Every gradient (q, k, v, mask, sinks, through out and lse) against finite differences."""
    inputs = [torch.randn(2, h, n, 4, dtype=torch.float64) for h, n in ((2, 5), (1, 7), (1, 7))]
    inputs.append(torch.randn(2, dtype=torch.float64))
    if mask_shape is not None:
        inputs.append(torch.randn(mask_shape, dtype=torch.float64))

    def attention(q, k, v, sinks, mask=None):
        torch.manual_seed(5)  # one dropout mask for all evaluations
        return orchard_ops.flash_attn(
            q, k, v, mask, sinks=sinks, return_lse=True, **FEATURES[feature]
        )

    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(attention, inputs, fast_mode=True)


def test_sinks_take_probability():
    """A sink of s is a key with logit s and value 0."""
    q, k, v = (torch.randn(1, 2, 6, 8, dtype=torch.float64) for _ in range(3))
    sinks = torch.tensor([0.3, -1.0], dtype=torch.float64)
    logits = torch.matmul(q, k.transpose(-1, -2)) * 8**-0.5
    extended = torch.cat((logits, sinks.view(1, 2, 1, 1).expand(1, 2, 6, 1)), dim=-1)
    expected = torch.softmax(extended, dim=-1)[..., :-1] @ v
    torch.testing.assert_close(orchard_ops.flash_attn(q, k, v, sinks=sinks), expected)


def test_softcap_and_alibi_formulas():
    q, k, v = (torch.randn(1, 2, 6, 8, dtype=torch.float64) for _ in range(3))
    slopes = torch.tensor([0.3, 0.6])
    logits = torch.matmul(q, k.transpose(-1, -2)) * 8**-0.5
    logits = 2.0 * torch.tanh(logits / 2.0)
    distance = (torch.arange(6).unsqueeze(1) - torch.arange(6)).abs()
    expected = torch.softmax(logits - slopes.view(1, 2, 1, 1) * distance, dim=-1) @ v
    actual = orchard_ops.flash_attn(q, k, v, softcap=2.0, alibi_slopes=slopes)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("kind", ("bool", "float", "blocked_row"))
def test_masks_as_sdpa(kind: str, dtype: torch.dtype):
    q, k, v = (torch.randn(2, 4, 17, 16, dtype=dtype, requires_grad=True) for _ in range(3))
    mask = torch.randn(2, 1, 17, 17, dtype=dtype)
    if kind != "float":
        mask = mask > 0
    if kind == "blocked_row":
        mask[:, :, 3] = False
    out, expected = (
        f(q, k, v, attn_mask=mask)
        for f in (torch.ops.orchard.flash_attn, F.scaled_dot_product_attention)
    )
    torch.testing.assert_close(out, expected)
    do = torch.randn_like(out)
    for x, y in zip(
        torch.autograd.grad(out, (q, k, v), do), torch.autograd.grad(expected, (q, k, v), do)
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("scale", (0.0, 1e-50))  # the second is 0 in float32
def test_a_scale_of_zero_hides_no_nan(scale: float):
    q = torch.zeros(1, 1, 4, 8, requires_grad=True)
    k, v = torch.randn(2, 1, 1, 4, 8)
    k[0, 0, 2, 3] = math.nan
    out = orchard_ops.flash_attn(q, k, v, scale=scale)
    assert out.isnan().all()
    (dq,) = torch.autograd.grad(out, q, torch.ones_like(out))
    assert dq.isnan().any()


class Operations(TorchDispatchMode):
    """The aten ops that ran; `computing` are those that return no view of an argument."""

    def __init__(self, of_numbers: int = 1):
        """Counts apart those that read or write a tensor of so many numbers."""
        super().__init__()
        self.of_numbers = of_numbers

    def __enter__(self) -> Operations:
        self.seen: set[str] = set()
        self.computing = 0
        self.large = 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func._schema.name)
        self.computing += not func.is_view
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in (*args, result) if isinstance(x, torch.Tensor)]
        sizes = [x.numel() for x in tensors]
        allocates = func._schema.name == "aten::new_empty"
        computes = not func.is_view and not allocates
        self.large += computes and max(sizes, default=0) >= self.of_numbers
        return result


def mask_of(kind: str, length: int) -> torch.Tensor:
    lower = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    return {
        "bool": lambda: lower,
        "key padding": lambda: (torch.arange(length) < length - 9).view(1, 1, 1, length),
        "additive": lambda: torch.randn(1, 1, length, length),
        "additive, with gradient": lambda: torch.randn(1, 1, length, length),
        "-inf": lambda: torch.zeros(lower.shape).masked_fill_(~lower, -math.inf),
    }[kind]()


def operations_of_step(kind: str, device: str, heads: int, length: int) -> Operations:
    """Those of a forward and a backward. Large ones go over all scores."""
    q, k, v = (torch.zeros(1, heads, length, 4, device=device) for _ in range(3))
    scoring = Scoring(attn_mask=mask_of(kind, length).to(device), scale=0.3)
    with Operations(heads * length * (length - 16)) as operations:
        out, row_stats = reference.forward(q, k, v, scoring)
        reference.backward(
            out, None, q, k, v, out, row_stats, scoring=scoring, mask_grad="gradient" in kind
        )
    assert operations.seen & {"aten::bmm", "aten::baddbmm_"}  # or nothing was counted
    return operations


def computing_operations(kind: str, device: str, heads: int, length: int) -> int:
    return operations_of_step(kind, device, heads, length).computing


KINDS = ("bool", "key padding", "additive", "additive, with gradient", "-inf")


@pytest.mark.parametrize("device", ("cpu", "meta"))
@pytest.mark.parametrize("kind", KINDS)
def test_operations_of_a_masked_step(kind: str, device: str):
    """A step with a mask is at most 60 operations, where 315 were too many on a CPU, and 182 on a
    device where each is a launch. Meta tensors stand in for such a device."""
    assert 30 < computing_operations(kind, device, 16, 1024) <= 60


@pytest.mark.parametrize(("kind", "most"), (("bool", 19), ("key padding", 19), ("additive", 21)))
def test_passes_over_the_scores_of_a_short_step(kind: str, most: int):
    """What a step costs at L 256 on a CPU, where the clock is too noisy for a test; 23 of them for
    the boolean masks were too many. Padding has a pass of its own for the factor, forward and
    backward: no mask is added, which could take it along."""
    found = operations_of_step(kind, "cpu", 8, 256).large
    assert 12 < found <= most


PADDED = {
    "behind": [(0, 30)],
    "before": [(9, 50)],
    "both, by sample": [(9, 30), (4, 41)],
    "one sample without keys": [(0, 0), (3, 40)],
    "no keys": [(0, 0)],
    "a gap": [(5, 20, 25, 40)],
}


@pytest.mark.parametrize("kind", ("bool", "float32"))
@pytest.mark.parametrize("name", PADDED)
def test_keys_at_the_ends_that_no_row_sees(name: str, kind: str):
    """They are in no block, whatever was left in them."""
    batch, heads, q_len, kv_len = len(PADDED[name]), 4, 33, 50
    shown = torch.zeros(batch, 1, 1, kv_len, dtype=torch.bool)
    for sample, ends in enumerate(PADDED[name]):
        for begin, end in zip(ends[::2], ends[1::2]):
            shown[sample, ..., begin:end] = True
    mask = shown if kind == "bool" else torch.zeros(shown.shape).masked_fill(~shown, -math.inf)
    q, do = torch.randn(2, batch, heads, q_len, 16)
    k, v = torch.randn(2, batch, 2, kv_len, 16)
    unseen = ~shown[:, :, 0, :, None]
    dirty = [x.masked_fill(unseen, math.nan) for x in (k, v)]
    scoring = Scoring(attn_mask=mask, dropout_seed=torch.tensor(0), scale=0.25)
    out, stats = reference.forward(q, *dirty, scoring)
    grads = reference.backward(
        do, None, q, *dirty, out, stats, scoring=scoring, mask_grad=kind != "bool"
    )
    ref, eager = (
        math_attention(q, k, v, do, dtype=x, attn_mask=mask, scale=0.25)
        for x in (torch.float64, torch.float32)
    )
    dmask = grads[3] if kind != "bool" else None
    assert_attention_close((out, lse_of(stats, scoring), *grads[:3], dmask), ref, eager)
    lowest = torch.finfo(torch.float32).min
    blind = ~shown.any(-1).expand(batch, heads, q_len)
    assert torch.equal(stats[..., 0] == lowest, blind)


def test_hidden_scores_that_are_no_numbers():
    """Rows that do not see such a key are as if it were another; the others are NaN."""
    q, k, v = torch.randn(3, 1, 8, 128, 16)
    scoring = Scoring(attn_mask=mask_of("bool", 128), dropout_seed=torch.tensor(0), scale=0.25)
    clean, _ = reference.forward(q, k, v, scoring)
    for garbage in (math.nan, math.inf, -math.inf):
        k[..., 100, :] = garbage
        found, _ = reference.forward(q, k, v, scoring)
        torch.testing.assert_close(found[:, :, :100], clean[:, :, :100], rtol=0, atol=1e-6)
        assert not found[:, :, 100:].isfinite().all()


@pytest.mark.parametrize("softcap", (0.0, 30.0))
@pytest.mark.parametrize("garbage", (math.nan, math.inf, -math.inf))
def test_gradients_of_a_key_that_no_row_sees(garbage: float, softcap: float):
    """A boolean mask hides it, which the heads share."""
    q, k, v, do = torch.randn(4, 1, 4, 8, 16)
    mask = (torch.arange(8) != 3).view(1, 1, 1, 8)

    def results(of_key: float) -> tuple[torch.Tensor, ...]:
        k[..., 3, :] = of_key
        x = [x.clone().requires_grad_() for x in (q, k, v)]
        out = orchard_ops.flash_attn(*x, attn_mask=mask, softcap=softcap)
        return out, *torch.autograd.grad(out, x, do)

    for x, y in zip(results(garbage), results(0.0), strict=True):
        assert torch.equal(x, y)


def test_a_mask_that_hides_all_keys_from_all_heads():
    q, k = torch.randn(2, 4, 3, 16), torch.randn(2, 4, 8, 16)
    hidden = torch.zeros(1, 1, 3, 8, dtype=torch.bool)
    assert not orchard_ops.flash_attn(q, k, k, attn_mask=hidden).any()


@pytest.mark.parametrize(("scale", "softcap"), ((1e10, 1e-30), (1e-20, 1e30), (1e30, 1e-20)))
def test_a_scale_far_from_the_softcap(scale: float, softcap: float):
    """Their quotient is no number of float32, or one of few digits."""
    q = torch.tensor([0.0, 1e10, 1e-10]).view(1, 1, 3, 1) / scale / 1e20
    q[..., 1, :] = 1e20 / scale**0.5
    k = torch.tensor([1.0, 2.0]).view(1, 1, 2, 1) * 1e-20 / scale**0.5
    v = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1)
    out, _ = reference.forward(q, k, v, Scoring(scale=scale, softcap=softcap))
    right, _ = reference.forward(
        q.double(), k.double(), v.double(), Scoring(scale=scale, softcap=softcap)
    )
    torch.testing.assert_close(out.double(), right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("device", "most"), (("cpu", 700), ("meta", 325)))
def test_operations_of_a_longer_masked_step(device: str, most: int):
    """Eight times as many scores no longer are one block; 1156 operations were too many."""
    found = computing_operations("additive", device, 32, 2048)
    assert most / 2 < found <= most


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_block_is_as_several(kind: str, monkeypatch: pytest.MonkeyPatch):
    """Also where a score is NaN under a boolean mask, which hides it from rows that do not see
    its key."""
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(2, 8, 70, 16) for _ in range(4))
    k[0, 1, 50] = math.nan
    scoring = Scoring(attn_mask=mask_of(kind, 70), scale=0.3)

    def results() -> list[torch.Tensor]:
        out, row_stats = reference.forward(q, k, v, scoring)
        grads = reference.backward(
            dout, None, q, k, v, out, row_stats, scoring=scoring, mask_grad="gradient" in kind
        )
        return [out, row_stats, *grads]

    single = results()
    monkeypatch.setattr(scores, "CPU_LIMITS", SMALL_BLOCKS)
    for x, y in zip(single, results(), strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)
    if kind == "bool":
        assert single[0][0, 1, :50].isfinite().all() and single[0][0, 1, 50:].isnan().all()


def all_results(device: str, scale: float, dtype: torch.dtype = torch.float32) -> tuple:
    """out, lse, dq, dk, dv of the reference, for blocks that begin within the keys."""
    torch.manual_seed(1)
    q, k, v, dout = (torch.randn(2, h, 40, 16, dtype=dtype).to(device) for h in (4, 2, 2, 4))
    scoring = Scoring(scale=scale, window_left=8, window_right=3)
    out, row_stats = reference.forward(q, k, v, scoring)
    grads = reference.backward(
        dout, None, q, k, v, out, row_stats, scoring=scoring, mask_grad=False
    )[:3]
    return tuple(x.cpu() for x in (out, lse_of(row_stats, scoring), *grads))


FUSED = {"aten::baddbmm", "aten::baddbmm_"}


def test_no_fused_product_on_mps(monkeypatch: pytest.MonkeyPatch):
    """A fused operation in place loses results on mps in some releases, and takes equal scales for
    one."""
    monkeypatch.setattr(scores, "CPU_LIMITS", SMALL_BLOCKS)
    monkeypatch.setattr(scores, "GPU_LIMITS", SMALL_BLOCKS)
    with Operations() as on_cpu:
        expected = all_results("cpu", 0.3)
    with Operations() as on_mps:
        results = all_results("mps", 0.3)
    assert on_cpu.seen >= FUSED  # or the names above are wrong
    assert not any("addbmm" in name or "addmm" in name for name in on_mps.seen)
    for x, y in zip(results, expected):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("scale", (1e39, -1e39, 1e-40, 1e-50, math.inf, math.nan), ids=str)
def test_scales_that_float32_has_no_normal_number_for(
    scale: float, monkeypatch: pytest.MonkeyPatch
):
    """Fused operations give what a product and a multiplication give."""
    results = all_results("cpu", scale)
    monkeypatch.setattr(products, "fuses", lambda total, factor: False)
    for x, y in zip(results, all_results("cpu", scale)):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())
        assert torch.equal(x.isnan(), y.isnan())


def test_a_scale_beyond_float32_is_an_infinite_one():
    for x, y in zip(all_results("cpu", 1e39), all_results("cpu", math.inf)):
        torch.testing.assert_close(x, y, equal_nan=True)


def test_a_scale_beyond_float32_is_a_number_in_float64():
    out, lse, *_ = all_results("cpu", 1e39, torch.float64)
    assert out.isfinite().all()
    assert lse.isfinite().all()


@pytest.mark.parametrize("dtype", (torch.float16, torch.float64), ids=str)
def test_everything_dropped(dtype: torch.dtype):
    """dropout_p = 1, as F.sdpa takes it: zeros, no NaN; lse knows nothing of dropout."""
    q, k, v, dout = (torch.randn(1, 2, 9, 8, dtype=dtype) for _ in range(4))
    scoring = Scoring(dropout_seed=torch.tensor(3), dropout_p=1.0, scale=0.3)
    out, row_stats = reference.forward(q, k, v, scoring)
    _, kept = reference.forward(q, k, v, scoring._replace(dropout_p=0.0))
    assert torch.equal(row_stats, kept)
    grads = reference.backward(
        dout, None, q, k, v, out, row_stats, scoring=scoring, mask_grad=False
    )[:3]
    assert not any(x.any() for x in (out, *grads))
    math = math_attention(
        q, k, v, dout, dtype=torch.float64, **scoring._asdict() | {"dropout_seed": 3}
    )
    assert not any(x.any() for x in (math.out, math.dq, math.dk, math.dv))


@pytest.mark.parametrize("num_kv_heads", (1, 32))
@pytest.mark.parametrize("kv_len", (128, 512, 1024, 2048))
def test_memory_of_many_heads(num_kv_heads: int, kv_len: int):
    """The largest tensor is a block of scores, which stays within what its constants promise."""
    batch, num_heads, head_dim = 8, 32, 4
    q, k, v = (
        torch.randn(batch, h, n, head_dim)
        for h, n in ((num_heads, 80), (num_kv_heads, kv_len), (num_kv_heads, kv_len))
    )
    with torch.profiler.profile(profile_memory=True) as profile:
        orchard_ops.flash_attn(q, k, v)
    largest = max(event.cpu_memory_usage for event in profile.events())
    per_row = 4 * batch * num_heads * kv_len
    assert largest <= max(4 * scores.CPU_LIMITS.most_elements, dropout.GROUP * per_row)
    assert largest >= per_row  # the scores were seen


@pytest.mark.parametrize("masked", (False, True), ids=("plain", "masked"))
def test_memory_is_linear_in_the_length(masked: bool):
    """No tensor of L x S elements per head is ever allocated, as the profiler sees it."""
    length = 4096
    q, k, v = (torch.randn(1, 2, length, 16, requires_grad=True) for _ in range(3))
    mask = torch.ones(length, length, dtype=torch.bool).tril() if masked else None
    with torch.profiler.profile(profile_memory=True) as profile:
        orchard_ops.flash_attn(q, k, v, mask).sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    block = max(scores.CPU_LIMITS.elements, 2 * length * scores.CPU_LIMITS.enough_rows) * 4
    assert block < 2 * length * length * 4 / 2  # or this test could not fail
    assert largest <= block + 2 * length * 16 * 4


def test_a_single_block_has_a_bound():
    """One more row, and a masked call walks over blocks."""
    scoring = Scoring(attn_mask=torch.ones(1, 1, 1, 1024))
    for limits in (scores.CPU_LIMITS, scores.GPU_LIMITS):
        assert limits.whole == 1 << 24  # 64 MiB
        for length, single in ((1024, True), (1025, False)):
            parts = [*scores.blocks(1, 16, length, 1024, scoring, limits)]
            assert (len(parts) == 1) == single
            assert (parts[0].row0, parts[-1].row1) == (0, length)
