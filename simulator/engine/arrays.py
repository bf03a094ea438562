"""Launching kernels on numpy arrays, for tests and experiments."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from .library import Buffer, Library


def launch(
    library: Library,
    name: str,
    threads: tuple[int, int, int],
    group: tuple[int, int, int],
    arguments: Mapping[int, np.ndarray | bytes],
    *,
    writable: Collection[int] | None = None,
    mix: bool = False,
    **options,
) -> Any:
    """Binds contiguous arrays in place and bytes by value; the rest as in Library.launch.

    ``writable`` lists the buffers that the kernel may write, by default all arrays.  With ``mix``
    the result is that of Library.instruction_mix.
    """
    buffers, alive = {}, []
    for index, argument in arguments.items():
        array = argument
        if isinstance(argument, bytes):
            # 16-byte alignment, as Metal gives the copies made by setBytes
            storage = np.zeros(len(argument) + 16, np.uint8)
            offset = -storage.ctypes.data % 16
            array = storage[offset : offset + len(argument)]
            array[:] = np.frombuffer(argument, np.uint8)
        if not array.flags.c_contiguous:
            raise ValueError(f"buffer {index} is not contiguous")
        may_write = isinstance(argument, np.ndarray) if writable is None else index in writable
        buffers[index] = Buffer(array.ctypes.data, array.nbytes, may_write)
        alive.append(array)
    launch_or_mix = library.instruction_mix if mix else library.launch
    return launch_or_mix(name, threads, group, buffers, **options)
