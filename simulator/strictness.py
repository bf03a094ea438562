"""Strict mode: only those aten operators run that have an MPS kernel on a Mac.

The list comes from native_functions.yaml, which PyTorch installs with torchgen.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

from . import library

# CPU fallbacks that a Mac build registers by name, outside native_functions.yaml.
_REGISTERED_BY_HAND = {
    "embedding_renorm_",
    "linalg_svd",
    "linalg_svd.U",
    "col2im",
    "upsample_nearest3d.vec",
}


def strict(on: bool = True) -> int:
    """Turns strict mode on or off; returns how many operators it allows."""
    if not on:
        library.get().simulator_set_strict(None)
        return 0
    names = operators_with_mps_kernel()
    library.get().simulator_set_strict("\n".join(sorted(names)).encode())
    return len(names)


@functools.cache
def operators_with_mps_kernel() -> frozenset[str]:
    torchgen = Path(importlib.util.find_spec("torchgen").origin).parent
    text = (torchgen / "packaged/ATen/native/native_functions.yaml").read_text()
    has_kernel: set[str] = set()
    delegates: dict[str, str] = {}  # structured operators, whose kernel is that of another
    # The file is YAML of a fixed layout; reading it by lines needs no YAML library.
    name, in_dispatch = "", False
    for line in text.splitlines():
        if entry := re.match(r"- func: ([\w.]+)\(", line):
            name, in_dispatch = entry[1], False
        elif re.match(r"  \w", line):
            in_dispatch = line.startswith("  dispatch:")
            if delegate := re.match(r"  structured_delegate: ([\w.]+)", line):
                delegates[name] = delegate[1]
        elif in_dispatch and re.match(r"    ([\w, ]+, *)?MPS *[,:]", line):
            has_kernel.add(name)
    has_kernel |= {name for name, delegate in delegates.items() if delegate in has_kernel}
    return frozenset(has_kernel | _REGISTERED_BY_HAND)
