"""explain_call: what any function of the package would do, and that asking does nothing."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import orchard_ops
from orchard_ops import (
    explain,
    explain_call,
    flash_attn,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from orchard_ops.cache import CacheCall

CALLS: dict[str, dict[str, Any]] = {
    "one query": {},
    "new keys": {"new": 2},
    "16 queries": {"q_len": 16},
    "17 queries": {"q_len": 17, "causal": True},
    "pages": {"page_size": 16, "new": 1, "softcap": 2.0},
    "odd pages": {"page_size": 8},
    "pages, many queries": {"page_size": 16, "q_len": 20, "new": 20},
    "odd widths": {"width": 20, "new": 1},
}


def cached(
    device: str,
    q_len: int = 1,
    new: int = 0,
    page_size: int = 0,
    width: int = 64,
    **rest: Any,
) -> dict[str, Any]:
    shape = (128 // page_size, page_size) if page_size else (2, 64)
    arguments = {
        "q": torch.randn(2, q_len, 4, width),
        "k_cache": torch.randn(*shape, 2, width),
        "v_cache": torch.randn(*shape, 2, width),
        "cache_seqlens": torch.tensor([20, 3], dtype=torch.int32),
        **rest,
    }
    if new:
        arguments |= {name: torch.randn(2, new, 2, width) for name in ("k", "v")}
    if page_size:
        arguments["block_table"] = torch.arange(shape[0]).view(2, -1).int()
    return {n: x.to(device) if isinstance(x, Tensor) else x for n, x in arguments.items()}


def packed(device: str, q_len: int, page_size: int) -> dict[str, Any]:
    of = cached(device, q_len=q_len, page_size=page_size)
    of["q"] = of["q"].flatten(0, 1)
    of["k"], of["v"] = of.pop("k_cache"), of.pop("v_cache")
    del of["cache_seqlens"]
    of["cu_seqlens_q"] = torch.arange(3, device=device) * q_len
    of["cu_seqlens_k"] = torch.tensor([0, 20, 23], device=device)
    return of | {"max_seqlen_q": q_len, "max_seqlen_k": 20}


@pytest.mark.parametrize("name", CALLS)
def test_its_kernels_are_those_that_run(name: str, recording, fresh_stats: None):
    arguments = cached("mps", **CALLS[name])
    kept = {n: x.clone() for n, x in arguments.items() if isinstance(x, Tensor)}
    with recording() as asked:
        found = explain_call(flash_attn_with_kvcache, **arguments)
    assert not asked, "nothing runs"
    assert not orchard_ops.stats().reference
    for n, x in kept.items():
        assert torch.equal(arguments[n], x), n
    assert found.path == "metal" and set(found.tiles) == set(found.kernels)
    with recording() as launches:
        flash_attn_with_kvcache(**arguments)
    assert found.kernels and ran(launches) in (None, set(found.kernels))


def ran(launches: list | None) -> set[str] | None:
    """Our kernels of a record; a Mac keeps none."""
    if launches is None:
        return None
    return {x.kernel for x in launches if x.kernel.startswith("attention")}


@pytest.mark.parametrize("page_size", (8, 16))
@pytest.mark.parametrize("q_len", (2, 20))
def test_packed_queries(q_len: int, page_size: int, recording):
    arguments = packed("mps", q_len, page_size)
    found = explain_call(flash_attn_varlen_func, **arguments)
    with recording() as launches:
        flash_attn_varlen_func(**arguments)
    assert found.kernels and ran(launches) in (None, set(found.kernels))


def test_other_functions_too():
    """As `explain`, the backward where one can follow; and no number of dropout is drawn."""
    q = torch.randn(1, 2, 40, 64, device="mps", requires_grad=True)
    torch.manual_seed(3)
    assert explain_call(flash_attn, q, q, q, dropout_p=0.5) == explain(q, q, q, dropout_p=0.5)
    left = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), left)
    heads_last = q.detach().transpose(1, 2)
    alone = explain_call(flash_attn_func, heads_last, heads_last, heads_last)
    assert alone.forward_kernels and not alone.backward_kernels and alone.scratch_bytes == 0


@torch.no_grad()
def test_compiled_functions():
    """They are explained as what they were made of, and compile afterwards."""
    torch._dynamo.reset()
    arguments = cached("mps")
    compiled = torch.compile(flash_attn_with_kvcache, backend="aot_eager", fullgraph=True)
    expected = explain_call(flash_attn_with_kvcache, **arguments)
    assert explain_call(compiled, **arguments) == expected and expected.kernels
    assert torch.equal(compiled(**arguments), flash_attn_with_kvcache(**arguments))


def test_ops():
    of = cached("mps", page_size=8)
    heads_first = [of[n].transpose(1, 2) for n in ("q", "k_cache", "v_cache")]
    call = CacheCall(*heads_first, block_table=of["block_table"])
    found = explain_call(torch.ops.orchard.flash_attn_decode, *call)
    assert (found.path, found.reason) == (
        "reference",
        "the page size is not a multiple of 16 (got 8)",
    )


def test_why_not_metal(monkeypatch: pytest.MonkeyPatch):
    found = explain_call(flash_attn_with_kvcache, **cached("cpu", new=1))
    assert (found.path, found.reason) == ("reference", "the tensors are on cpu, not on mps")
    assert found.advice == 'move them to "mps"' and not found.kernels
    wide = cached("mps", width=257)
    found = explain_call(flash_attn_with_kvcache, **wide)
    assert (found.path, found.reason) == ("reference", "head_dim is above 256 (got 257)")
    monkeypatch.setenv("ORCHARD_STRICT", "1")
    assert explain_call(flash_attn_with_kvcache, **wide).path == "raises"
    with pytest.raises(RuntimeError, match="head_dim is above 256"):
        flash_attn_with_kvcache(**wide)


def test_what_is_refused_is_refused():
    arguments = cached("mps") | {"cache_seqlens": 1.5}
    with pytest.raises(TypeError, match=r"cache_seqlens must be an integer; got 1\.5"):
        explain_call(flash_attn_with_kvcache, **arguments)
    with pytest.raises(ValueError, match="explain_call: add calls no attention of this package"):
        explain_call(torch.add, torch.ones(1), 1)
    # Nothing of that is left behind.
    flash_attn_with_kvcache(**cached("mps"))


def test_calls_of_other_threads_run():
    results = []

    def attention(*_: Any) -> Tensor:
        thread = threading.Thread(
            target=lambda: results.append(flash_attn_with_kvcache(**cached("cpu")))
        )
        thread.start()
        thread.join()
        return flash_attn_with_kvcache(**cached("cpu"))

    assert explain_call(attention).path == "reference"
    assert results[0].shape == (2, 1, 4, 64)
