"""Problems whose results are known to the bit, however large the scores are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .attention import Attention
from .cases import DTYPES, SEED, Case

_ONE, _FREE = 3, 5  # columns of v and dout


def cases() -> Iterator[Case]:
    """Two keys for each column: as many as can be far from each other."""
    for dtype, dim, scratch_bytes in itertools.product(DTYPES, (40, 64, 128, 256), (0, 64 << 20)):
        yield Case(
            2 * dim,
            2 * dim,
            dim,
            dtype,
            batch=2,
            num_heads=3,
            num_kv_heads=3,
            scale=0.5,
            window_right=0 if scratch_bytes else -1,
            scratch_bytes=scratch_bytes,
            has_dlse=True,
        )


def _operands(case: Case, device: str) -> dict[str, Tensor]:
    """Row i scores 10^4 to 10^9 with key i, and at most 0 with any other key."""
    row = torch.arange(case.q_len, device=device)
    size = (401.0 + 97.0 * row).to(case.dtype) * (-1.0) ** row
    shape = (case.batch, case.num_heads, case.q_len, case.head_dim)
    q = torch.zeros(shape, dtype=case.dtype, device=device)
    q[..., row, row // 2] = size.to(case.dtype)
    generator = torch.Generator(device).manual_seed(SEED)
    v, dout = torch.randn((2, *shape), generator=generator, device=device).to(case.dtype)
    # dout v is 1 in each row, and dlse takes that from delta.
    dout[...] = dout * (torch.arange(case.head_dim, device=device) == _FREE)
    v[..., _FREE] = 0.0
    v[..., _ONE] = dout[..., _ONE] = 1.0
    return {"q": q, "k": q.clone(), "v": v, "dout": dout}


def check(attention: Attention, case: Case) -> None:
    """All of a row's weight is on one key: out is v, dv dout, and dS the identity.

    Raises:
        AssertionError: a result differs.
    """
    x = _operands(case, attention.outputs.device)
    q, k, v, dout = x.values()
    dlse = torch.ones(q.shape[:3], device=q.device)
    out, row_stats = attention.forward(q, k, v, case.scoring)
    dq, dk, dv = attention.backward(dout, dlse, q, k, v, out, row_stats, case.scoring)
    scale_log2 = torch.tensor(0.5 / math.log(2), dtype=torch.float32, device=q.device)
    score = q.float().square().sum(-1) * scale_log2
    expected = {
        "out": (out, v),
        "dv": (dv, dout),
        "dq": (dq, k * 0.5),
        "dk": (dk, q * 0.5),
        "row_stats": (row_stats, torch.stack((score, torch.zeros_like(score)), -1)),
    }
    for name, (result, exact) in expected.items():
        if not torch.equal(result, exact):
            wrong = (result != exact).sum().item()
            raise AssertionError(f"{name}: {wrong} of {exact.numel()} elements differ")
