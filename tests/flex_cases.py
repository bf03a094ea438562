"""Scores and masks given as functions, in Python and as Metal, and the calls that compare them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from orchard_ops.ops import flex
from orchard_ops.ops.schema import public_lse
from orchard_ops.testing import assert_attention_close
from orchard_ops.testing.mathematics import MathResult, math_attention

SCORE = """
struct ScoreMod {
  static constant constexpr const bool kUnitSlope = %s;
  FlexCaptures captures;
  METAL_FUNC float score(float s, int b, int h, int q, int kv, thread float& derivative) const {
%s
  }
};
"""
MASK = """
struct MaskMod {
  FlexCaptures captures;
  METAL_FUNC bool sees(int b, int h, int q, int kv) const {
    return %s;
  }
};
"""


@dataclass(frozen=True)
class Mod:
    """A function in Python, and the lines of its Metal text: $0, $1 ... are its captures."""

    function: Callable[..., Tensor]
    lines: str
    captures: tuple[Tensor, ...] = ()
    unit_slope: bool = False

    def text(self, kind: str, first_capture: int) -> str:
        lines = self.lines.strip("\n")
        for n in range(len(self.captures)):
            lines = lines.replace(f"${n}", str(first_capture + n))
        if kind == "mask":
            return MASK % lines.strip()
        return SCORE % (str(self.unit_slope).lower(), lines)


def _table(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


HEADS, LONGEST = 4, 300
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
RELATIVE = _table(65, HEADS, seed=1, dtype=torch.float16).mT  # strided
OF_ROW = _table(2 * LONGEST, seed=2, dtype=torch.bfloat16)[::2]
STEPS = torch.arange(LONGEST)[:, None].expand(LONGEST, 3)  # a stride of 0, int64
DOCUMENTS = (torch.arange(LONGEST) // 37).repeat(2, 1).add(torch.tensor([[0], [3]]))
_DRAWN = torch.rand(LONGEST, LONGEST, generator=torch.Generator().manual_seed(3))
# Without an operation that starts threads: the mutation tool imports this file and forks.
PAIRS = torch.tensor([[x < 0.3 for x in row] for row in _DRAWN.tolist()])
EIGHT = (
    torch.tensor(0.5),
    _table(HEADS, seed=4),
    _table(2, HEADS, seed=5),
    _table(2, HEADS, 5, seed=6),
    _table(3, 5, HEADS, 2, seed=7).permute(3, 2, 1, 0),
    _table(LONGEST, seed=8, dtype=torch.float16),
    torch.arange(7, dtype=torch.int32).flip(0),
    torch.tensor([[1, 0, 1], [0, 0, 1]], dtype=torch.bool),
)

OUTSIDE = _table(11, 5, seed=9)


def _clamped(table: Tensor, *indices: Tensor) -> Tensor:
    """What a text reads at indices that may lie beyond the ends."""
    places = (torch.where(i < 0, i + n, i).clamp(0, n - 1) for i, n in zip(indices, table.shape))
    return table[tuple(places)]


SCORES = {
    "none": None,
    "noop": Mod(lambda s, *_: s, "    derivative = 1.0f;\n    return s;", unit_slope=True),
    "softcap": Mod(
        lambda s, *_: 5.0 * torch.tanh(s / 5.0),
        "    const float t = precise::tanh(s / 5.0f);\n"
        "    derivative = 1.0f - t * t;\n    return 5.0f * t;",
    ),
    "alibi": Mod(
        lambda s, b, h, q, kv: s - SLOPES.to(s.dtype)[h] * (q - kv).abs(),
        "    derivative = 1.0f;\n    return s - captures.at<float>($0, h) * float(abs(q - kv));",
        (SLOPES,),
        unit_slope=True,
    ),
    "relative": Mod(
        lambda s, b, h, q, kv: torch.tanh(s) + RELATIVE.to(s.dtype)[h, (q - kv).clamp(-32, 32)],
        "    const float t = precise::tanh(s);\n    derivative = 1.0f - t * t;\n"
        "    return t + float(captures.at<half>($0, h, clamp(q - kv, -32, 32)));",
        (RELATIVE,),
    ),
    "where": Mod(
        lambda s, b, h, q, kv: torch.where(
            q >= kv, s * torch.sigmoid(s) + OF_ROW.to(s.dtype)[q], s * 0.5 - 0.1 * b
        ),
        "    const float g = 1.0f / (1.0f + precise::exp(-s));\n"
        "    derivative = q >= kv ? g + s * g * (1.0f - g) : 0.5f;\n"
        "    return q >= kv ? s * g + float(captures.at<bfloat>($0, q))\n"
        "                   : s * 0.5f - 0.1f * float(b);",
        (OF_ROW,),
    ),
    "steps": Mod(
        lambda s, b, h, q, kv: s + 0.01 * STEPS[q, 2] - 0.01 * STEPS[kv, -3],
        "    derivative = 1.0f;\n"
        "    return s + 0.01f * float(captures.at<long>($0, q, 2)) -\n"
        "           0.01f * float(captures.at<long>($0, kv, -3));",
        (STEPS,),
        unit_slope=True,
    ),
    "eight": Mod(  # of no, one, two, three and four dimensions
        lambda s, b, h, q, kv: (
            s
            + EIGHT[0]
            + EIGHT[1][h]
            + EIGHT[2][b, -1 - h]
            + EIGHT[3][b, h, q % 5]
            + EIGHT[4][b, h, q % 5, kv % 3]
            + EIGHT[5][q]
            + 0.25 * EIGHT[6][kv % 7]
            + 0.5 * EIGHT[7][kv % 2, q % 3]
        ),
        "    derivative = 1.0f;\n"
        "    return s + captures.at<float>($0) + captures.at<float>($1, h) +\n"
        "           captures.at<float>($2, b, -1 - h) + captures.at<float>($3, b, h, q % 5) +\n"
        "           captures.at<float>($4, b, h, q % 5, kv % 3) +\n"
        "           float(captures.at<half>($5, q)) +\n"
        "           0.25f * float(captures.at<int>($6, kv % 7)) +\n"
        "           0.5f * float(captures.at<uchar>($7, kv % 2, q % 3));",
        EIGHT,
        unit_slope=True,
    ),
    "number": Mod(  # a tensor of no dimensions that is not the first
        lambda s, b, h, q, kv: s * EIGHT[0] + 0.1 * SLOPES[h] * kv,
        "    derivative = captures.at<float>($1);\n"
        "    return s * captures.at<float>($1) + 0.1f * captures.at<float>($0, h) * float(kv);",
        (SLOPES, EIGHT[0]),
    ),
    "capped": Mod(  # by the tanh of a text, which is as right as the operands' dtype asks
        lambda s, *_: 5.0 * torch.tanh(s / 5.0),
        "    const float t = flex_tanh(s / 5.0f);\n"
        "    derivative = 1.0f - t * t;\n    return 5.0f * t;",
    ),
    "outside": Mod(  # indices beyond both ends
        lambda s, b, h, q, kv: s + _clamped(OUTSIDE, q - 9, 2 * h) + _clamped(OUTSIDE, -kv, h - 7),
        "    derivative = 1.0f;\n    return s + captures.at<float>($0, q - 9, 2 * h) +\n"
        "           captures.at<float>($0, -kv, h - 7);",
        (OUTSIDE,),
        unit_slope=True,
    ),
    "beyond": Mod(  # no derivative at 0, which is what there is beyond the ends
        lambda s, *_: (s.abs() + 1e-30).sqrt(),
        "    const float root = precise::sqrt(abs(s) + 1e-30f);\n"
        "    derivative = (s < 0.0f ? -0.5f : 0.5f) / precise::sqrt(abs(s));\n"
        "    return root;",
    ),
}
MASKS = {
    "none": None,
    "causal": Mod(lambda b, h, q, kv: q >= kv, "q >= kv"),
    "window": Mod(lambda b, h, q, kv: (q - kv).abs() <= 20, "abs(q - kv) <= 20"),
    "document": Mod(
        lambda b, h, q, kv: DOCUMENTS[b, q] == DOCUMENTS[b, kv],
        "captures.at<long>($0, b, q) == captures.at<long>($0, b, kv)",
        (DOCUMENTS,),
    ),
    "pairs": Mod(lambda b, h, q, kv: PAIRS[q, kv], "captures.at<uchar>($0, q, kv) != 0", (PAIRS,)),
    "batches": Mod(lambda b, h, q, kv: kv < 40 + 30 * b + 0 * q, "kv < 40 + 30 * b"),
    "heads": Mod(lambda b, h, q, kv: (q + kv) % (h + 2) == 0, "(q + kv) % (h + 2) == 0"),
    "eight": Mod(  # of no to four dimensions; each decides
        lambda b, h, q, kv: (
            (EIGHT[0] > 0)
            ^ (EIGHT[1][h] > 0)
            ^ (EIGHT[2][b, -1 - h] > 0)
            ^ (EIGHT[3][b, h, q % 5] > 0)
            ^ (EIGHT[4][b, h, q % 5, kv % 3] > 0)
            ^ (EIGHT[5][q] > 0)
            ^ (EIGHT[6][kv % 7] > 3)
            ^ EIGHT[7][kv % 2, q % 3]
        ),
        "(captures.at<float>($0) > 0.0f) != (captures.at<float>($1, h) > 0.0f) !=\n"
        "        (captures.at<float>($2, b, -1 - h) > 0.0f) !=\n"
        "        (captures.at<float>($3, b, h, q % 5) > 0.0f) !=\n"
        "        (captures.at<float>($4, b, h, q % 5, kv % 3) > 0.0f) !=\n"
        "        (float(captures.at<half>($5, q)) > 0.0f) !=\n"
        "        (captures.at<int>($6, kv % 7) > 3) !=\n"
        "        (captures.at<uchar>($7, kv % 2, q % 3) != 0)",
        EIGHT,
    ),
    "hidden": Mod(
        lambda b, h, q, kv: (kv > 40) & (q != 17) & (kv < 80 + 0 * q),
        "kv > 40 && q != 17 && kv < 80",
    ),
}


@dataclass(frozen=True)
class FlexCase:
    q_len: int
    kv_len: int
    head_dim: int
    score: str = "none"
    mask: str = "none"
    dtype: torch.dtype = torch.float32
    batch: int = 2
    num_kv_heads: int = 2
    value_dim: int | None = None
    states: Tensor | None = field(default=None, compare=False)
    block_q: int = 128
    block_kv: int = 128
    scale: float | None = None

    def operands(self) -> tuple[Tensor, ...]:
        """q, k, v, dout and dlse."""
        generator = torch.Generator().manual_seed(0)
        value_dim = self.value_dim or self.head_dim
        shapes = (
            (self.batch, HEADS, self.q_len, self.head_dim),
            (self.batch, self.num_kv_heads, self.kv_len, self.head_dim),
            (self.batch, self.num_kv_heads, self.kv_len, value_dim),
            (self.batch, HEADS, self.q_len, value_dim),
        )
        q, k, v, do = (torch.randn(s, generator=generator).to(self.dtype) for s in shapes)
        return q, k, v, do, torch.randn(shapes[0][:3], generator=generator)

    def places(self) -> tuple[Tensor, ...]:
        sizes = (self.batch, HEADS, self.q_len, self.kv_len)
        return tuple(
            torch.arange(n).view([-1 if d == at else 1 for d in range(4)])
            for at, n in enumerate(sizes)
        )

    def seen(self) -> Tensor:
        """(B, Hq, L, S): whether a query sees a key, by block_states and the mask."""
        mod, places = MASKS[self.mask], self.places()
        sizes = (self.batch, HEADS, self.q_len, self.kv_len)
        seen = torch.ones(sizes, dtype=torch.bool)
        if mod is not None:
            seen = mod.function(*places).expand(sizes)
        if self.states is None:
            return seen
        rows, cols = places[2].flatten() // self.block_q, places[3].flatten() // self.block_kv
        states = self.states[:, :, rows][..., cols].expand(sizes)
        return (states == 2) | ((states == 1) & seen)

    def math(self, dtype: torch.dtype, *operands: Tensor) -> MathResult:
        mod, places = SCORES[self.score], self.places()
        return math_attention(
            *operands,
            dtype=dtype,
            scale=self.own_scale,
            attn_mask=self.seen(),
            score_mod=None if mod is None else lambda s: mod.function(s, *places),
        )

    @property
    def own_scale(self) -> float:
        return self.scale or 1.0 / math.sqrt(self.head_dim)

    def scoring(self, device: str = "mps") -> flex.FlexScoring:
        score, mask = SCORES[self.score], MASKS[self.mask]
        first = () if score is None else score.captures
        captures = [*first, *(() if mask is None else mask.captures)]
        return flex.FlexScoring(
            [on_device(x, device) for x in captures],
            None if self.states is None else self.states.to(device),
            self.block_q,
            self.block_kv,
            "" if score is None else score.text("score", 0),
            "" if mask is None else mask.text("mask", len(first)),
            self.own_scale,
        )


def on_device(x: Tensor, device: str) -> Tensor:
    """With the strides and the offset that it has."""
    storage = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return storage.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def run(case: FlexCase, *operands: Tensor, scoring: flex.FlexScoring | None = None):
    """out, lse, dq, dk and dv of operands on the device by the ops."""
    q, k, v, do, dlse = operands
    ops = torch.ops.orchard
    scoring = case.scoring(q.device.type) if scoring is None else scoring
    out, row_stats = ops.flex_attn_fwd(q, k, v, *scoring, "metal")
    grads = ops.flex_attn_bwd(do, dlse, q, k, v, out, row_stats, *scoring, "metal")
    return out, public_lse(row_stats, scoring.unit), *grads


def check_case(case: FlexCase, operands: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
    """Runs the case and applies the tolerance rule."""
    operands = case.operands() if operands is None else operands
    ref, eager = case.math(torch.float64, *operands), case.math(case.dtype, *operands)
    results = run(case, *(x.to("mps") for x in operands))
    assert_attention_close(results, ref, eager)
    return results


__all__ = ["HEADS", "MASKS", "SCORES", "FlexCase", "check_case", "on_device", "replace", "run"]
