"""What functions and block masks cost: products, and by model A what a product costs beside them.

The unit of what is seen is a block of 32 queries and 32 keys, as in test_mask_work.py.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from flex_cases import HEADS, FlexCase, replace, run
from torch import Tensor

if sys.platform != "linux":
    pytest.skip("products are counted on the simulated device", allow_module_level=True)

import simulator

from benchmarks.apple_model import counts
from benchmarks.apple_model import flex as model

LENGTH, BLOCK = 256, 32
PRODUCTS = {  # of a pair of fragments, for every 8 of the head dim
    "attention_forward": 2,
    "attention_backward_dkv": 4,
    "attention_backward_dq": 3,
    "attention_backward_dq_from_ds": 1,
}


def blocks_of(seen: Tensor, rows: int, cols: int) -> Tensor:
    return seen.unflatten(3, (-1, cols)).unflatten(2, (-1, rows))


def states_of(seen: Tensor, block: int) -> Tensor:
    """As torch's create_block_mask makes its lists."""
    blocks = blocks_of(seen, block, block)
    some, every = blocks.any(5).any(3), blocks.all(5).all(3)
    return (some.int() + every.int()).to(torch.uint8)


def products(case: FlexCase, seen: Tensor, listed: Tensor | None = None) -> tuple[int, float]:
    """Products of a forward and a backward, of which each kernel does what its blocks of rows ask
    for by `listed`, and those of blocks of 32 queries and 32 keys that hold a pair of `seen`."""
    listed = seen if listed is None else listed
    operands = [x.to("mps") for x in case.operands()]
    with simulator.recording() as launches:
        run(case, *operands)

    def share(of: Tensor, rows: int) -> float:
        return blocks_of(of, rows, BLOCK).any(5).any(3).double().mean().item()

    counted, done, ideal = set(), 0, 0.0
    for launch in launches:
        family = launch.kernel.partition("_float16")[0]
        if family in PRODUCTS:
            counted.add(family)
            r = re.search(r"_r(\d)", launch.kernel)
            dense = PRODUCTS[family] * 2 * HEADS * (LENGTH // 8) ** 2 * (64 // 8)
            own = share(listed, BLOCK * int(r[1]) if r else BLOCK)
            assert 0 < launch.counters.mma <= dense * own, launch.kernel
            done, ideal = done + launch.counters.mma, ideal + dense * share(seen, BLOCK)
    assert len(counted) == 3
    return done, ideal


@pytest.mark.parametrize("block", (None, 64, 128))
@pytest.mark.parametrize("mask", ("causal", "window", "document"))
@pytest.mark.parametrize("scratch", ("0", "64"))
def test_products_follow_the_blocks_that_are_seen(
    mask: str, block: int | None, scratch: str, monkeypatch: pytest.MonkeyPatch
):
    """Each kernel does what its blocks of rows ask for, and all of them together at most 1.15 times
    what blocks of 32 queries and 32 keys would."""
    monkeypatch.setenv("ORCHARD_BACKWARD_SCRATCH_MB", scratch)
    case = FlexCase(LENGTH, LENGTH, 64, "none", mask, torch.float16, num_kv_heads=HEADS)
    seen = case.seen()
    if block is not None:
        states = states_of(seen, block)
        case = FlexCase(LENGTH, LENGTH, 64, "none", mask, torch.float16, 2, HEADS, None, states,
                        block, block)  # fmt: skip
    done, ideal = products(case, seen)
    assert done <= 1.15 * ideal


@pytest.mark.parametrize("scratch", ("0", "64"))
def test_products_of_blocks_that_nobody_sees_would_be_noticed(
    scratch: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ORCHARD_BACKWARD_SCRATCH_MB", scratch)
    case = FlexCase(LENGTH, LENGTH, 64, "none", "causal", torch.float16, num_kv_heads=HEADS)
    seen = case.seen()
    everything = torch.full((1, 1, 2, 2), 2, dtype=torch.uint8)
    done, ideal = products(replace(case, states=everything), seen, seen.new_ones(seen.shape))
    assert done > 1.15 * ideal


@pytest.mark.usefixtures("checked")  # which counts bytes
def test_blocks_that_the_lists_have_whole_ask_no_mask():
    """A mask of a table is not read where block_states know; where they do not, only there."""
    states = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    case = FlexCase(LENGTH, LENGTH, 64, "none", "pairs", torch.float16, 2, HEADS, None, states)
    operands = [x.to("mps") for x in case.operands()]
    read = {}
    for state in (0, 2, 1):
        states[0, 0, 1, 0] = state
        with simulator.recording() as launches:
            run(case, *operands)
        (launch,) = {x.kernel: x for x in launches if "flex_map" in x.kernel}.values()
        read[state] = launch.counters.device_bytes_read
    assert read[0] == read[2]
    pairs = 128 * 128  # of uchar; the map is the same for all batches and heads
    assert read[1] - read[0] == pairs


def _kernels() -> Iterator[Any]:
    """Each family once, at its smallest head_dim; the wider ones are slow."""
    seen: set[str] = set()
    for kernel in sorted(model.KERNELS, key=lambda x: x[2]):
        _, family, head_dim = kernel
        late = family in seen
        seen.add(family)
        yield pytest.param(kernel, id=f"{family} {head_dim}", marks=[pytest.mark.slow] * late)


@pytest.mark.parametrize("kernel", list(_kernels()))
def test_functions_cost_little_more_than_the_fixed_kernels(kernel: tuple[str, str, int]):
    """By model A: nothing where there is none, and 0.3 cycles a product for ALiBi and for tanh. The
    committed record is of these kernels: `python -m benchmarks.apple_model.flex --write`."""
    _, family, head_dim = kernel
    committed = {
        x["score"]: (x["own"], x["fixed"])
        for x in json.loads(model.RECORD.read_text())["cycles"]
        if (x["work"], x["head_dim"]) == (model.WORK[family], head_dim)
    }
    none, plain = model.cycles(family, head_dim, "noop")
    assert none == plain
    for name in ("ALiBi", "tanh"):
        own, fixed = model.cycles(family, head_dim, name)
        assert own <= fixed + 0.3, name
        assert (own, fixed) == pytest.approx(committed[name])


def test_a_function_that_costs_more_would_be_noticed(monkeypatch: pytest.MonkeyPatch):
    """Two more tanh are beyond the limit."""
    dear = model.MODS["tanh"]
    text = dear.text.replace("return 20.0f * t", "return 20.0f * flex_tanh(t + flex_tanh(s))")
    assert text != dear.text
    monkeypatch.setitem(model.MODS, "tanh", model.Mod(text, dear.table, dear.fixed))
    own, fixed = model.cycles(counts.FORWARD, 64, "tanh")
    assert own > fixed + 0.3
    unlike = model.Mod(model.MODS["ALiBi"].text, model.MODS["ALiBi"].table, "")
    monkeypatch.setitem(model.MODS, "noop", unlike)
    own, plain = model.cycles(counts.FORWARD, 64, "noop")
    assert own != plain


@pytest.mark.parametrize("family", (counts.FORWARD, counts.DKV, counts.DQ))
def test_the_model_counts_the_kernels_of_the_plan(family: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ORCHARD_BACKWARD_SCRATCH_MB", "0")
    mod = model.MODS["ALiBi"]
    x = torch.zeros(1, 1, 64, 64, dtype=torch.float16, device="mps")
    table = torch.ones(1, device="mps")
    _, _, _, families, names, texts, *_ = torch.ops.orchard.flex_attn_plan(
        x, x, x, [table], None, 128, 128, mod.text, "", 0.125, "metal"
    )
    own = model.variant(family, "float16", 64, mod, 64, 64)
    at = families.index(own.family)
    hashed = names[at].rpartition("_")[2]
    assert texts[at] == own.instantiation.replace(own.name, f"{own.name}_{hashed}")
