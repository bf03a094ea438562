"""Launches PTX kernels on tensors: NVIDIA's driver API through ctypes, and torch for memory."""

from __future__ import annotations

import concurrent.futures
import ctypes
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_MAX_BUFFERS = 31
_ERROR_LOG_BUFFER, _ERROR_LOG_SIZE = 5, 6  # CUjit_option
_MOST_IN_Y = 65535
"""Threadgroups of a grid along y that CUDA has room for; along x it has as many as Metal."""
_ATTRIBUTES = {"shared_bytes": 1, "local_bytes": 3, "registers": 4}  # CUfunction_attribute


class _Arguments(ctypes.Structure):
    """msl::Arguments of include/msl/ptx_entry.h"""

    _fields_ = [
        ("buffers", ctypes.c_uint64 * _MAX_BUFFERS),
        ("groups", ctypes.c_uint32 * 3),
        ("group", ctypes.c_uint32 * 3),
        ("threadgroup_argument_begin", ctypes.c_uint32 * 8),
    ]


def turned(text: bytes) -> bytes:
    """The kernel for a grid whose x and y have changed places: it counts threadgroups as before."""
    x, y, held = b"%ctaid.x", b"%ctaid.y", b"%ctaid.held"
    return text.replace(x, held).replace(y, x).replace(held, y)


def _three(sizes: Sequence[int]) -> tuple[int, ...]:
    return (*sizes, 1, 1)[:3]


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and arguments, which it keeps alive. Runs on the current stream."""

    name: str
    start: Callable[[], None]


class Kernels:
    """The kernels of an archive, assembled in the background and loaded when first launched.

    The machine code is kept in a folder beside the archive. ``mutate`` changes the PTX before.
    """

    def __init__(self, archive: Path, mutate: Callable[[bytes], bytes] = bytes):
        torch.cuda.init()
        torch.zeros(1, device="cuda")  # the runtime's context is the current one from here on
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._archive = zipfile.ZipFile(archive)
        self._mutate = mutate
        self._cache = archive.parent / "machine-code"
        self.names = [name.removesuffix(".ptx") for name in self._archive.namelist()]
        self._functions: dict[tuple[str, bool], ctypes.c_void_p] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
        self._images: dict[tuple[str, bool], concurrent.futures.Future] = {}

    def assemble(self, names: list[str], turns: bool = False) -> None:
        """Begins to assemble these kernels, in this order; for a turned grid."""
        for name in names:
            if (name, turns) not in self._images:
                text = self._mutate(self.text(name))
                text = turned(text) if turns else text
                self._images[name, turns] = self._pool.submit(_assemble, text, self._cache)

    def text(self, name: str) -> bytes:
        """The PTX."""
        if name not in self.names:
            raise KeyError(f"{self._archive.filename} has no {name}: what was build.py asked for?")
        return self._archive.read(f"{name}.ptx")

    def prepare(
        self,
        name: str,
        groups: Sequence[int],
        threads: Sequence[int],
        buffers: Mapping[int, Tensor],
        params: tuple[int, ctypes.Structure],
    ) -> Launch:
        """A launch of ``groups`` threadgroups of ``threads``, each of up to three dimensions.

        ``params`` is a buffer index and what it holds by value.
        """
        arguments = _Arguments()
        arguments.groups[:] = _three(groups)
        arguments.group[:] = _three(threads)
        for index, tensor in buffers.items():
            arguments.buffers[index] = tensor.data_ptr()
        copy = torch.frombuffer(bytearray(params[1]), dtype=torch.uint8).cuda()
        arguments.buffers[params[0]] = copy.data_ptr()
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        x, y, z = _three(groups)
        turns = y > _MOST_IN_Y
        function = self._function(name, turns)
        grid = (y, x, z) if turns else (x, y, z)
        shape = (*grid, math.prod(threads), 1, 1)  # a block has one dimension
        alive = (arguments, copy, *buffers.values())

        def start(_alive: object = alive) -> None:
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            code = self._cuda.cuLaunchKernel(function, *shape, 0, stream, pointers, None)
            self._check(code, f"launching {name}")
            if not torch.cuda.is_current_stream_capturing():
                copy.record_stream(torch.cuda.current_stream())

        return Launch(name, start)

    def attributes(self, name: str) -> dict[str, int]:
        """Registers of a thread, shared memory of a threadgroup, spilled bytes of a thread."""
        values = {}
        for key, number in _ATTRIBUTES.items():
            value = ctypes.c_int()
            code = self._cuda.cuFuncGetAttribute(ctypes.byref(value), number, self._function(name))
            self._check(code, name)
            values[key] = value.value
        return values

    def _function(self, name: str, turns: bool = False) -> ctypes.c_void_p:
        if (name, turns) not in self._functions:
            self.assemble([name], turns)
            function = ctypes.c_void_p()
            self._check(
                self._cuda.cuModuleGetFunction(
                    ctypes.byref(function),
                    self._load(name, self._images[name, turns].result()),
                    name.encode(),
                ),
                name,
            )
            self._functions[name, turns] = function
        return self._functions[name, turns]

    def _load(self, name: str, image: bytes) -> ctypes.c_void_p:
        module = ctypes.c_void_p()
        log = ctypes.create_string_buffer(1 << 14)
        options = (ctypes.c_int * 2)(_ERROR_LOG_BUFFER, _ERROR_LOG_SIZE)
        values = (ctypes.c_void_p * 2)(ctypes.addressof(log), len(log))
        code = self._cuda.cuModuleLoadDataEx(ctypes.byref(module), image, 2, options, values)
        self._check(code, f"loading {name}: {log.value.decode(errors='replace')}")
        return module

    def _check(self, code: int, what: str) -> None:
        if code:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{what}: {(text.value or b'error').decode()} ({code})")


def _assemble(text: bytes, cache: Path) -> bytes:
    """The machine code by ptxas, which runs in parallel; without it the driver takes the PTX."""
    assembler = shutil.which("ptxas") or shutil.which("ptxas", path="/usr/local/cuda/bin")
    if assembler is None:
        return text + b"\0"
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    image = cache / arch / f"{hashlib.sha256(text).hexdigest()[:32]}.cubin"
    if not image.exists():
        image.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=image.parent) as folder:
            source, output = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
            source.write_bytes(text)
            command = [assembler, f"-arch={arch}", str(source), "-o", str(output)]
            subprocess.run(command, check=True, capture_output=True)
            output.replace(image)
    return image.read_bytes()
