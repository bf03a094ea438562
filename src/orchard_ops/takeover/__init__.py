"""F.scaled_dot_product_attention on mps through `flash_attn`, for as long as somebody asks for it.

switch: who has asked, and the registration with PyTorch's dispatcher; kernels: what is registered
there, and which calls it leaves to PyTorch; causal_bias: masks that answer calls themselves;
double_backward: second derivatives, by PyTorch's mathematics.
"""

from .switch import disable, enable, sdpa

__all__ = ["disable", "enable", "sdpa"]
