"""The gradient of an additive mask on Metal, for every way in which a mask may broadcast or lie."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from attention_cases import DTYPES, SEED, Case, lse_of
from representative import pairs, product
from torch import Tensor

import orchard_ops
from orchard_ops.testing import assert_attention_close, math_attention

pytestmark = pytest.mark.usefixtures("checked")

SMALL = Case(70, 75, 32, batch=2, num_heads=4, num_kv_heads=2)
EVERY = Case(
    70, 90, 64, batch=2, num_heads=4, num_kv_heads=2, dropout_p=0.2, window_left=30,
    window_right=10, diagonal=3, softcap=3.0, alibi="batch", sinks=True,
)  # fmt: skip
FULL = list(itertools.product((True, False), repeat=4))  # (B, H, L, S) of the mask, or broadcast


def names(full: tuple[bool, ...]) -> str:
    return "".join(name for name, keep in zip("BHLS", full) if keep) or "one"


def drawn_mask(case: Case, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Of that shape; without one, of (B, H, L, S)."""
    shape = shape or (case.batch, case.num_heads, case.q_len, case.kv_len)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype or case.dtype)


def drawn_dlse(case: Case) -> Tensor:
    return torch.randn(case.batch, case.num_heads, case.q_len)


def gradients(
    case: Case, mask: Tensor, dlse: Tensor | None = None, by_rule: bool = True
) -> tuple[Tensor, ...]:
    """dq, dk, dv, dmask, dsinks on Metal; all results have been compared, if by_rule."""
    operands = case.operands()
    q, k, v, dout = (x.to("mps") for x in operands)
    scoring = case.scoring()._replace(attn_mask=mask)
    if scoring.sinks is not None:
        scoring = scoring._replace(sinks=scoring.sinks.float())
    # The whole storage travels, so that the mask lies on the device as it does here.
    storage = torch.empty(0, dtype=mask.dtype).set_(mask.untyped_storage()).to("mps")
    there = storage.as_strided(mask.shape, mask.stride(), mask.storage_offset())
    moved = {
        name: x.to("mps")
        for name in ("alibi_slopes", "sinks", "key_ranges")
        if (x := getattr(scoring, name)) is not None
    }
    on_device = scoring._replace(attn_mask=there, **moved)
    ops = torch.ops.orchard
    out, row_stats = ops.flash_attn_fwd(q, k, v, *on_device, "metal")
    dlse_there = None if dlse is None else dlse.to("mps")
    grads = ops.flash_attn_bwd(
        dout, dlse_there, q, k, v, out, row_stats, *on_device, True, "metal"
    )  # fmt: skip
    assert grads[3].shape == mask.shape and grads[3].dtype == mask.dtype
    if by_rule:
        arguments = scoring._asdict() | {"dropout_seed": SEED}
        ref, eager = (
            math_attention(*operands, dlse, dtype=dtype, **arguments)
            for dtype in (torch.float64, case.dtype)
        )
        results = (out, lse_of(row_stats, scoring), *grads[:4])
        if case.sinks:
            results = (*results, grads[4])
        assert_attention_close(results, ref, eager)
    return tuple(x.cpu() for x in grads)


# ---- what a mask broadcasts over


@pytest.mark.parametrize("full", FULL, ids=names)
@pytest.mark.parametrize("with_dlse", (False, True), ids=("", "dlse"))
def test_every_broadcast(full: tuple[bool, ...], with_dlse: bool):
    """A mask that all keys share moves whole rows: its gradient is that of lse, and 0 without."""
    sizes = (SMALL.batch, SMALL.num_heads, SMALL.q_len, SMALL.kv_len)
    mask = drawn_mask(SMALL, *(n if keep else 1 for n, keep in zip(sizes, full)))
    dmask = gradients(SMALL, mask, drawn_dlse(SMALL) if with_dlse else None)[3]
    assert dmask.any() == (full[3] or with_dlse)


@pytest.mark.parametrize(
    "full, dtype",
    product(tuple(FULL), (torch.float16, torch.float32)),
    ids=lambda x: names(x) if isinstance(x, tuple) else str(x),
)
def test_every_broadcast_with_all_else(full: tuple[bool, ...], dtype: torch.dtype):
    case = EVERY.but(dtype=dtype)
    sizes = (case.batch, case.num_heads, case.q_len, case.kv_len)
    mask = drawn_mask(case, *(n if keep else 1 for n, keep in zip(sizes, full)))
    gradients(case, mask, drawn_dlse(case))


@pytest.mark.parametrize("entries", ((1, 3), (2, 1), (1, 1)), ids=str)
@pytest.mark.parametrize("full", list(itertools.product((True, False), repeat=3)), ids=str)
def test_five_dimensions(entries: tuple[int, int], full: tuple[bool, ...]):
    """(outer, inner, ...), of which either side broadcasts."""
    case = Case(20, 35, 16, batch=6 if entries != (1, 1) else 1, num_heads=2)
    sizes = (case.num_heads, case.q_len, case.kv_len)
    shape = (*entries, *(n if keep else 1 for n, keep in zip(sizes, full)))
    gradients(case, drawn_mask(case, *shape), drawn_dlse(case))


def test_many_windows_share_a_bias(recording):
    """A tile of such a mask is shared by several threadgroups, whose sums are added up."""
    case = Case(17, 18, 16, batch=96, num_heads=3, num_kv_heads=3, dtype=torch.float16)
    with recording() as launches:
        gradients(case, drawn_mask(case, 1, 3, 17, 18, dtype=torch.float32))
    if launches is not None:
        assert any("dmask_sum" in launch.kernel for launch in launches)


@pytest.mark.parametrize(
    "dtype, head_dim, softcap, shape",
    pairs((torch.float16, torch.float32), (64, 128), (0.0, 2.0), ((2, 4), (2, 1), (1, 4), (1, 1))),
    ids=str,
)
def test_biases_of_keys(
    head_dim: int, softcap: float, shape: tuple[int, int], dtype: torch.dtype, recording
):
    """The key's side sums them up, but where a pair of its simdgroups caps scores."""
    case = SMALL.but(head_dim=head_dim, softcap=softcap, dtype=dtype, window_left=50)
    with recording() as launches:
        gradients(case, drawn_mask(case, *shape, 1, case.kv_len))
    if launches is not None:
        computed_again = any("backward_dmask_float" in launch.kernel for launch in launches)
        assert computed_again == (head_dim == 128 and softcap > 0.0)


@pytest.mark.parametrize("window_left", (-1, 40))
@pytest.mark.parametrize("softcap", (0.0, 2.0))
def test_long_columns(softcap: float, window_left: int):
    """Where a bias of keys is computed again, rows beyond 1024 are other threadgroups' part."""
    case = Case(2100, 40, 96, num_heads=2, window_left=window_left, diagonal=-1000, softcap=softcap)
    gradients(case, drawn_mask(case, 1, 2, 1, 40))


# ---- what else a call may have

FEATURES = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi": "batch"},
    "dropout": {"dropout_p": 0.3},
    "causal": {"window_right": 0},
    "window": {"window_left": 9, "window_right": 3, "diagonal": 20},
    "sinks": {"sinks": True},
    "wide values": {"value_dim": 40},
    "narrow values": {"head_dim": 40, "value_dim": 24},
    "odd rows": {"head_dim": 13},
    "one query": {"q_len": 1},
    "one key": {"kv_len": 1},
}


@pytest.mark.parametrize("feature, dtype", product(tuple(FEATURES), tuple(DTYPES)), ids=str)
def test_features(feature: str, dtype: torch.dtype):
    """The mask in float32, beside operands of any dtype."""
    case = SMALL.but(dtype=dtype, **FEATURES[feature])
    mask = drawn_mask(case, 1, case.num_heads, case.q_len, case.kv_len, dtype=torch.float32)
    gradients(case, mask, drawn_dlse(case))


@pytest.mark.parametrize(
    "head_dim, dtype, odd", product((16, 64, 80, 96, 128, 160, 256), tuple(DTYPES), (0, 1)), ids=str
)
def test_every_tile(head_dim: int, dtype: torch.dtype, odd: int):
    case = Case(40, 52, head_dim - odd, batch=2, dtype=dtype)
    gradients(case, drawn_mask(case, 1, 2, 40, 52))


# ---- what a mask hides


def blocks_of_documents(case: Case) -> Tensor:
    """-inf but for the pairs of one document of 25."""
    rows, keys = torch.arange(case.q_len) // 25, torch.arange(case.kv_len) // 25
    hidden = rows.unsqueeze(1) != keys
    return drawn_mask(case, 1, 1, case.q_len, case.kv_len).masked_fill(hidden, -math.inf)


def random_elements(case: Case) -> Tensor:
    mask = drawn_mask(case)
    return mask.masked_fill(drawn_mask(case) > 0.5, -math.inf)


def whole_rows(case: Case) -> Tensor:
    mask = drawn_mask(case)
    mask[:, :, ::3] = -math.inf
    mask[:, :, 32:64] = -math.inf
    return mask


def everything(case: Case) -> Tensor:
    return torch.full((1, 1, 1, case.kv_len), -math.inf)


def rows_of_one_number(case: Case) -> Tensor:
    """What hides a row by -inf where all keys share it."""
    mask = drawn_mask(case, 1, 1, case.q_len, 1)
    mask[:, :, 5:40] = -math.inf
    return mask


def padding(case: Case) -> Tensor:
    mask = drawn_mask(case, case.batch, 1, 1, case.kv_len)
    mask[0, ..., 30:] = -math.inf
    mask[1, ..., :50] = -math.inf
    return mask


HIDING = (
    blocks_of_documents, random_elements, whole_rows, everything, rows_of_one_number, padding
)  # fmt: skip


@pytest.mark.parametrize("sinks", (False, True), ids=("", "sinks"))
@pytest.mark.parametrize("hide", HIDING, ids=lambda f: f.__name__)
def test_hidden_pairs_have_no_gradient(hide: Callable[[Case], Tensor], sinks: bool):
    case = SMALL.but(sinks=sinks)
    mask = hide(case)
    dmask = gradients(case, mask, drawn_dlse(case))[3]
    assert not dmask[mask == -math.inf].any()
    assert dmask.any() == (mask > -math.inf).any()


def test_hidden_keys_may_hold_nan():
    """So do those of padding, which no row sees."""
    case = SMALL.but(batch=1)
    q, k, v, dout = (x.to("mps") for x in case.operands())
    k[:, :, 60:], v[:, :, 60:] = math.nan, math.nan
    mask = drawn_mask(case, 1, 1, 1, case.kv_len)
    mask[..., 60:] = -math.inf
    mask = mask.to("mps").requires_grad_()
    out = orchard_ops.flash_attn(q, k, v, mask, enable_gqa=True, impl="metal")
    (dmask,) = torch.autograd.grad(out, mask, dout)
    assert dmask[..., :60].isfinite().all() and not dmask[..., 60:].any()


# ---- how a mask lies


def transposed(mask: Tensor) -> Tensor:
    return mask.transpose(-1, -2).contiguous().transpose(-1, -2)


def sliced(mask: Tensor) -> Tensor:
    wide = torch.full((*mask.shape[:3], mask.shape[3] + 5), math.nan)
    wide[..., 3:-2] = mask
    return wide[..., 3:-2]


def expanded(mask: Tensor) -> Tensor:
    """One head's elements for all heads: the gradient tells the heads apart."""
    return mask[:, :1].expand(mask.shape)


def expanded_rows(mask: Tensor) -> Tensor:
    return mask[:, :, :1].expand(mask.shape)


def expanded_keys(mask: Tensor) -> Tensor:
    return mask[..., :1].expand(mask.shape)


@pytest.mark.parametrize("kv_len", (75, 76))
@pytest.mark.parametrize(
    "lay", (transposed, sliced, expanded, expanded_rows, expanded_keys), ids=lambda f: f.__name__
)
def test_strides(lay: Callable[[Tensor], Tensor], kv_len: int):
    case = SMALL.but(kv_len=kv_len)
    gradients(case, lay(drawn_mask(case)))


# ---- the same bits


def test_keys_may_be_divided(recording, monkeypatch: pytest.MonkeyPatch):
    """dS of one head takes 8 x 1027 tiles of 8 x 8, 2.006 MiB: three turns of both in 2 MiB."""
    case = Case(64, 8210, 64, num_heads=2, num_kv_heads=2, dtype=torch.float16)
    mask = drawn_mask(case, 1, 1, 1, case.kv_len)
    monkeypatch.setenv("ORCHARD_GPU_CORES", "1")  # which any launch fills
    whole = gradients(case, mask)
    monkeypatch.setenv("ORCHARD_BACKWARD_SCRATCH_MB", "2")
    with recording() as launches:
        divided = gradients(case, mask, by_rule=False)
    if launches is not None:
        assert sum("dq_from_ds" in launch.kernel for launch in launches) == 3
    for x, y in zip(whole[1:4], divided[1:4], strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("shape", ((1, 4, 70, 90), (1, 1, 1, 90), (2, 1, 70, 1)), ids=str)
def test_the_same_bits_each_time_and_with_any_scratch(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    case = EVERY.but(dtype=torch.float16)
    mask, dlse = drawn_mask(case, *shape), drawn_dlse(case)
    first = gradients(case, mask, dlse)
    again = gradients(case, mask, dlse, by_rule=False)
    monkeypatch.setenv("ORCHARD_BACKWARD_SCRATCH_MB", "0")
    without = gradients(case, mask, dlse, by_rule=False)
    for x, y in zip(first, again, strict=True):
        assert torch.equal(x, y)
    assert torch.equal(first[3], without[3])


# ---- from the dS that is stored for dq

STORING = Case(70, 90, 64, batch=2, num_heads=4, num_kv_heads=2, dtype=torch.float16)
STORED = {  # the case, and the mask's shape
    "by head": (STORING, (1, 4, 70, 90)),
    "by sample": (STORING.but(dtype=torch.bfloat16, alibi="batch", sinks=True), (2, 1, 70, 90)),
    "of nobody else": (STORING.but(dropout_p=0.3, value_dim=40), (2, 4, 70, 90)),
    "of all": (STORING.but(window_left=9, window_right=3, diagonal=20), (1, 1, 70, 90)),
    "causal": (STORING.but(window_right=0, dtype=torch.float32), (1, 4, 70, 90)),
    "pairs": (STORING.but(head_dim=128), (1, 1, 70, 90)),
    "ranges": (STORING.but(ranges="any"), (1, 4, 70, 90)),
    "documents": (STORING.but(ranges="documents", dtype=torch.float32), (1, 1, 70, 90)),
    "many": (STORING.but(q_len=17, kv_len=18, batch=80, num_heads=2), (1, 2, 17, 18)),
}


@pytest.mark.parametrize("name, hide", product(tuple(STORED), (False, True)))
def test_from_stored_ds(name: str, hide: bool, recording, monkeypatch: pytest.MonkeyPatch):
    """It is not computed again; without the scratch it is, to the same bits."""
    case, shape = STORED[name]
    mask, dlse = drawn_mask(case, *shape, dtype=torch.float32), drawn_dlse(case)
    if hide:
        mask[..., :40, 30:] = -math.inf
        mask[..., 20:25] = -math.inf
    found = []
    for scratch in ("64", "0"):
        monkeypatch.setenv("ORCHARD_BACKWARD_SCRATCH_MB", scratch)
        with recording() as launches:
            found.append(gradients(case, mask, dlse)[3])
        if launches is not None:
            names_of = [x.kernel for x in launches if "backward_dmask" in x.kernel]
            assert ("dmask_from_ds" in names_of[0]) == (scratch == "64")
            assert len(names_of) == 1 + ("_parts" in names_of[0])
    assert torch.equal(*found)
    assert not found[0][mask == -math.inf].any() and found[0].any()


# ---- through flash_attn


@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
@pytest.mark.parametrize("shape", ((75,), (70, 75), (4, 1, 75), (2, 1, 70, 1)), ids=str)
def test_autograd(shape: tuple[int, ...], compiled: bool, fresh_stats: None):
    operands = SMALL.operands()
    *qkv, dout = (x.to("mps") for x in operands)
    mask = drawn_mask(SMALL, *shape)
    leaf = mask.to("mps").requires_grad_()

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return orchard_ops.flash_attn(q, k, v, bias, enable_gqa=True, is_causal=True)

    function = torch.compile(attend, backend="aot_eager", fullgraph=True) if compiled else attend
    (dmask,) = torch.autograd.grad(function(*qkv, leaf), leaf, dout)
    assert dmask.shape == mask.shape
    stats = orchard_ops.stats()
    assert stats.metal == {"flash_attn_fwd": 1, "flash_attn_bwd": 1} and not stats.reference
    full = mask[(None,) * (4 - mask.dim())]
    ref = math_attention(*operands, dtype=torch.float64, window_right=0, attn_mask=full)
    torch.testing.assert_close(dmask.cpu().double(), ref.dmask.view(shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "shape"),
    [
        (SMALL.but(kv_len=0), (1, 4, 70, 1)),
        (SMALL.but(kv_len=0), (1, 1, 1, 1)),
        (SMALL.but(q_len=0), (2, 1, 1, 75)),
        (SMALL.but(batch=0), (1, 4, 70, 75)),
        (SMALL.but(sinks=True, kv_len=0), (1, 4, 1, 1)),
    ],
    ids=str,
)
def test_nothing_to_sum_is_zero(case: Case, shape: tuple[int, ...]):
    dmask = gradients(case, torch.ones(shape), by_rule=False)[3]
    assert not dmask.any()


@pytest.mark.parametrize("shape", ((1, 1, 512, 512), (4, 1, 1, 512), (1, 4, 512, 1)), ids=str)
def test_memory(shape: tuple[int, ...]):
    """The gradient itself, at most 2 MiB of partial sums, and for a bias of keys (B, Hq, S) floats.

    The gradients of the scores, of the 16 heads here, would take 8 MiB.
    """
    import simulator

    case = Case(512, 512, 16, batch=4, num_heads=4, num_kv_heads=4, dtype=torch.float16)
    q, k, v, dout = (x.to("mps") for x in case.operands())
    mask = drawn_mask(case, *shape).to("mps")
    scoring = case.scoring("mps")._replace(attn_mask=mask)
    ops = torch.ops.orchard
    out, row_stats = ops.flash_attn_fwd(q, k, v, *scoring, "metal")
    peaks = []
    for mask_grad in (False, True):
        simulator.reset_peak()
        before = simulator.memory().allocated
        grads = ops.flash_attn_bwd(
            dout, None, q, k, v, out, row_stats, *scoring, mask_grad, "metal"
        )
        peaks.append(simulator.memory().peak - before)
        del grads
    more = peaks[1] - peaks[0] - mask.numel() * mask.element_size()
    bound = 4 * case.batch * case.num_heads * case.kv_len if shape[2] == 1 else 2 * 1024**2
    assert 0 <= more <= bound + 1024, more
