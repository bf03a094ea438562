"""The compiled device as a ctypes library: loading it, and the types of its C functions."""

from __future__ import annotations

import ctypes
from ctypes import (
    POINTER,
    c_char_p,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)

from . import build


class Argument(ctypes.Structure):
    """SimulatorArgument of device/engine.h: one bound buffer of a dispatch."""

    _fields_ = [
        ("index", c_uint32),
        ("is_tensor", c_uint32),
        ("address", c_void_p),
        ("nbytes", c_uint64),
    ]


class Dispatch(ctypes.Structure):
    """SimulatorDispatch of device/engine.h."""

    _fields_ = [
        ("library", c_int64),
        ("kernel", c_char_p),
        ("arguments", POINTER(Argument)),
        ("argument_count", c_uint64),
        ("threads", c_uint64 * 3),
        ("group", c_uint64 * 3),
        ("corrupt", c_uint32),
    ]


CompileCallback = ctypes.CFUNCTYPE(c_int64, c_char_p, c_void_p)
MaxThreadsCallback = ctypes.CFUNCTYPE(c_int64, c_int64, c_char_p, c_void_p)
DispatchCallback = ctypes.CFUNCTYPE(c_int64, POINTER(Dispatch), c_void_p)


class EngineCallbacks(ctypes.Structure):
    """SimulatorEngine of device/engine.h."""

    _fields_ = [
        ("compile", CompileCallback),
        ("max_threads", MaxThreadsCallback),
        ("dispatch", DispatchCallback),
    ]


class CallArgument(ctypes.Structure):
    """SimulatorCallArgument of device/python_shaders.cpp."""

    _fields_ = [("tensor", c_void_p), ("bytes", c_char_p), ("nbytes", c_uint64)]


_PROTOTYPES = {
    # device/engine.cpp
    "simulator_install_engine": (None, [POINTER(EngineCallbacks)]),
    "simulator_reply": (None, [c_void_p, c_char_p]),
    # device/exit.cpp
    "simulator_settle_autograd": (None, []),
    # device/faults.cpp
    "simulator_arm_fault": (c_int64, [c_int32, c_int64]),
    "simulator_disarm_fault": (None, [c_int64]),
    # device/memory.cpp
    "simulator_memory": (None, [POINTER(c_int64)] * 4),
    "simulator_reset_peak": (None, []),
    # device/fallback.cpp
    "simulator_set_strict": (None, [c_char_p]),
    "simulator_fallback_ops": (c_char_p, []),
    # device/unexecuted.cpp
    "simulator_set_only_recording": (None, [c_int32]),
    "simulator_take_recorded": (c_char_p, []),
    # device/waits.cpp
    "simulator_waits": (None, [POINTER(c_int64)] * 3),
    # device/python_shaders.cpp
    "simulator_last_error": (c_char_p, []),
    "simulator_create_library": (c_int, [c_char_p, POINTER(c_void_p)]),
    "simulator_delete_library": (None, [c_void_p]),
    "simulator_function_names": (c_char_p, [c_void_p]),
    "simulator_get_kernel": (c_int, [c_void_p, c_char_p, POINTER(c_void_p)]),
    "simulator_max_threads": (c_uint64, [c_void_p]),
    "simulator_gpu_address": (c_int, [c_void_p, POINTER(c_void_p)]),
    "simulator_call_kernel": (
        c_int,
        [
            c_void_p,
            POINTER(CallArgument),
            c_size_t,
            POINTER(c_uint64),
            POINTER(c_uint64),
            c_size_t,
            c_int64,
        ],
    ),
}

_loaded: ctypes.CDLL | None = None


def is_loaded() -> bool:
    return _loaded is not None


def load() -> ctypes.CDLL:
    """Loads the device into the process, which registers it with PyTorch."""
    global _loaded
    if _loaded is None:
        # RTLD_GLOBAL: extensions name no library for the Metal classes, they take those that are
        # in the process, as on a Mac they take libtorch's.
        library = ctypes.CDLL(str(build.device_library()), mode=ctypes.RTLD_GLOBAL)
        for name, (result, arguments) in _PROTOTYPES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        _loaded = library
    return _loaded


def get() -> ctypes.CDLL:
    if _loaded is None:
        raise RuntimeError("simulator: the device is not enabled; call simulator.enable() first")
    return _loaded
