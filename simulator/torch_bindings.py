"""The parts of torch._C that exist only in a Mac build, supplied for the simulated device.

Most of torch.mps needs nothing: its bindings exist everywhere and ask MPSHooks.
"""

from __future__ import annotations

import torch

from . import shaders


def install() -> None:
    """Raises RuntimeError if PyTorch has already decided that there is no MPS."""
    if not torch._C._mps_is_available():
        raise RuntimeError(
            "simulator: enabled too late. PyTorch asked for the MPS device before, was told there "
            "is none, and remembers that for good. Call simulator.enable() right after "
            "`import torch`, before torch.backends.mps.is_available(), torch.accelerator.*, a "
            "backward pass or torch.compile."
        )
    torch._C._has_mps = True
    for cached in ("is_available", "is_macos_or_newer", "is_macos13_or_newer"):
        getattr(torch.backends.mps, cached).cache_clear()
    torch._C._mps_get_name = lambda: "Simulated Apple GPU"
    torch._C._mps_get_core_count = lambda: 8
    torch._C._mps_isCaptureEnabled = lambda: False
    torch._C._mps_compileShader = shaders.ShaderLibrary
    torch._C._mps_ShaderLibrary = shaders.ShaderLibrary
    torch._C._mps_MetalKernel = shaders.Kernel
    torch.UntypedStorage.mps = _storage_to_mps  # torch.load calls it


def _storage_to_mps(self: torch.UntypedStorage) -> torch.UntypedStorage:
    if self.device.type == "mps":
        return self
    copy = torch.empty(self.nbytes(), dtype=torch.uint8, device="mps")
    copy.copy_(torch.empty(0, dtype=torch.uint8).set_(self))
    return copy.untyped_storage()
