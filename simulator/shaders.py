"""torch.mps.compile_shader for the simulated device.

A Mac build of torch._C binds DynamicMetalShaderLibrary and MetalKernelFunction under the names
_mps_ShaderLibrary and _mps_MetalKernel. These classes act the same: how arguments become bytes,
which grid is the default, and what raises.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
from collections.abc import Callable, Iterator, Sequence

import torch

from . import library

# Status of device/python_shaders.cpp.
_ERRORS = {1: RuntimeError, 2: SyntaxError, 3: ValueError}
_ACCELERATOR_ERROR = 4


def _check(status: int) -> None:
    if status == 0:
        return
    message = library.get().simulator_last_error().decode("utf-8", "replace")
    if status == _ACCELERATOR_ERROR:
        raise torch.AcceleratorError(message)
    raise _ERRORS[status](message)


class ShaderLibrary:
    """Compiled Metal source; its kernels are its attributes."""

    def __init__(self, source: str):
        self._handle = ctypes.c_void_p()
        device = library.get()
        # The headers of PyTorch that compile_shader pastes in have a few symbols in comments.
        text = source.encode("ascii", "replace")
        _check(device.simulator_create_library(text, ctypes.byref(self._handle)))
        self._delete = device.simulator_delete_library

    def __dir__(self) -> list[str]:
        return library.get().simulator_function_names(self._handle).decode().split()

    def __getattr__(self, name: str) -> Kernel:
        if name.startswith("_"):  # protocols that probe objects: copy, pickle, inspect
            raise AttributeError(name)
        handle = ctypes.c_void_p()
        _check(
            library.get().simulator_get_kernel(self._handle, name.encode(), ctypes.byref(handle))
        )
        return Kernel(self, handle)

    def __del__(self):
        if self.__dict__.get("_delete") and self._handle:
            self._delete(self._handle)


class Kernel:
    """One kernel of a library. Calling it runs it."""

    thread_execution_width = 32
    static_thread_group_memory_length = 0

    def __init__(self, owner: ShaderLibrary, handle: ctypes.c_void_p):
        self._owner = owner  # the kernel lives in its library
        self._handle = handle

    @property
    def max_threads_per_threadgroup(self) -> int:
        return library.get().simulator_max_threads(self._handle)

    def __call__(
        self,
        *arguments,
        threads: int | Sequence[int] | None = None,
        group_size: int | Sequence[int] | None = None,
        arg_casts: str | dict[int, str] | None = None,
        error_buf_idx: int | None = None,
    ) -> None:
        """Binds the arguments in order and dispatches `threads` threads.

        threads: by default, one for each element of the first tensor. arg_casts: the type for
        numbers, of all arguments or by index; by default int64 for int and float32 for float.
        """
        sizes = _sizes(threads)
        group = _sizes(group_size)
        if sizes is None:
            tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
            sizes = (tensors[0].numel(),) if tensors else None
        if sizes is None:
            raise RuntimeError("Number of threads is undefined or has wrong dimension")
        if group is not None and len(group) != len(sizes):
            raise RuntimeError("threads and group_size must have the same number of dimensions")

        with contextlib.ExitStack() as alive:
            bound = (library.CallArgument * len(arguments))()
            for index, value in enumerate(arguments):
                if isinstance(value, torch.Tensor):
                    bound[index].tensor = alive.enter_context(_tensor_handle(value))
                else:
                    data = _to_bytes(value, _cast_for(arg_casts, index))
                    bound[index].bytes, bound[index].nbytes = data, len(data)
            _check(
                library.get().simulator_call_kernel(
                    self._handle,
                    bound,
                    len(arguments),
                    (ctypes.c_uint64 * len(sizes))(*sizes),
                    (ctypes.c_uint64 * len(group))(*group) if group is not None else None,
                    len(sizes),
                    -1 if error_buf_idx is None else error_buf_idx,
                )
            )


def _sizes(value: int | Sequence[int] | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    sizes = (value,) if isinstance(value, int) else tuple(value)
    if not 0 < len(sizes) < 4:
        raise RuntimeError("a grid has one, two or three dimensions")
    return sizes


def _cast_for(casts: str | dict[int, str] | None, index: int) -> str | None:
    if casts is None or isinstance(casts, str):
        return casts
    if isinstance(casts, dict):
        return casts.get(index)
    raise RuntimeError(f"Unexpected caster arg type {type(casts).__name__}")


def _bfloat16_bytes(value: float) -> bytes:
    number = torch.tensor(value, dtype=torch.bfloat16)
    return struct.pack("<h", number.view(torch.int16).item())


def _packed_int(code: str) -> Callable[[float], bytes]:
    return lambda value: struct.pack("<" + code, int(value))


# The casts that PyTorch knows.
_CASTS: dict[str, Callable[[float], bytes]] = {
    "fp16": lambda value: struct.pack("<e", value),
    "bf16": _bfloat16_bytes,
    "int32": _packed_int("i"),
    "int16": _packed_int("h"),
    "int8": _packed_int("b"),
    "uint8": _packed_int("B"),
}


def _to_bytes(value: object, cast: str | None) -> bytes:
    values = value if isinstance(value, (list, tuple)) else [value]
    if not values:
        raise RuntimeError("Empty list/tuple can not be an argument to metal kernel")
    if isinstance(values[0], torch.Tensor) and values is value:
        return struct.pack(f"<{len(values)}Q", *map(_gpu_address, values))
    if not isinstance(values[0], (int, float)):
        raise RuntimeError("Unsupported argument type")
    if cast is not None:
        if cast not in _CASTS:
            raise RuntimeError(f"Unsupported cast instruction {cast}")
        return b"".join(map(_CASTS[cast], values))
    # A bool is an int here, as it is to PyTorch: eight bytes.
    code = "q" if isinstance(values[0], int) else "f"
    return struct.pack(f"<{len(values)}{code}", *values)


@contextlib.contextmanager
def _tensor_handle(tensor: torch.Tensor) -> Iterator[int]:
    """The tensor as an AtenTensorHandle, a pointer to at::Tensor."""
    (capsule,) = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([tensor])
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    handle = pointer_of(capsule, None)
    try:
        yield handle
    finally:
        library.get().aoti_torch_delete_tensor_object(ctypes.c_void_p(handle))


def _gpu_address(tensor: torch.Tensor) -> int:
    address = ctypes.c_void_p()
    with _tensor_handle(tensor) as handle:
        _check(library.get().simulator_gpu_address(handle, ctypes.byref(address)))
    return address.value or 0
