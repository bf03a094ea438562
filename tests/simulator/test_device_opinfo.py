"""A sample of PyTorch's own operator tests: forward and backward on mps and on the CPU agree.

The names are spread over the kinds of operator that take different ways through the device:
views, in-place, out=, lists, reductions, indexing, random numbers, convolutions, composites.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import sys
import types
import unittest
import warnings

import pytest
import simulator
import torch
from torch.utils._pytree import tree_flatten, tree_map

if sys.platform != "linux":
    pytest.skip("the simulated device is for Linux", allow_module_level=True)

simulator.enable()

SAMPLES = 3  # per operator

FAMILIES = (
    ("add", "mul", "sub", "pow", "exp", "tanh", "where", "clamp"),
    ("sum", "mean", "var", "std", "amax", "prod", "logsumexp", "norm", "cumsum"),
    ("matmul", "bmm", "addmm", "baddbmm", "einsum", "outer", "linalg.vector_norm"),
    ("softmax", "log_softmax", "sort", "topk", "argmax", "cummax"),
    ("cat", "stack", "split", "chunk", "unbind", "narrow", "as_strided"),
    ("view", "reshape", "permute", "transpose", "expand", "squeeze", "unfold", "diagonal"),
    ("index_select", "gather", "scatter_add", "index_put", "masked_fill", "take_along_dim"),
    ("nonzero", "zeros_like", "full_like", "arange", "linspace", "new_zeros"),
)
LAYERS = (
    *("linear", "layer_norm", "gelu", "embedding", "conv2d", "conv_transpose2d", "max_pool2d"),
    *("batch_norm", "cross_entropy", "dropout", "scaled_dot_product_attention"),
)
NAMES = [*itertools.chain(*FAMILIES), *(f"nn.functional.{name}" for name in LAYERS)]


@functools.cache
def operators() -> dict:
    if importlib.util.find_spec("expecttest") is None:
        # PyTorch's test code derives a class from one in there; the operator list needs no more.
        stub = types.ModuleType("expecttest")
        stub.TestCase = unittest.TestCase
        sys.modules["expecttest"] = stub
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return {op.name: op for op in op_db if not op.variant_test_name}


def moved(value):
    if isinstance(value, torch.Tensor):
        return value.detach().to("mps").requires_grad_(value.requires_grad)
    if isinstance(value, torch.device) or value == "cpu":
        return torch.device("mps")
    return value


def tensors_in(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def gradients(outputs: list[torch.Tensor], inputs: list[torch.Tensor]) -> list:
    outputs = [t for t in outputs if t.requires_grad and t.is_floating_point()]
    inputs = [t for t in inputs if t.requires_grad]
    if not outputs or not inputs:
        return []
    return torch.autograd.grad(sum(t.sum() for t in outputs), inputs, allow_unused=True)


def assert_equal(got: list, want: list, tolerance: float) -> None:
    assert len(got) == len(want)
    for mps, cpu in zip(got, want):
        if cpu is None:
            assert mps is None
            continue
        assert mps.device.type == "mps" or cpu.numel() == 0
        torch.testing.assert_close(
            mps.detach().cpu(), cpu.detach(), rtol=tolerance, atol=tolerance, equal_nan=True
        )


@pytest.mark.parametrize("name", NAMES)
def test_operator(name):
    op = operators()[name]
    samples = op.sample_inputs("cpu", torch.float32, requires_grad=op.supports_autograd)
    tested = 0
    for sample in samples:
        arguments = (sample.input, sample.args, sample.kwargs)
        if sample.kwargs.get("dropout_p"):
            continue  # refused on mps without gradients
        mps_arguments = tree_map(moved, arguments)
        torch.manual_seed(0)
        want = op(arguments[0], *arguments[1], **arguments[2])
        torch.manual_seed(0)
        got = op(mps_arguments[0], *mps_arguments[1], **mps_arguments[2])
        assert_equal(tensors_in(got), tensors_in(want), 1e-4)
        assert_equal(
            list(gradients(tensors_in(got), tensors_in(mps_arguments))),
            list(gradients(tensors_in(want), tensors_in(arguments))),
            1e-3,
        )
        tested += 1
        if tested == SAMPLES:
            break
    assert tested > 0
