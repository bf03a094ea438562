"""The ops ``torch.ops.orchard.*``: importing this package registers them and their rules.

schema: names, arguments and handles; kernels: fake and reference kernels; caches: those of the ops
for caches; autograd: the derivative;
flex: the ops whose scores are given as functions, with all of this;
eager: the short way to them; vmap: batching; flops: what torch.utils.flop_counter counts.
"""

from . import autograd, caches, eager, flex, flops, kernels, schema, vmap

__all__ = ["autograd", "caches", "eager", "flex", "flops", "kernels", "schema", "vmap"]
