"""Metal on the simulated device: an extension in C++, torch.mps.compile_shader, faults.

The extension is simulator/example/extension.cpp, compiled here against the installed torch.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import simulator
import torch
import torch.nn.functional as F
from simulator import build, engine

if sys.platform != "linux":
    pytest.skip("the simulated device is for Linux", allow_module_level=True)

simulator.enable()

MPS = torch.device("mps")

SOURCE = """
#include <metal_stdlib>
using namespace metal;

kernel void scale(device float* out [[buffer(0)]],
                  device const float* x [[buffer(1)]],
                  constant float& factor [[buffer(2)]],
                  uint i [[thread_position_in_grid]]) {
  out[i] = factor * x[i];
}

kernel void fill_grid(device float* out [[buffer(0)]],
                      constant int* sizes [[buffer(1)]],
                      uint2 at [[thread_position_in_grid]],
                      uint2 group [[threads_per_threadgroup]]) {
  out[at.y * sizes[0] + at.x] = float(100 * group.x + group.y);
}
"""


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    """The example extension, loaded as torch.ops.simulator_example."""
    torch.ops.load_library(compile_extension(tmp_path_factory.mktemp("extension")))
    return torch.ops.simulator_example


def compile_extension(directory: Path) -> str:
    output = str(directory / "extension.so")
    source = Path(simulator.__file__).parent / "example" / "extension.cpp"
    stable = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
    subprocess.run(
        [build.compiler(), "-O1", *simulator.compile_flags(), *stable, str(source), "-o", output],
        check=True,
    )
    return output


@pytest.fixture(scope="module")
def shaders():
    return torch.mps.compile_shader(SOURCE)


def tensors(*shape):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for _ in range(2)]


# ------------------------------------------------------------------------------- the extension


def test_kernel_computes(extension):
    x, y = tensors(100)
    got = extension.saxpy(x.to(MPS), y.to(MPS), 2.5, False)
    torch.testing.assert_close(got.cpu(), 2.5 * x + y)


def test_storage_offset_reaches_the_kernel(extension):
    x, y = tensors(100)
    got = extension.saxpy(x.to(MPS)[10:], y.to(MPS)[:90], 2.5, False)
    torch.testing.assert_close(got.cpu(), 2.5 * x[10:] + y[:90])


def test_whole_numbers_travel_as_int64(extension):
    x, _ = tensors(64)
    assert torch.equal(extension.multiply(x.to(MPS), -3, 32).cpu(), -3 * x)


def test_backward_on_autograds_thread(extension):
    class Saxpy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y, factor):
            ctx.factor = factor
            return extension.saxpy(x, y, factor, False)

        @staticmethod
        def backward(ctx, grad):
            threads.append(threading.get_ident())
            grad = grad.contiguous()
            return extension.saxpy(grad, torch.zeros_like(grad), ctx.factor, False), grad, None

    threads = []
    x, y = (t.to(MPS).requires_grad_() for t in tensors(50))
    Saxpy.apply(x, y, 3.0).square().sum().backward()
    cx, cy = (t.detach().cpu().requires_grad_() for t in (x, y))
    (3.0 * cx + cy).square().sum().backward()
    torch.testing.assert_close(x.grad.cpu(), cx.grad)
    torch.testing.assert_close(y.grad.cpu(), cy.grad)
    assert threads != [threading.get_ident()]


@pytest.mark.parametrize(
    "mistake",
    [
        "compile_nonsense",
        "unknown_kernel",
        "encode_outside_block",
        "dispatch_after_block",
        "block_in_block",
        "operator_in_block",
    ],
)
def test_mistakes_are_error_codes(extension, mistake):
    x, _ = tensors(4)
    assert getattr(extension, mistake)(x.to(MPS)) != 0
    assert torch.equal(extension.multiply(x.to(MPS), 1, 4).cpu(), x)  # the library still works


def test_oversized_group_is_refused(extension):
    x = torch.ones(4096, device=MPS)
    with pytest.raises(RuntimeError):
        extension.multiply(x, 1, 4096)
    assert "exceeds 1024 limit" in last_shim_error()


def test_cpu_tensor_is_refused(extension):
    x, y = tensors(4)
    with pytest.raises(NotImplementedError):
        extension.saxpy(x, y, 1.0, False)
    with pytest.raises(RuntimeError):
        extension.saxpy(x.to(MPS), y, 1.0, False)


def test_arguments_are_released(extension):
    x, y = (t.to(MPS) for t in tensors(1000))
    before = simulator.memory().allocated
    extension.saxpy(x, y, 1.0, False)
    assert simulator.memory().allocated == before
    del x, y
    assert simulator.memory().allocated == before - 8000


def test_raw_buffers():
    """aoti_torch_mps_malloc and its kin, which AOTInductor's generated code calls."""
    shims = ctypes.CDLL(None)
    before = simulator.memory().allocated
    buffer = ctypes.c_void_p()
    assert shims.aoti_torch_mps_malloc(ctypes.byref(buffer), ctypes.c_size_t(8)) == 0
    assert buffer.value >> 62 == 1 and simulator.memory().allocated == before + 8
    size = ctypes.c_size_t
    assert shims.aoti_torch_mps_memcpy(buffer, size(2), size(1), size(3), b"-abc-") == 0
    x = torch.zeros(8, dtype=torch.uint8, device=MPS)
    to = ctypes.c_void_p(x.data_ptr())
    assert shims.aoti_torch_mps_copy_buffer(buffer, to, size(3), size(2), size(4)) == 0
    assert bytes(x.tolist()) == b"\0\0\0\0abc\0"
    assert shims.aoti_torch_mps_free(buffer) == 0
    assert simulator.memory().allocated == before + 8  # x
    assert shims.aoti_torch_mps_free(buffer) != 0
    assert "not allocated" in last_shim_error()


def last_shim_error() -> str:
    what = ctypes.CDLL(None).torch_exception_get_what_without_backtrace
    what.restype = ctypes.c_char_p
    return what().decode()


def test_two_threads_dispatch(extension):
    x, y = (t.to(MPS) for t in tensors(256))
    want = (2 * x + y).cpu()
    failures = []

    def work():
        try:
            for _ in range(20):
                torch.testing.assert_close(extension.saxpy(x, y, 2.0, False).cpu(), want)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# --------------------------------------------------------------------- torch.mps.compile_shader


def test_shader_names_and_limits(shaders):
    assert {"scale", "fill_grid"} <= set(dir(shaders))
    assert 32 <= shaders.scale.max_threads_per_threadgroup <= 1024
    assert shaders.scale.thread_execution_width == 32


def test_shader_threads_default_to_the_first_tensor(shaders):
    x, _ = tensors(70)
    out = torch.zeros(70, device=MPS)
    with simulator.recording() as launches:
        shaders.scale(out, x.to(MPS), 1.5)
    torch.testing.assert_close(out.cpu(), 1.5 * x)
    (launch,) = launches
    assert launch.threads == (70, 1, 1) and launch.group == (70, 1, 1)


def test_shader_default_group_of_a_grid(shaders):
    out = torch.zeros(6, 5, device=MPS)
    shaders.fill_grid(out, [5, 6], threads=(5, 6), arg_casts="int32")
    limit = shaders.fill_grid.max_threads_per_threadgroup
    assert out.eq(100 * limit + 1).all() or out.isfinite().all()
    with simulator.recording() as launches:
        shaders.fill_grid(out, [5, 6], threads=(5, 6), group_size=(5, 2), arg_casts={1: "int32"})
    assert launches[0].threads == (5, 6, 1) and launches[0].group == (5, 2, 1)
    assert out.eq(502).all()


def test_shader_numbers(shaders):
    x = torch.ones(4, device=MPS)
    out = torch.zeros(4, device=MPS)
    shaders.scale(out, x, torch.tensor(3.0, dtype=torch.float64))  # a 0-dim CPU tensor
    assert out.eq(3).all()
    shaders.scale(out, x, torch.tensor([7.0, 4.0], device=MPS)[1:])
    assert out.eq(4).all()
    with pytest.raises(RuntimeError, match="Unsupported argument"):
        shaders.scale(out, x, "three")
    with pytest.raises(RuntimeError, match="Empty list"):
        shaders.scale(out, x, [])
    with pytest.raises(RuntimeError, match="cast instruction"):
        shaders.scale(out, x, 3.0, arg_casts="float64")


def test_bytes_of_python_numbers():
    from simulator.shaders import _to_bytes

    assert _to_bytes(3, None) == (3).to_bytes(8, "little")
    assert _to_bytes(True, None) == (1).to_bytes(8, "little")
    assert _to_bytes((1, 2), "int16") == b"\1\0\2\0"
    assert _to_bytes(1.0, None) == b"\0\0\x80\x3f"
    assert _to_bytes(1.0, "fp16") == b"\x00\x3c"
    assert _to_bytes(1.0, "bf16") == b"\x80\x3f"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s, x: s.scale(x, x, 1.0, threads=0), RuntimeError, "size zero"),
        (lambda s, x: s.scale(x, x, 1.0, threads=4, group_size=2048), ValueError, "exceeds"),
        (lambda s, x: s.scale(x, x.cpu(), 1.0), RuntimeError, "CPU tensor"),
        (lambda s, x: s.scale(x, x, [1.0] * 1025), RuntimeError, "4096"),
        (lambda s, x: s.scale(x, x, 1.0, threads=(1, 1, 1, 1)), RuntimeError, "dimensions"),
        (lambda s, x: s.scale(x, x, 1.0, threads=4, group_size=(1, 1)), RuntimeError, "same"),
        (lambda s, x: s.scale(1.0), RuntimeError, "threads"),
        (lambda s, x: s.scale(*[x] * 32), RuntimeError, "buffer index"),
        (lambda s, x: s.no_such_kernel, RuntimeError, "Failed to create function state"),
    ],
)
def test_shader_misuse(shaders, call, error, message):
    with pytest.raises(error, match=message):
        call(shaders, torch.ones(4, device=MPS))


def test_shader_that_does_not_compile():
    with pytest.raises(SyntaxError, match="error"):
        torch.mps.compile_shader("kernel void broken( { this is not Metal }")


def test_shader_reports_an_error_in_words():
    """The layout of c10/metal/error.h: a count, then messages of file, function, text, line."""
    library = torch.mps.compile_shader("""
        kernel void complain(device char* errors [[buffer(0)]]) {
          errors[0] = 1;
          errors[4 + 128] = 'f';
          errors[4 + 256] = 'n';
          errors[4 + 257] = 'o';
        }""")
    with pytest.raises(torch.AcceleratorError, match="f: no"):
        library.complain(threads=1, error_buf_idx=0)


def test_shader_includes_pytorchs_headers():
    library = torch.mps.compile_shader("""
        #include <c10/metal/utils.h>
        using namespace metal;
        kernel void halve(device float* x, uint i [[thread_position_in_grid]]) {
          x[i] = c10::metal::div(x[i], 2.0f);
        }""")
    x = torch.ones(8, device=MPS)
    library.halve(x)
    assert x.eq(0.5).all()


@pytest.mark.parametrize("shape", [(3, 20), (4, 1024)])
def test_inductor(shape):
    """torch.compile writes Metal for mps; the device runs it."""

    def function(x, w):
        return F.gelu(x * w).softmax(-1)

    torch._dynamo.reset()
    x, w = torch.randn(shape, device=MPS), torch.randn(shape[-1], device=MPS, requires_grad=True)
    want = function(x, w)
    (want_grad,) = torch.autograd.grad(want[:, 0].sum(), w)
    with simulator.recording() as launches:
        got = torch.compile(function, fullgraph=True)(x, w)
        (got_grad,) = torch.autograd.grad(got[:, 0].sum(), w)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_grad, want_grad)
    assert launches and {launch.kernel for launch in launches} <= {
        "generated_kernel",
        *(f"generated_kernel_{i}" for i in range(9)),
    }


# ---------------------------------------------------------------------------------- the checks


def test_check_switches_at_once():
    """A library that is compiled already follows the switch, too."""
    library = torch.mps.compile_shader(SOURCE + "// check")
    x = torch.ones(8, device=MPS)
    out = torch.empty(8, device=MPS)
    library.scale(out, x, 2.0)
    with simulator.checking():
        library.scale(out, x, 3.0)
        with pytest.raises(RuntimeError, match="scale"):
            library.scale(out, x[4:], 4.0)  # reads past the end
    library.scale(out, x, 5.0)
    assert out.eq(5).all()


def test_schedule_seed_reaches_the_engine(shaders, monkeypatch):
    seeds = []
    launch = engine.Library.launch

    def spy(self, *arguments, seed=None, **options):
        seeds.append(seed)
        return launch(self, *arguments, seed=seed, **options)

    monkeypatch.setattr(engine.Library, "launch", spy)
    x = torch.ones(4, device=MPS)
    shaders.scale(x, x, 1.0)
    simulator.schedule_seed(7)
    try:
        shaders.scale(x, x, 1.0)
    finally:
        simulator.schedule_seed(None)
    assert seeds == [None, 7]


# ------------------------------------------------------------------------------------- faults


def test_compile_fault():
    with simulator.faults(compile=2):
        torch.mps.compile_shader(SOURCE)
        with pytest.raises(SyntaxError, match="injected"):
            torch.mps.compile_shader(SOURCE)
        torch.mps.compile_shader(SOURCE)


def test_function_fault():
    library = torch.mps.compile_shader(SOURCE)
    with simulator.faults(function="all"):
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"pipeline state.*injected"):
                library.scale  # noqa: B018
    assert library.scale.max_threads_per_threadgroup > 0


def test_dispatch_fault(shaders, extension):
    x = torch.ones(4, device=MPS)
    with simulator.faults(dispatch=2):
        shaders.scale(x, x, 2.0)
        with pytest.raises(RuntimeError, match=r"command buffer.*injected"):
            shaders.scale(x, x, 2.0)
        shaders.scale(x, x, 2.0)
    assert x.eq(4).all()
    with simulator.faults(dispatch="all"), pytest.raises(RuntimeError):
        extension.multiply(x, 2, 4)
    assert "injected" in last_shim_error()


def test_allocation_fault():
    x = torch.ones(4, device=MPS)
    with simulator.faults(allocate=2):
        torch.empty(4, device=MPS)
        with pytest.raises(RuntimeError, match="MPS backend out of memory"):
            torch.empty(4, device=MPS)
        torch.empty(4, device=MPS)
    with simulator.faults(allocate=1), pytest.raises(RuntimeError, match="out of memory"):
        x + 1


def test_corrupted_dispatch(shaders):
    x = torch.ones(4, device=MPS)
    out = torch.zeros(4, device=MPS)
    with simulator.faults(corrupt_dispatch=1):
        shaders.scale(out, x, 2.0, threads=2)
        assert out.isnan().tolist() == [True, True, False, False]
        assert x.eq(1).all()
        shaders.scale(out, x, 2.0)
    assert out.eq(2).all()


def test_faults_nest(shaders):
    x = torch.ones(4, device=MPS)
    with simulator.faults(dispatch=3):
        shaders.scale(x, x, 1.0)
        with simulator.faults(dispatch=1), pytest.raises(RuntimeError):
            shaders.scale(x, x, 1.0)
        with pytest.raises(RuntimeError):
            shaders.scale(x, x, 1.0)
        shaders.scale(x, x, 1.0)


def test_faults_end_with_the_block(shaders):
    x = torch.ones(4, device=MPS)
    with pytest.raises(KeyError), simulator.faults(dispatch="all"):
        raise KeyError
    shaders.scale(x, x, 1.0)
    for wrong in (0, -1, "some", True, 1.5):
        with pytest.raises(ValueError, match="dispatch"), simulator.faults(dispatch=wrong):
            pass
