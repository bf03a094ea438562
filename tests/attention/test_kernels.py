"""The Metal kernels against float64, every variant, in the simulator's check mode."""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    DTYPES,
    Case,
    check_case,
    far_scores,
    kernel_head_dims,
    run,
    uneven_scores,
)
from representative import pairs, product

from orchard_ops.testing import assert_attention_close

pytestmark = pytest.mark.usefixtures("checked")

HEAD_DIMS = kernel_head_dims()
RAGGED = (1, 7, 31, 33, 63, 64, 65, 100, 127, 130, 257)


def ids(case: Case) -> str:
    return str(case)


DROPOUT, ODD = (0.0, 0.25), (0, 1)  # rows of odd heads are no chunks


@pytest.mark.parametrize(
    "head_dim, dtype, dropout_p, odd", pairs(HEAD_DIMS, DTYPES, DROPOUT, ODD), ids=str
)
def test_every_variant(head_dim: int, dtype: torch.dtype, dropout_p: float, odd: int):
    check_case(Case(37, 51, head_dim - odd, dtype=dtype, dropout_p=dropout_p))


STORING_HEAD_DIMS = tuple(d for d in HEAD_DIMS if d >= 64)  # whose backward takes scratch


@pytest.mark.parametrize(
    "head_dim, dtype, dropout_p, odd",
    product(STORING_HEAD_DIMS, tuple(DTYPES), DROPOUT, ODD),
    ids=str,
)
def test_every_variant_without_scratch(
    head_dim: int,
    dtype: torch.dtype,
    dropout_p: float,
    odd: int,
    recording,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("ORCHARD_BACKWARD_SCRATCH_MB", "0")
    case = Case(37, 51, head_dim - odd, dtype=dtype, dropout_p=dropout_p)
    with recording() as launches:
        check_case(case)
    if launches is not None:
        assert not any("_ds_" in launch.kernel for launch in launches)


def test_scratch_is_shared_by_as_many_heads_as_fit(recording, monkeypatch: pytest.MonkeyPatch):
    """dS of a group of two query heads takes 2 x 24 rows of 46 tiles, or 552 KiB, so 1 MiB holds
    one group."""
    case = Case(341, 325, 64, batch=2, num_heads=6, num_kv_heads=3, window_right=0, dropout_p=0.1)
    monkeypatch.setenv("ORCHARD_GPU_CORES", "1")  # which any launch fills
    together = check_case(case)
    monkeypatch.setenv("ORCHARD_BACKWARD_SCRATCH_MB", "1")
    with recording() as launches:
        apart = check_case(case)
    if launches is not None:
        assert sum("dq_from_ds" in launch.kernel for launch in launches) == 6
    for one, other in zip(together, apart):
        assert torch.equal(one.cpu(), other.cpu())


def test_keys_are_divided_where_one_head_does_not_fit(recording, monkeypatch: pytest.MonkeyPatch):
    """dS of one head takes 8 x 1027 tiles of 8 x 8, or 2.006 MiB, so that 2 MiB hold dS of a third
    of the keys of both."""
    case = Case(
        64,
        8210,
        64,
        num_heads=2,
        num_kv_heads=2,
        dtype=torch.float16,
        window_left=2000,
        window_right=6150,
        dropout_p=0.1,
    )
    monkeypatch.setenv("ORCHARD_BACKWARD_SCRATCH_MB", "2")
    monkeypatch.setenv("ORCHARD_GPU_CORES", "1")
    with recording() as launches:
        check_case(case)
    if launches is not None:
        names = [launch.kernel.split("_float16")[0] for launch in launches]
        assert names.count("attention_backward_dq_from_ds") == 3


TILED = {
    "float16 64": (torch.float16, 64, ""),
    "float16 64, float": (torch.float16, 64, "_float"),
    "bfloat16 40": (torch.bfloat16, 40, ""),
    "float32 128": (torch.float32, 128, ""),
}


@pytest.mark.parametrize(
    "name, r, bk, buffers", pairs(TILED, (1, 2), (8, 16, 32), (0, 1, 2)), ids=str
)
def test_other_tiles(
    name: str, r: int, bk: int, buffers: int, recording, monkeypatch: pytest.MonkeyPatch
):
    """The tiles that `bench` may sweep on a device."""
    dtype, head_dim, suffix = TILED[name]
    tile = f"r{r}_k{bk}_b{buffers}{suffix}"
    case = Case(75, 83, head_dim, dtype=dtype, window_right=3, dropout_p=0.1)
    monkeypatch.setenv("ORCHARD_TILES", f"attention_forward={tile}")
    try:
        with recording() as launches:
            check_case(case)
    except RuntimeError as error:  # two staged blocks of 32 x 128 floats are more than 32 KiB
        assert (head_dim, tile[3:]) == (128, "k32_b2") and "names a tile that" in str(error)
    else:
        if launches is not None:
            assert f"_{tile}_" in launches[0].kernel


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_every_multiple_of_8(head_dim: int):
    check_case(Case(33, 40, head_dim, dtype=torch.float16, window_right=0))


@pytest.mark.parametrize("kv_len", RAGGED)
@pytest.mark.parametrize("q_len", RAGGED)
def test_ragged_lengths(q_len: int, kv_len: int):
    check_case(Case(q_len, kv_len, 32))


@pytest.mark.parametrize("kv_len", RAGGED)
@pytest.mark.parametrize("q_len", RAGGED)
def test_ragged_lengths_causal_with_dropout(q_len: int, kv_len: int):
    check_case(Case(q_len, kv_len, 32, dtype=torch.float16, window_right=0, dropout_p=0.1))


BOTTOM_RIGHT = [
    Case(q_len, kv_len, 64, dtype=dtype, window_right=0, diagonal=kv_len - q_len)
    for q_len, kv_len, dtype in (
        (1, 100, torch.float16),
        (33, 130, torch.float32),
        (130, 33, torch.float32),  # the first 97 rows see no key
        (100, 7, torch.bfloat16),
        (65, 65, torch.float16),
    )
]


@pytest.mark.parametrize("case", BOTTOM_RIGHT, ids=ids)
def test_causal_from_the_bottom_right(case: Case):
    check_case(case)


def test_rows_without_a_key_are_zero():
    case = Case(40, 7, 64, window_right=0, diagonal=7 - 40)
    out, lse, dq, _, _ = check_case(case)
    assert not out[:, :, :33].any() and not dq[:, :, :33].any()
    assert torch.isneginf(lse[:, :, :33]).all() and torch.isfinite(lse[:, :, 33:]).all()


WINDOWS = [
    Case(70, 90, 32, window_left=left, window_right=right, diagonal=diagonal, dropout_p=p)
    for left, right, diagonal, p in (
        (5, 0, 0, 0.0),
        (0, 0, 0, 0.0),
        (16, 16, 0, 0.3),
        (-1, 10, -30, 0.0),
        (10, -1, 40, 0.0),
        (3, 2, 200, 0.0),  # no query sees any key
        (3, 2, -200, 0.0),
        (64, 0, 20, 0.2),
    )
]


@pytest.mark.parametrize("case", WINDOWS, ids=ids)
def test_windows(case: Case):
    check_case(case)


HEADS = [
    Case(50, 60, 64, batch=3, num_heads=h, num_kv_heads=kv, dtype=dtype, window_right=0)
    for h, kv, dtype in (
        (1, 1, torch.float32),
        (5, 5, torch.float16),
        (6, 2, torch.bfloat16),
        (8, 1, torch.float32),
    )
]


@pytest.mark.parametrize("case", HEADS, ids=ids)
@pytest.mark.parametrize("dropout_p", (0.0, 0.2))
def test_grouped_heads(case: Case, dropout_p: float):
    check_case(case.but(dropout_p=dropout_p))


@pytest.mark.parametrize("scale", (0.0, -0.2, 1.0, 3.0))
def test_scale(scale: float):
    check_case(Case(45, 52, 32, scale=scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_lse(dtype: torch.dtype):
    case = Case(45, 52, 64, dtype=dtype, window_right=0, diagonal=-10, dropout_p=0.1)
    operands = case.operands()
    dlse = torch.randn(1, 2, 45)
    ref, eager = (case.math(t, *operands, dlse=dlse) for t in (torch.float64, dtype))
    results = run(case, *(x.to("mps") for x in operands), dlse.to("mps"))
    assert_attention_close(results, ref, eager)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_are_bitwise_equal(dtype: torch.dtype):
    case = Case(100, 130, 64, batch=2, num_heads=4, num_kv_heads=2, dtype=dtype, dropout_p=0.1)
    operands = [x.to("mps") for x in case.operands()]
    for first, second in zip(run(case, *operands), run(case, *operands)):
        assert torch.equal(first.cpu(), second.cpu())


LONG = [
    Case(600, 700, 64, dtype=torch.float16, window_right=0, diagonal=100),
    Case(513, 513, 128, dtype=torch.bfloat16, num_heads=1, window_left=200, window_right=0),
    Case(1000, 300, 32, num_heads=1, dropout_p=0.1),
]


@pytest.mark.parametrize("case", LONG, ids=ids)
def test_longer_sequences(case: Case):
    check_case(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_do_not_overflow(dtype: torch.dtype):
    """With scores of several hundred, exponentials must be taken relative to about the row's
    maximum."""
    check_case(Case(60, 80, 64, dtype=dtype, scale=8.0, window_right=0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", (32, 64, 128))
@pytest.mark.parametrize("options", ("plain", "window and dropout"))
def test_origins_of_exponentials_move(dtype: torch.dtype, head_dim: int, options: str):
    """Each row's largest score rises, by less and by more than the step that moves its origin, and
    falls.

    With a window, some rows see their first keys while others move their origin.
    """
    case, operands = uneven_scores(dtype, head_dim)
    if options != "plain":
        case = case.but(window_left=190, window_right=30, diagonal=195, dropout_p=0.2)
    ref, eager = (case.math(t, *operands) for t in (torch.float64, dtype))
    results = run(case, *(x.to("mps") for x in operands))
    assert_attention_close(results, ref, eager)
    assert torch.isfinite(torch.cat([x.flatten().float() for x in results])).all()


def test_far_origins():
    """Beyond 2^27 the next float32 is further away than the slack, and weights must not exceed
    2^8."""
    case, operands = far_scores()
    out, lse = run(case, *(x.to("mps") for x in operands))[:2]
    v = operands[2].double()
    torch.testing.assert_close(
        out.cpu().double(), v[..., 32:, :].mean(-2, True).expand(out.shape), rtol=2e-3, atol=2e-3
    )
    torch.testing.assert_close(lse.cpu().double(), case.math(torch.float64, *operands).lse)


@pytest.mark.parametrize("head_dim", (32, 64))
def test_a_row_does_not_depend_on_its_neighbours(head_dim: int):
    """Rows move their origins together, but each by its own scores alone. Four rows whose largest
    score creeps up by less than the slack stand beside rows of zeros and rows that move.
    """
    case, (q, k, v, do) = uneven_scores(torch.float32, head_dim)
    noise = torch.rand(case.kv_len, generator=torch.Generator().manual_seed(2))
    k[..., 7] = 0.7 * (torch.arange(case.kv_len) // 32) + noise
    q[:, :, :4] = torch.eye(head_dim)[3]  # up at once
    mine = torch.zeros_like(q)
    mine[:, :, 4:8] = q[:, :, 4:8] = torch.eye(head_dim)[7]
    apart = run(case, *(x.to("mps") for x in (mine, k, v, do)))
    together = run(case, *(x.to("mps") for x in (q, k, v, do)))
    for x, y in zip(apart[:2], together[:2]):
        assert torch.equal(x[:, :, 4:8].cpu(), y[:, :, 4:8].cpu())


def test_small_gradients_survive_float16():
    """dS of about 1e-9: below float16's range, though dq and dk of these sizes are within it."""
    case = Case(128, 128, 64, dtype=torch.float16)
    q, k, v, do = case.operands()
    do = do * 2.0**-10
    results = run(case, *(x.to("mps") for x in (q, k, v, do)))
    ref, eager = (case.math(t, q, k, v, do) for t in (torch.float64, torch.float16))
    assert_attention_close(results, ref, eager)
