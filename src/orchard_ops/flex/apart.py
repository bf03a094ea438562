"""Work of our own that is no part of what a compiler or a transform is looking at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._guards import tracing
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def apart() -> Iterator[None]:
    """Whatever is being traced, compiled or transformed does not see what the block does."""
    with _disable_current_modes(), tracing(None), temporarily_clear_interpreter_stack():
        yield
