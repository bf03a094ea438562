"""Between the Metal classes of the device (C++) and the engine that executes Metal (Python).

The device calls the three functions of EngineBridge, on whatever thread encodes; autograd's
threads are among them. An exception must not reach ctypes, which would drop it: it travels as
text through simulator_reply() and is raised again in C++.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import threading
import time
from types import ModuleType

from . import launch_log, library


class ShaderSource:
    """The text of one shader library, compiled for each mode when that mode first needs it."""

    def __init__(self, engine: ModuleType, text: str):
        self._engine = engine
        self._text = text
        self._compiled: dict[bool, object] = {}
        self._lock = threading.Lock()

    def compiled(self, check: bool):
        with self._lock:
            if check not in self._compiled:
                self._compiled[check] = self._engine.compile(self._text, check=check)
            return self._compiled[check]


class EngineBridge:
    def __init__(self, device: ctypes.CDLL, engine: ModuleType):
        self.check = False
        self.schedule_seed: int | None = None
        self._device = device
        self._engine = engine
        self._sources: dict[int, ShaderSource] = {}
        self._next_id = itertools.count(1)
        # The object must stay alive as long as the device may call it: for good.
        self._callbacks = library.EngineCallbacks(
            library.CompileCallback(self._compile),
            library.MaxThreadsCallback(self._max_threads),
            library.DispatchCallback(self._dispatch),
        )
        device.simulator_install_engine(ctypes.byref(self._callbacks))

    # ------------------------------------------------------------------------- the call-backs

    def _compile(self, text: bytes, reply: int) -> int:
        try:
            source = ShaderSource(self._engine, text.decode("ascii"))
            names = source.compiled(self.check).names
            identifier = next(self._next_id)
            self._sources[identifier] = source
            self._device.simulator_reply(reply, "\n".join(names).encode())
            return identifier
        except BaseException as error:
            return self._failed(error, reply)

    def _max_threads(self, identifier: int, kernel: bytes, reply: int) -> int:
        try:
            compiled = self._sources[identifier].compiled(self.check)
            return compiled.max_threads(kernel.decode("ascii"))
        except BaseException as error:
            return self._failed(error, reply)

    def _dispatch(self, dispatch, reply: int) -> int:
        try:
            self._run(dispatch.contents)
            return 1
        except BaseException as error:
            return self._failed(error, reply)

    def _failed(self, error: BaseException, reply: int) -> int:
        text = str(error)
        if not isinstance(error, (self._engine.CompileError, self._engine.KernelError)):
            text = f"simulator: {type(error).__name__}: {text}"
        self._device.simulator_reply(reply, text.encode("utf-8", "replace").replace(b"\0", b""))
        return 0

    # ------------------------------------------------------------------------------ a dispatch

    def _run(self, dispatch: library.Dispatch) -> None:
        kernel = dispatch.kernel.decode("ascii")
        threads = tuple(dispatch.threads)
        group = tuple(dispatch.group)
        bound = [dispatch.arguments[i] for i in range(dispatch.argument_count)]
        # Metal learns from the kernel, not from the host, what it writes: any tensor may be.
        buffers = {
            argument.index: self._engine.Buffer(
                argument.address or 0, argument.nbytes, writable=bool(argument.is_tensor)
            )
            for argument in bound
        }
        compiled = self._sources[dispatch.library].compiled(self.check)
        spoil = _spoil_what_changes(bound) if dispatch.corrupt else contextlib.nullcontext()
        started = time.perf_counter()
        with spoil:
            counters = compiled.launch(kernel, threads, group, buffers, seed=self.schedule_seed)
        if not launch_log.wanted():
            return
        launch_log.add(
            launch_log.Launch(
                kernel=kernel,
                threads=threads,
                group=group,
                arguments=tuple(
                    launch_log.Argument(argument.index, argument.nbytes, bool(argument.is_tensor))
                    for argument in bound
                ),
                counters=counters,
                seconds=time.perf_counter() - started,
            )
        )


@contextlib.contextmanager
def _spoil_what_changes(bound: list[library.Argument]):
    """Overwrites, at the end of the block, the words of tensors that the block changed."""
    import numpy

    views = [
        numpy.ctypeslib.as_array((ctypes.c_uint8 * argument.nbytes).from_address(argument.address))
        for argument in bound
        if argument.is_tensor and argument.nbytes
    ]
    before = [view.copy() for view in views]
    yield
    # All differences are found before any tensor is written, as two arguments may be views of one
    # storage.
    changed = [numpy.flatnonzero(view != old) for view, old in zip(views, before, strict=True)]
    for view, positions in zip(views, changed, strict=True):
        # Whole words, since 0xFF in a part of a float would only change its value a little.
        for word in numpy.unique(positions // 4):
            view[4 * word : 4 * word + 4] = 0xFF
