// A PyTorch extension as one would write it for a Mac: torch's stable ABI, the aoti_torch_mps_*
// C functions, one Metal kernel. The tests of the simulated device compile and use it.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim_mps.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <functional>
#include <string>

namespace {

using torch::stable::Tensor;

constexpr const char* kSource = R"METAL(
#include <metal_stdlib>
using namespace metal;

struct Params {
  float factor;
  uint count;
};

kernel void saxpy(device const float* x [[buffer(0)]],
                  device const float* y [[buffer(1)]],
                  device float* out [[buffer(2)]],
                  constant Params& params [[buffer(3)]],
                  uint i [[thread_position_in_grid]]) {
  if (i < params.count) out[i] = params.factor * x[i] + y[i];
}

kernel void multiply(device const float* x [[buffer(0)]],
                     device float* out [[buffer(1)]],
                     constant long& factor [[buffer(2)]],
                     uint i [[thread_position_in_grid]]) {
  out[i] = float(factor) * x[i];
}
)METAL";

struct Params {
  float factor;
  uint32_t count;
};

// ------------------------------------------------------------------------------ bytes arguments

using SetBytesShim = AOTITorchError (*)(
    AOTIMetalKernelFunctionHandle, unsigned, const void*, uint64_t);
using SetBytesMethod = void (*)(void* kernel, unsigned, const void*, uint64_t);

template <typename Function>
Function find_symbol(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}

SetBytesShim set_bytes_shim() {
  static const auto shim = find_symbol<SetBytesShim>("torch_mps_set_arg_bytes");
  return shim;
}

// at::native::mps::MetalKernelFunction::setArg(unsigned, const void*, uint64_t)
SetBytesMethod set_bytes_method() {
  static const auto method = find_symbol<SetBytesMethod>(
#ifdef __APPLE__
      "_ZN2at6native3mps19MetalKernelFunction6setArgEjPKvy"
#else
      "_ZN2at6native3mps19MetalKernelFunction6setArgEjPKvm"
#endif
  );
  return method;
}

AOTITorchError set_bytes(AOTIMetalKernelFunctionHandle kernel, unsigned index, const void* data,
    uint64_t size, bool by_shim) {
  if (by_shim) return set_bytes_shim()(kernel, index, data, size);
  set_bytes_method()(kernel, index, data, size);
  return 0;
}

// ------------------------------------------------------------------------------------- dispatch

AOTIMetalShaderLibraryHandle library() {
  static AOTIMetalShaderLibraryHandle compiled = nullptr;
  if (!compiled) {
    AOTIMetalShaderLibraryHandle fresh = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_mps_create_shader_library(kSource, &fresh));
    compiled = fresh;
  }
  return compiled;
}

using Encode = std::function<AOTITorchError(AOTIMetalKernelFunctionHandle)>;

// No exception may cross the C frame of run_command_block, so the error code takes its own way.
void run(const char* name, const Encode& encode) {
  struct Block {
    const Encode& encode;
    AOTITorchError error;
  } block{encode, 0};
  AOTIMetalKernelFunctionHandle kernel = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_mps_get_kernel_function(library(), name, &kernel));
  TORCH_ERROR_CODE_CHECK(aoti_torch_mps_run_command_block(
      kernel,
      [](AOTIMetalKernelFunctionHandle handle, void* data) {
        auto* self = static_cast<Block*>(data);
        self->error = aoti_torch_mps_start_encoding(handle);
        if (!self->error) self->error = self->encode(handle);
      },
      &block));
  TORCH_ERROR_CODE_CHECK(block.error);
}

AOTITorchError set_tensors(
    AOTIMetalKernelFunctionHandle kernel, std::initializer_list<const Tensor*> tensors) {
  unsigned index = 0;
  for (const auto* tensor : tensors) {
    if (auto error = aoti_torch_mps_set_arg_tensor(kernel, index++, tensor->get())) return error;
  }
  return 0;
}

// ------------------------------------------------------------------------------------ operators

Tensor saxpy(const Tensor& x, const Tensor& y, double factor, bool by_shim) {
  auto out = torch::stable::empty_like(x);
  const Params params{static_cast<float>(factor), static_cast<uint32_t>(x.numel())};
  run("saxpy", [&](AOTIMetalKernelFunctionHandle kernel) {
    auto error = set_tensors(kernel, {&x, &y, &out});
    if (!error) error = set_bytes(kernel, 3, &params, sizeof params, by_shim);
    return error ? error : aoti_torch_mps_dispatch_single_with_group_size(kernel, params.count, 32);
  });
  return out;
}

Tensor multiply(const Tensor& x, int64_t factor, int64_t group) {
  auto out = torch::stable::empty_like(x);
  run("multiply", [&](AOTIMetalKernelFunctionHandle kernel) {
    auto error = set_tensors(kernel, {&x, &out});
    if (!error) error = aoti_torch_mps_set_arg_int(kernel, 2, factor);
    const uint64_t threads[] = {static_cast<uint64_t>(x.numel()), 1};
    const uint64_t groups[] = {static_cast<uint64_t>(group), 1};
    return error ? error
                 : aoti_torch_mps_dispatch_array_with_group_size(kernel, threads, 2, groups, 2);
  });
  return out;
}

// Mistakes. Each returns the error code of the call that is wrong.

int64_t compile_nonsense(const Tensor&) {
  AOTIMetalShaderLibraryHandle handle = nullptr;
  return aoti_torch_mps_create_shader_library("kernel void broken( { this is not Metal }", &handle);
}

int64_t unknown_kernel(const Tensor&) {
  AOTIMetalKernelFunctionHandle kernel = nullptr;
  return aoti_torch_mps_get_kernel_function(library(), "no_such_kernel", &kernel);
}

int64_t encode_outside_block(const Tensor&) {
  AOTIMetalKernelFunctionHandle kernel = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_mps_get_kernel_function(library(), "multiply", &kernel));
  return aoti_torch_mps_start_encoding(kernel);
}

int64_t dispatch_after_block(const Tensor& x) {
  AOTIMetalKernelFunctionHandle kernel = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_mps_get_kernel_function(library(), "multiply", &kernel));
  run("multiply", [](AOTIMetalKernelFunctionHandle) { return 0; });
  return aoti_torch_mps_set_arg_tensor(kernel, 0, x.get());
}

int64_t block_in_block(const Tensor&) {
  AOTITorchError inner = 0;
  run("multiply", [&](AOTIMetalKernelFunctionHandle kernel) {
    inner = aoti_torch_mps_run_command_block(
        kernel, [](AOTIMetalKernelFunctionHandle, void*) {}, nullptr);
    return 0;
  });
  return inner;
}

int64_t operator_in_block(const Tensor& x) {
  int64_t failed = 0;
  run("multiply", [&](AOTIMetalKernelFunctionHandle) {
    try {
      torch::stable::zero_(const_cast<Tensor&>(x));
    } catch (const std::exception&) {
      failed = 1;
    }
    return 0;
  });
  return failed;
}

int64_t too_many_bytes(const Tensor&) {
  const std::string bytes(4097, 'x');
  AOTITorchError error = 0;
  run("saxpy", [&](AOTIMetalKernelFunctionHandle kernel) {
    error = set_bytes(kernel, 3, bytes.data(), bytes.size(), /*by_shim=*/true);
    return 0;
  });
  return error;
}

// Bit 0: the shim of torch 2.14 is there; bit 1: the method is.
int64_t routes(const Tensor&) { return (set_bytes_shim() ? 1 : 0) | (set_bytes_method() ? 2 : 0); }

}  // namespace

STABLE_TORCH_LIBRARY(simulator_example, library) {
  library.def("saxpy(Tensor x, Tensor y, float factor, bool by_shim) -> Tensor");
  library.def("multiply(Tensor x, int factor, int group) -> Tensor");
  for (const char* name :
      {"compile_nonsense", "unknown_kernel", "encode_outside_block", "dispatch_after_block",
          "block_in_block", "operator_in_block", "too_many_bytes", "routes"}) {
    library.def((std::string(name) + "(Tensor x) -> int").c_str());
  }
}

STABLE_TORCH_LIBRARY_IMPL(simulator_example, MPS, library) {
  library.impl("saxpy", TORCH_BOX(&saxpy));
  library.impl("multiply", TORCH_BOX(&multiply));
  library.impl("compile_nonsense", TORCH_BOX(&compile_nonsense));
  library.impl("unknown_kernel", TORCH_BOX(&unknown_kernel));
  library.impl("encode_outside_block", TORCH_BOX(&encode_outside_block));
  library.impl("dispatch_after_block", TORCH_BOX(&dispatch_after_block));
  library.impl("block_in_block", TORCH_BOX(&block_in_block));
  library.impl("operator_in_block", TORCH_BOX(&operator_in_block));
  library.impl("too_many_bytes", TORCH_BOX(&too_many_bytes));
  library.impl("routes", TORCH_BOX(&routes));
}
