"""The namespace of the ops, in PyTorch's dispatcher: ``torch.ops.<NAME>.flash_attn``.

The package that is installed has one; a copy that the Hub distributes has another in each version
(tools/hub_kernel.py), so that several can be in one process.
"""

import torch

NAME = "orchard"
OPS = getattr(torch.ops, NAME)
INSTALLED = NAME == "orchard"
"""Whether this is the installed package, and not a copy with a library of its own."""
