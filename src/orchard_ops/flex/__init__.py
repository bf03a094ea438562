"""FlexAttention: attention whose scores and mask are the user's Python functions.

attention: the public function; arguments: its checks; closure and traces: what a mod reads, so that
it is traced once; route: which kernels take a call; additive: scores with something trained added;
graph: the same under torch.compile; switch: PyTorch's own flex_attention taken over. trace, metal,
scalars, operations: from a mod to Metal; reference: for what Metal does not run.
"""

from .attention import flex_attention
from .switch import flex

__all__ = ["flex", "flex_attention"]
