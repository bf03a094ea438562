"""FlashAttention's rule: as right as PyTorch's own mathematics in the same dtype, twice over.

An implementation's error against float64 may be a small multiple of the error that unfused math
makes in the same dtype on the same inputs, plus a rounding floor. The tolerance thereby follows the
dtype, the size and the mask by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .mathematics import MathResult, largest

OUT_FACTOR = 2.0
GRAD_FACTOR = 3.0


def _max_error(x: Tensor, ref: Tensor) -> float:
    return largest(x.double() - ref.double())


def assert_no_worse_than_math(
    name: str,
    x: Tensor,
    ref: Tensor,
    eager: Tensor,
    factor: float,
    floor: float = 0.0,
    least: float = 0.0,
) -> None:
    """max|x - ref| <= factor * max|eager - ref| + a rounding floor; x's NaN and inf must be ref's.

    The rounding floor is half a unit in the last place of the largest |ref|, plus factor * `floor`.
    The whole is at least `least`: among few elements, eager's largest error and the largest |ref|
    can both be small by luck.

    Args:
        name: what is compared, for the message.
        x: the result under test.
        ref: float64 mathematics.
        eager: same-dtype mathematics.
        factor: `OUT_FACTOR` or `GRAD_FACTOR`.
        floor: further rounding the comparison must grant, `MathResult.rounding`.
        least: what it must grant in any case, `MathResult.rounded_weights`.

    Raises:
        AssertionError: with both errors and the tolerance.
    """
    x, ref, eager = x.detach().cpu(), ref.detach().cpu(), eager.detach().cpu()
    if x.shape != ref.shape:
        raise AssertionError(f"{name}: shape {tuple(x.shape)}, expected {tuple(ref.shape)}")
    finite = torch.isfinite(ref)
    special = torch.nan_to_num(x.double(), nan=7.0, posinf=8.0, neginf=9.0)[~finite]
    expected = torch.nan_to_num(ref.double(), nan=7.0, posinf=8.0, neginf=9.0)[~finite]
    if not torch.equal(special, expected) or not torch.isfinite(x[finite]).all():
        raise AssertionError(f"{name}: NaN or infinity where the reference has none, or none where")
    x, ref, eager = x[finite], ref[finite], eager[finite]
    floor = torch.finfo(x.dtype).eps / 2 * largest(ref) + factor * floor
    error, eager_error = _max_error(x, ref), _max_error(eager, ref)
    tolerance = max(factor * eager_error + floor, least)
    if not error <= tolerance:
        raise AssertionError(
            f"{name}: max error {error:.3e} exceeds {tolerance:.3e} "
            f"({factor} x {eager_error:.3e} of same-dtype math + {floor:.1e}, at least {least:.1e})"
        )


def assert_attention_close(
    results: Sequence[Tensor | None], ref: MathResult, eager: MathResult, label: str = ""
) -> None:
    """Applies the rule to (out, lse, dq, dk, dv, dmask, dsinks), or to the first few of them.

    None stands for a result that is not compared.
    """
    names = ("out", "lse", "dq", "dk", "dv", "dmask", "dsinks")
    for name, x in zip(names, results):
        if x is None:
            continue
        is_grad = name.startswith("d")
        assert_no_worse_than_math(
            f"{label}{name}", x, getattr(ref, name), getattr(eager, name),
            GRAD_FACTOR if is_grad else OUT_FACTOR,
            ref.rounding(name, eager.out.dtype),
            ref.rounded_weights(name, eager.out.dtype),
        )  # fmt: skip
