"""What a call costs the host, counted on the simulated device; the problem that is counted."""

from __future__ import annotations

import sys

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("counted on the simulated device", allow_module_level=True)

import simulator

B, H, HKV, L, S, D = 2, 4, 2, 24, 40, 32
HALF = 2


def qkv(
    requires_grad: bool = False, dtype: torch.dtype = torch.float16, head_dim: int = D
) -> list[torch.Tensor]:
    shapes = ((B, H, L, head_dim), (B, HKV, S, head_dim), (B, HKV, S, head_dim))
    return [
        torch.randn(shape, device="mps", dtype=dtype).requires_grad_(requires_grad)
        for shape in shapes
    ]


class Counted:
    """Counts what happens on the device inside a `with` block."""

    def __enter__(self) -> Counted:
        self.waits, self.memory = simulator.waits(), simulator.memory()
        self.plans = torch.ops.orchard.plans_computed()
        simulator.reset_peak()
        return self

    def __exit__(self, *exception: object) -> None:
        self.num_waits = simulator.waits().total - self.waits.total
        self.num_allocations = simulator.memory().allocations - self.memory.allocations
        self.peak_bytes = simulator.memory().peak - self.memory.allocated
        self.num_plans = torch.ops.orchard.plans_computed() - self.plans
