"""Plans are remembered: one per problem, never mistaken for another's, a bounded number."""

from __future__ import annotations

import random
import threading

import pytest
import simulator
import torch
import torch.nn.functional as F
from counted import Counted, qkv

import orchard_ops
from orchard_ops.scoring import Scoring

MOST_PLANS = 256  # native/plan/plan_cache.h
OPERANDS = ("q", "k", "v", "out", "dout")
TOLERANCE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
}
SCALARS = {
    "dropout_p": 0.0,
    "scale": 0.2,
    "window_left": -1,
    "window_right": -1,
    "diagonal": 0,
}


def problem() -> dict:
    """A call of the functional ops: dense float32 operands and the numbers of the scoring."""
    q, k, v = (x.detach() for x in qkv(dtype=torch.float32))
    out, row_stats = (
        x.contiguous()
        for x in torch.ops.orchard.flash_attn_fwd(q, k, v, *scoring(SCALARS), "reference")
    )
    operands = dict(zip(OPERANDS, (q, k, v, out, torch.randn_like(out))))
    return {**operands, "row_stats": row_stats, **SCALARS}


def scoring(call: dict) -> Scoring:
    return Scoring(dropout_seed=torch.tensor(3), **{name: call[name] for name in SCALARS})


def run_op(passes: str, call: dict, impl: str = "metal") -> tuple[torch.Tensor, ...]:
    """out and row_stats, or dq, dk and dv."""
    q, k, v, out, dout = (call[name] for name in OPERANDS)
    if passes == "forward":
        return torch.ops.orchard.flash_attn_fwd(q, k, v, *scoring(call), impl)
    return torch.ops.orchard.flash_attn_bwd(
        dout, None, q, k, v, out, call["row_stats"], *scoring(call), False, impl
    )[:3]


def with_row_stride(x: torch.Tensor) -> torch.Tensor:
    """The same values in rows that lie further apart, from the same offset."""
    return F.pad(x, (0, 8))[..., : x.shape[-1]]


def with_batch_stride(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (0, 0, 0, 0, 0, 1))[:, : x.shape[1]]


def with_head_stride(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (0, 0, 0, 1))[:, :, : x.shape[2]]


def with_column_stride(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def with_offset(x: torch.Tensor) -> torch.Tensor:
    """The same values and strides, one element further in memory: unaligned."""
    storage = torch.zeros(x.numel() + 1, device=x.device, dtype=x.dtype)
    storage[1:] = x.flatten()
    return storage[1:].view(x.shape)


LAYOUTS = (with_batch_stride, with_head_stride, with_row_stride, with_column_stride, with_offset)


class TestPlans:
    def test_one_per_problem(self):
        leaves = qkv(requires_grad=True)

        def step() -> None:
            orchard_ops.flash_attn(*leaves, enable_gqa=True, window_left=5).sum().backward()

        step()
        step()  # where the first one has filled the cache, which then forgets all
        with Counted() as counted:
            for _ in range(3):
                step()
        assert counted.num_plans == 0
        with Counted() as counted:
            orchard_ops.flash_attn(
                *(x.detach()[:, :, 1:] for x in leaves), enable_gqa=True, window_left=5
            )
        assert counted.num_plans == 1

    @pytest.mark.parametrize("passes", ("forward", "backward"))
    def test_packed_batches_of_ever_new_lengths_share_plans(self, passes: str):
        """key_span is no part of a forward's plan, and that of a backward's as far as it decides
        the memory for dS: in steps of 64 keys."""
        tokens, heads, head_dim = 640 + len(passes), 2, 64  # no other test has these shapes
        q, k, v = (
            torch.randn(tokens, heads, head_dim, device="mps").requires_grad_() for _ in range(3)
        )

        def step(longest: int) -> None:
            lengths = [longest] * (tokens // longest)
            ends = torch.tensor([0, *lengths, tokens - sum(lengths)]).cumsum(0).to("mps").int()
            out = orchard_ops.flash_attn_varlen_func(
                q, k, v, ends, ends, longest, longest, causal=True
            )
            if passes == "backward":
                out.sum().backward()

        def num_plans(*longest: int) -> int:
            with Counted() as counted:
                for length in longest:
                    step(length)
            return counted.num_plans

        # 8 queries see keys within max_seqlen + 7, which may begin anywhere in a block of 8.
        assert num_plans(100) == {"forward": 1, "backward": 2}[passes]
        assert num_plans(*range(60, 114, 6)) == 0
        expected = {"forward": (0, 0, 0), "backward": (1, 1, 0)}[passes]
        assert (num_plans(130), num_plans(40), num_plans(135, 170, 45, 48)) == expected

    def check_not_mistaken(self, passes: str, changed: dict, call: dict) -> None:
        """Though `call`'s plan is remembered, `changed` gets a plan of its own and runs by it."""
        run_op(passes, call)
        with Counted() as counted:
            run_op(passes, call)
        assert counted.num_plans == 0
        with Counted() as counted:
            results = run_op(passes, changed)
        assert counted.num_plans == 1
        expected = run_op(passes, changed, "reference")
        if passes == "forward":  # only the sum of a row's two statistics is the same on both paths
            results, expected = ((out, stats.sum(-1)) for out, stats in (results, expected))
        for x, y in zip(results, expected, strict=True):
            torch.testing.assert_close(x, y, **TOLERANCE[x.dtype])

    @pytest.mark.parametrize("passes", ("forward", "backward"))
    @pytest.mark.parametrize(
        ("name", "number"),
        (
            ("scale", 0.5),
            ("window_left", 3),
            ("window_right", 2),
            ("diagonal", 5),
            ("dropout_p", 0.5),
        ),
    )
    def test_numbers_tell_plans_apart(self, passes: str, name: str, number: float):
        call = problem() | {"window_left": 9, "window_right": 9}
        changed = call | {name: number}
        changed["out"], changed["row_stats"] = run_op("forward", changed, "reference")
        self.check_not_mistaken(passes, changed, call)

    @pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
    @pytest.mark.parametrize(
        ("passes", "name"),
        [("forward", name) for name in OPERANDS[:3]] + [("backward", name) for name in OPERANDS],
    )
    def test_layouts_tell_plans_apart(self, passes: str, name: str, layout):
        call = problem()
        changed = call | {name: layout(call[name])}
        assert torch.equal(changed[name], call[name])
        self.check_not_mistaken(passes, changed, call)

    @pytest.mark.parametrize("passes", ("forward", "backward"))
    def test_dtypes_tell_plans_apart(self, passes: str):
        call = problem()
        changed = call | {name: call[name].half() for name in OPERANDS}
        self.check_not_mistaken(passes, changed, call)

    def test_forward_and_backward_have_plans_of_their_own(self):
        call = problem() | {"scale": 0.123}
        for passes in ("forward", "backward"):
            with Counted() as counted:
                run_op(passes, call)
            assert counted.num_plans == 1

    def test_a_bounded_number_is_remembered(self):
        q, k, v = qkv()
        remembered = []

        def num_plans(scale: int) -> int:
            with Counted() as counted:
                orchard_ops.flash_attn(q, k, v, enable_gqa=True, scale=float(scale))
            remembered.append(torch.ops.orchard.plans_remembered())
            return counted.num_plans

        last = MOST_PLANS + 50
        with simulator.recording(execute=False):
            assert sum(map(num_plans, range(1, last + 1))) == last
            assert num_plans(last) == 0
            assert num_plans(1) == 1  # forgotten
        assert min(remembered) >= 1
        assert max(remembered) == MOST_PLANS

    def test_threads_that_make_each_other_forget(self):
        """More problems than are remembered, met by all threads at once: each gets its plan."""
        num_threads, num_problems = 4, MOST_PLANS + 50
        ones = torch.ones(1, 1, 1, 16, device="mps")
        start, done, wrong = threading.Barrier(num_threads), [], []

        def work(number: int) -> None:
            scales = random.Random(number).sample(range(num_problems), num_problems)
            start.wait()
            for scale in scales:
                call = SCALARS | {"scale": float(scale)}
                _, row_stats = torch.ops.orchard.flash_attn_fwd(
                    ones, ones, ones, *scoring(call), "metal"
                )
                lse = row_stats.sum().item() * scoring(call).unit
                if abs(lse - 16 * scale) > 1e-5 * 16 * scale:
                    wrong.append((scale, lse))
                if torch.ops.orchard.plans_remembered() > MOST_PLANS:
                    wrong.append(scale)
            done.append(number)

        with Counted() as counted:
            threads = [threading.Thread(target=work, args=(n,)) for n in range(num_threads)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(done) == num_threads
        assert not wrong
        assert counted.num_plans > num_problems  # some were forgotten and made again
