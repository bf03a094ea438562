"""What "right" means: float64 mathematics, and the same-dtype math path as the measure of error.

`Case` is one attention problem, `layouts` ways its operands may lie in memory, `math_attention` the
mathematics, and `assert_attention_close` the rule that decides.
"""

from .cases import DTYPES, SEED, Case
from .layouts import LAYOUTS, Memory, with_strides
from .mathematics import MathResult, math_attention
from .rule import GRAD_FACTOR, OUT_FACTOR, assert_attention_close, assert_no_worse_than_math

__all__ = [
    "DTYPES",
    "GRAD_FACTOR",
    "LAYOUTS",
    "OUT_FACTOR",
    "SEED",
    "Case",
    "MathResult",
    "Memory",
    "assert_attention_close",
    "assert_no_worse_than_math",
    "math_attention",
    "with_strides",
]
