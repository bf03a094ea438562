"""`orchard_ops.flex_attention`: PyTorch's own results and gradients, on Metal and elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flex_calls import CASES, assert_same, expected, operands, run
from representative import product
from torch import Tensor
from torch.nn.attention import flex_attention as pytorch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask

import orchard_ops
from orchard_ops import OrchardFallbackWarning
from orchard_ops.testing import DTYPES

pytestmark = pytest.mark.usefixtures("fresh_stats")


def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx >= kv_idx


def some(device: str, *shape: int) -> Tensor:
    return torch.randn(shape or (1, 2, 20, 8)).to(device)


def metal() -> dict[str, int]:
    return {name: n for name, n in orchard_ops.stats().metal.items() if n}


# ---- results ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), product(tuple(CASES), DTYPES), ids=str)
def test_metal_gives_the_results_of_pytorch(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    case = CASES[name]
    captured, given = case.captured(), operands(case)
    captured = {n: x.to(dtype) if x.is_floating_point() else x for n, x in captured.items()}
    given = type(given)(*(x.to(dtype).double() for x in given))
    right = expected(monkeypatch, case, given, captured)
    actual = run(orchard_ops.flex_attention, case, given, captured, "mps", dtype)
    assert_same(actual, right, dtype)
    assert sum(metal().values()) == 2
    assert orchard_ops.stats().reference == {}


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_other_devices_give_the_results_of_pytorch(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    case = CASES[name]
    captured, given = case.captured(), operands(case)
    right = expected(monkeypatch, case, given, captured)
    actual = run(orchard_ops.flex_attention, case, given, captured, "cpu", dtype)
    assert_same(actual, right, dtype)


@pytest.mark.parametrize("device", ("cpu", "mps"))
def test_what_is_returned(device: str):
    q = some(device)
    out = orchard_ops.flex_attention(q, q, q)
    assert isinstance(out, Tensor) and out.dtype == q.dtype
    both = orchard_ops.flex_attention(q, q, q, return_lse=True)
    assert isinstance(both, tuple) and both[1].shape == (1, 2, 20)
    assert both[1].dtype == torch.float32
    aux = orchard_ops.flex_attention(q, q, q, return_aux=AuxRequest())[1]
    assert aux.lse is None and aux.max_scores is None


@pytest.mark.parametrize("compiled", (False, True))
@pytest.mark.parametrize("device", ("cpu", "mps"))
def test_the_largest_score_of_each_query(device: str, compiled: bool, quiet_fallback: None):
    q, k = some(device, 2, 4, 20, 8).requires_grad_(), some(device, 2, 2, 33, 8)
    mask = create_block_mask(
        lambda b, h, q_idx, kv_idx: q_idx > kv_idx, None, None, 20, 33, device=device, BLOCK_SIZE=16
    )

    def call(q: Tensor, k: Tensor) -> Any:
        return orchard_ops.flex_attention(
            q, k, k, lambda score, *_: 2.0 * score, mask, enable_gqa=True,
            return_aux=AuxRequest(lse=True, max_scores=True),
        )  # fmt: skip

    function = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    out, aux = function(q, k)
    x = 2.0 * q.detach().cpu() @ k.cpu().repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5
    x = x.masked_fill(torch.arange(20)[:, None] <= torch.arange(33), -torch.inf)
    torch.testing.assert_close(aux.max_scores.cpu(), x.amax(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(aux.lse.cpu(), x.logsumexp(-1), rtol=1e-5, atol=1e-6)
    assert not aux.max_scores.requires_grad and out.requires_grad and aux.lse.requires_grad
    alone = orchard_ops.flex_attention(q, k, k, enable_gqa=True, return_aux=AuxRequest(False, True))
    assert alone[1].lse is None and alone[1].max_scores.shape == (2, 4, 20)
    if device == "mps":  # out is Metal's, and the second pass is named
        assert metal()["flex_attn_fwd"] == 1
        assert all("max_scores is asked for" in reason for reason in orchard_ops.stats().reference)


@pytest.mark.parametrize("device", ("cpu", "mps"))
def test_options_for_tritons_kernels_change_nothing(device: str):
    q = some(device)
    options = {"BLOCK_M": 16, "FORCE_USE_FLEX_ATTENTION": True, "of another release": object()}
    found = orchard_ops.flex_attention(q, q, q, kernel_options=options)
    assert torch.equal(found, orchard_ops.flex_attention(q, q, q))


@pytest.mark.parametrize("device", ("cpu", "mps"))
def test_rows_that_see_nothing(device: str):
    q = some(device).requires_grad_()
    mask = create_block_mask(
        lambda b, h, q_idx, kv_idx: q_idx > kv_idx + 4, None, None, 20, 20, device=device
    )
    out, lse = orchard_ops.flex_attention(q, q, q, block_mask=mask, return_lse=True)
    assert (out[:, :, :5] == 0).all() and (lse[:, :, :5] == -torch.inf).all()
    assert torch.isfinite(lse[:, :, 5:]).all()
    (out.sum() + lse[:, :, 5:].sum()).backward()
    assert torch.isfinite(q.grad).all()


@pytest.mark.parametrize("device", ("cpu", "mps"))
def test_the_lists_of_a_block_mask_say_which_blocks_are_seen(device: str):
    """mask_mod is asked in partial blocks alone, as in PyTorch's compiled kernels."""
    q, k = some(device, 1, 1, 32, 8), some(device, 1, 1, 48, 8)
    blocks = torch.tensor([[0, 2], [1, 0]], dtype=torch.int32, device=device)[None, None]
    partial = torch.tensor([1, 1], dtype=torch.int32, device=device)[None, None]
    full_blocks = torch.tensor([[2, 0], [0, 0]], dtype=torch.int32, device=device)[None, None]
    full = torch.tensor([1, 0], dtype=torch.int32, device=device)[None, None]
    mask = BlockMask.from_kv_blocks(
        partial, blocks, full, full_blocks, BLOCK_SIZE=16, mask_mod=causal, seq_lengths=(32, 48)
    )
    seen = torch.zeros(32, 48, dtype=torch.bool)
    i, j = torch.arange(32)[:, None], torch.arange(48)
    seen[:16, :16] = (i >= j)[:16, :16]
    seen[:16, 32:] = True
    seen[16:, 16:32] = (i >= j)[16:, 16:32]
    out = orchard_ops.flex_attention(q, k, k, block_mask=mask)
    right = torch.nn.functional.scaled_dot_product_attention(q.cpu(), k.cpu(), k.cpu(), seen)
    torch.testing.assert_close(out.cpu(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", ("cpu", "mps"))
def test_one_sequence_of_keys_for_every_sample(device: str):
    """Bq != Bkv: PyTorch takes it where the block mask has the batch of query."""
    q, k = some(device, 3, 2, 20, 8).requires_grad_(), some(device, 1, 2, 20, 8).requires_grad_()
    lengths = torch.tensor([4, 20, 11], device=device)
    mask = create_block_mask(
        lambda b, h, q_idx, kv_idx: kv_idx < lengths[b], 3, None, 20, 20, device=device
    )
    out = orchard_ops.flex_attention(q, k, k, block_mask=mask)
    seen = (torch.arange(20) < lengths.cpu()[:, None])[:, None, None, :]
    q_, k_ = (x.detach().cpu().requires_grad_() for x in (q, k))
    right = torch.nn.functional.scaled_dot_product_attention(
        q_, k_.expand(3, -1, -1, -1), k_.expand(3, -1, -1, -1), seen
    )
    torch.testing.assert_close(out.cpu(), right, rtol=1e-5, atol=1e-5)
    out.sin().sum().backward()
    right.sin().sum().backward()
    torch.testing.assert_close(k.grad.cpu(), k_.grad, rtol=1e-5, atol=1e-5)


def test_autocast_casts_the_operands():
    q = some("mps")
    with torch.autocast("mps", dtype=torch.float16):
        out = orchard_ops.flex_attention(q, q, q, lambda score, *_: 2.0 * score)
    assert out.dtype == torch.float16
    assert metal() == {"flex_attn_fwd": 1}


def test_autocast_leaves_tables_as_they_are():
    q, table = some("mps"), (3 * torch.randn(20)).to("mps")

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + table[kv_idx]

    with torch.autocast("mps", dtype=torch.float16):
        out = orchard_ops.flex_attention(q, q, q, score_mod)
    q = q.half()
    assert torch.equal(out, orchard_ops.flex_attention(q, q, q, score_mod))


@pytest.mark.parametrize("on_metal", (True, False))
def test_what_a_mod_asks_for_in_float64_is_float32(on_metal: bool, quiet_fallback: None):
    """mps has no float64."""
    q, captured = some("mps"), torch.tensor(0.5, dtype=torch.float64)

    def mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        table = torch.tensor([0.5, 2.0], dtype=torch.float64)
        gain = torch.full((), 0.25, dtype=torch.float64, device=score.device)
        found = (score.double() * gain).to(torch.float64) * table[h] * captured
        return found if on_metal else found + 0 * torch.special.i1(score)

    for number in (0.5, -2.0):  # the second call reads it anew
        captured.fill_(number)
        scaled = q.cpu() * 0.25 * number * torch.tensor([0.5, 2.0])[:, None, None]
        right = torch.nn.functional.scaled_dot_product_attention(scaled, q.cpu(), q.cpu())
        torch.testing.assert_close(attend(mod, q).cpu(), right, rtol=1e-5, atol=1e-6)
    assert bool(metal()) == on_metal


def test_second_derivatives_are_refused():
    q = some("mps").requires_grad_()
    out = attend(lambda score, *_: 2.0 * score, q)
    (grad,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize("device", ("cpu", "mps"))
def test_nothing_to_attend_to(device: str):
    none, q = some(device, 1, 2, 0, 8), some(device, 1, 2, 3, 8)

    def mod(score: Tensor, *_: Tensor) -> Tensor:
        return score * 0.75

    assert orchard_ops.flex_attention(none, q, q, mod).shape == (1, 2, 0, 8)
    out, lse = orchard_ops.flex_attention(q, none, none, mod, return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()


def attend(score_mod: Any, q: Tensor) -> Tensor:
    return orchard_ops.flex_attention(q, q, q, score_mod)


# ---- which kernels ------------------------------------------------------------------------------


def test_a_mod_that_does_nothing_is_none(fresh_stats: None):
    q = some("mps")
    plain = orchard_ops.flex_attention(q, q, q)
    same = orchard_ops.flex_attention(
        q,
        q,
        q,
        lambda score, *_: score,
        create_block_mask(pytorch.noop_mask, None, None, 20, 20, device="mps"),
    )
    assert torch.equal(plain, same)
    assert orchard_ops.stats().reference == {}


def test_mods_that_flash_attn_knows_take_its_kernels():
    q = some("mps")
    slopes = torch.tensor([0.5, 0.25]).to("mps")
    known = (
        (lambda score, *_: 5.0 * torch.tanh(score / 5.0), {"softcap": 5.0}),
        (
            lambda score, b, h, i, j: score - slopes[h] * (i - j).abs(),
            {"alibi_slopes": slopes},
        ),
        (lambda score, b, h, i, j: torch.where(i >= j, score, -torch.inf), {"is_causal": True}),
    )
    for score_mod, arguments in known:
        right = orchard_ops.flash_attn(q, q, q, **arguments)
        assert torch.equal(attend(score_mod, q), right)
    assert metal() == {"flash_attn_fwd": 6}


def test_a_score_that_is_detached_has_no_gradient(quiet_fallback: None):
    """Only what is added to the score itself is an additive mask."""
    q, k, v = some("mps").requires_grad_(), some("mps"), some("mps")
    table = torch.randn(20, 20).to("mps").requires_grad_()
    out = orchard_ops.flex_attention(
        q, k, v, lambda score, b, h, i, j: score.detach() + table[i, j]
    )
    out.sin().sum().backward()
    assert q.grad is None or (q.grad == 0).all()
    assert table.grad.abs().max() > 0


def test_what_metal_does_not_run_is_said_once_with_the_operation_and_the_line():
    q = some("mps").requires_grad_()

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return torch.special.i1(score)

    with pytest.warns(OrchardFallbackWarning, match=r"flex_attention.*score_mod: .*bessel_i1"):
        out = orchard_ops.flex_attention(q, q, q, score_mod)
    again = orchard_ops.flex_attention(q, q, q, score_mod)  # pytest turns a warning into an error
    assert torch.equal(out, again)
    (reason,) = orchard_ops.stats().reference
    assert "torch.special.i1(score)" in reason
    assert orchard_ops.stats().fallbacks == 2
    out.sum().backward()
    assert q.grad is not None


def test_strict_refuses_the_reference(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ORCHARD_STRICT", "1")
    q = some("mps")
    with pytest.raises(RuntimeError, match="flex_attention: the Metal kernels cannot run this"):
        orchard_ops.flex_attention(q, q, q, lambda score, *_: torch.special.i1(score))


def test_the_gradient_of_a_captured_tensor_is_never_left_out(quiet_fallback: None):
    q = some("mps")
    gain = torch.tensor([0.5, 2.0]).to("mps").requires_grad_()
    out = orchard_ops.flex_attention(q, q, q, lambda score, b, h, *_: score * gain[h])
    out.sin().sum().backward()
    q_, gain_ = q.cpu(), gain.detach().cpu().requires_grad_()
    right = torch.nn.functional.scaled_dot_product_attention(q_ * gain_[:, None, None], q_, q_)
    right.sin().sum().backward()
    torch.testing.assert_close(gain.grad.cpu(), gain_.grad, rtol=1e-4, atol=1e-5)
    assert "requires grad" in next(iter(orchard_ops.stats().reference))


# ---- errors -------------------------------------------------------------------------------------


def _mask(q_len: int = 20, kv_len: int = 20, batch: int | None = None) -> BlockMask:
    return create_block_mask(causal, batch, None, q_len, kv_len, device="cpu")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        ({"query": torch.zeros(2, 20, 8)}, ValueError, r"query must be \(batch, heads, .*got"),
        ({"query": 1}, TypeError, "query must be a tensor; got int"),
        ({"key": torch.zeros(1, 2, 20, 4)}, ValueError, "key must have query's head_dim 8; got 4"),
        (
            {"value": torch.zeros(1, 2, 19, 8)},
            ValueError,
            "value must have key's length 20; got 19",
        ),
        ({"value": torch.zeros(1, 1, 20, 8)}, ValueError, "value must have key's 2 heads; got 1"),
        ({"query": torch.zeros(1, 4, 20, 8)}, ValueError, "or enable_gqa=True; got 4 and 2"),
        (
            {"query": torch.zeros(1, 3, 20, 8), "enable_gqa": True},
            ValueError,
            "must be a multiple of .* key/value heads; got 3 and 2",
        ),
        ({"query": torch.zeros(3, 2, 20, 8)}, ValueError, "batch size 3, .*got 1 and no block"),
        ({"query": torch.zeros(1, 2, 20, 8).half()}, TypeError, "same dtype; got torch.float16"),
        ({"query": torch.zeros(1, 2, 20, 8, device="meta")}, ValueError, "same device; got meta"),
        ({"score_mod": 2.0}, TypeError, "score_mod must be a function .*got a float"),
        ({"scale": torch.ones(())}, TypeError, "scale must be a number .*got a tensor: multiply"),
        ({"scale": "a"}, TypeError, "scale must be a number or None; got a str, 'a': None is"),
        ({"scale": True}, TypeError, "scale must be a number or None; got a bool, True: None is"),
        ({"scale": float("nan")}, ValueError, "scale must be finite in float32; got nan: None is"),
        ({"scale": 1e300}, ValueError, "scale must be finite in float32; got 1e[+]300: None is"),
        ({"block_mask": torch.ones(20, 20)}, TypeError, "must be a torch.*BlockMask.*got a Tensor"),
        ({"block_mask": _mask(19)}, ValueError, "made for 19 queries and 20 keys; got 20 and 20"),
        ({"block_mask": _mask(128, 128)[:, :, :1]}, ValueError, "was sliced"),
        ({"block_mask": _mask(batch=2)}, ValueError, "batch size of block_mask must be 1 or .*got"),
        ({"return_lse": True, "return_aux": AuxRequest(lse=True)}, ValueError, "both given: pass"),
        ({"kernel_options": 16}, TypeError, "kernel_options must be a dict or None; got a int"),
        (
            {"score_mod": lambda score, b, h, i, j: score if i > j else 0 * score},
            TypeError,
            "must not read the value of a tensor in Python",
        ),
    ),
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str):
    x = torch.zeros(1, 2, 20, 8)
    with pytest.raises(error, match=f"flex_attention: .*{message}"):
        orchard_ops.flex_attention(**{"query": x, "key": x, "value": x} | change)


def test_a_captured_tensor_on_another_device():
    q, table = some("mps"), torch.zeros(2)
    with pytest.raises(ValueError, match="score_mod captures must be on query's device mps"):
        attend(lambda score, b, h, q_idx, kv_idx: score + table[h], q)


def test_report_lists_the_calls(quiet_fallback: None):
    q = some("mps").requires_grad_()
    with orchard_ops.report(show=False) as report:
        for _ in range(2):
            attend(lambda score, *_: 2.0 * score, q).sum().backward()
        attend(lambda score, *_: torch.special.i1(score), q)
    found = [(call.count, call.direction, call.path, call.arguments) for call in report.calls]
    assert found == [
        (2, "forward", "metal", "flex_attention, score_mod"),
        (2, "backward", "metal", "flex_attention, score_mod"),
        (1, "forward", "reference", "flex_attention, score_mod"),
    ]
    assert "bessel_i1" in report.calls[2].reason
    assert report.bytes_not_allocated == 2 * (2 * 20 * 20 * 4)


def _twice(score: Tensor, *_: Tensor) -> Tensor:
    return 2.0 * score


@pytest.mark.parametrize("masked", (False, True))
def test_the_kernels_that_are_said_are_launched(masked: bool, recording: Any):
    q = some("mps").requires_grad_()
    strictly = create_block_mask(
        lambda b, h, i, j: i > j, None, None, 20, 20, device="mps", BLOCK_SIZE=8
    )
    given = (q, q, q, _twice, strictly if masked else None)
    said = orchard_ops.explain_call(orchard_ops.flex_attention, *given)
    assert metal() == {} and said.path == "metal" and said.advice == ""
    with orchard_ops.report(show=False) as report, recording() as launches:
        orchard_ops.flex_attention(*given).sin().sum().backward()
    forward, backward = (call.kernels for call in report.calls)
    assert (forward, backward) == (said.forward_kernels, said.backward_kernels)
    assert any("dq" in name and "flex" in name for name in backward)
    if launches is not None:
        names = list(dict.fromkeys(x.kernel for x in launches))
        assert names == list(dict.fromkeys((*forward, *backward)))
    with torch.no_grad():
        alone = orchard_ops.explain_call(orchard_ops.flex_attention, *given)
    assert alone.kernels == forward


def test_explain_call_of_a_known_mod_names_the_fixed_kernels():
    q = some("mps").requires_grad_()
    mask = create_block_mask(causal, None, None, 20, 20, device="mps")
    said = orchard_ops.explain_call(orchard_ops.flex_attention, q, q, q, None, mask)
    assert said == orchard_ops.explain_call(orchard_ops.flash_attn, q, q, q, is_causal=True)
    assert said.path == "metal" and said.backward_kernels


def test_explain_call_says_why_the_reference_runs(monkeypatch: pytest.MonkeyPatch):
    q, on_cpu = some("mps"), some("cpu")

    def asked(q: Tensor, mod: Any) -> Any:
        return orchard_ops.explain_call(orchard_ops.flex_attention, q, q, q, mod)

    elsewhere = asked(on_cpu, _twice)
    assert (elsewhere.path, elsewhere.advice) == ("reference", 'move them to "mps"')
    said = asked(q, lambda score, *_: torch.special.i1(score))
    assert said.path == "reference" and "torch.special.i1(score)" in said.reason
    assert "docs/flex-attention.md" in said.advice and said.kernels == ()
    monkeypatch.setenv("ORCHARD_STRICT", "1")
    assert asked(q, lambda score, *_: torch.special.i1(score)).path == "raises"
    assert orchard_ops.stats().reference == {} and metal() == {}
