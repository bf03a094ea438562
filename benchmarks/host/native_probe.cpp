// Times the MPS kernels of orchard::flash_attn_fwd and flash_attn_bwd from the inside: no Python,
// no dispatcher. Linked with the objects of the native library; see native_cost.py.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/c/shim_mps.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <chrono>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../native/attention.h"
#include "../../native/shader_library.h"

namespace {

using orchard::OptionalTensor;
using orchard::Tensor;

void check(AOTITorchError code) {
  if (code != AOTI_TORCH_SUCCESS) throw std::runtime_error(orchard::last_error());
}

/// Runs `call` REPEATS times; the nanoseconds of each, as an int64 CPU tensor.
template <typename Call>
Tensor nanoseconds(int64_t repeats, const Call& call) {
  using Clock = std::chrono::steady_clock;
  const int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  check(aoti_torch_empty_strided(
      1, &repeats, &stride, aoti_torch_dtype_int64(), aoti_torch_device_type_cpu(), 0, &handle));
  Tensor times(handle);
  auto* each = static_cast<int64_t*>(times.mutable_data_ptr());
  for (int64_t i = 0; i < repeats; i++) {
    const auto started = Clock::now();
    call();
    each[i] = std::chrono::nanoseconds(Clock::now() - started).count();
  }
  return times;
}

/// A causal forward; what it returns is freed inside the measured time.
Tensor time_forward(Tensor q, Tensor k, Tensor v, double scale, int64_t repeats) {
  const std::string impl = "auto";
  return nanoseconds(repeats,
      [&] { orchard::flash_attn_fwd(q, k, v, {}, {}, {}, {}, 0.0, scale, -1, 0, 0, 0.0, impl); });
}

Tensor time_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    double scale, int64_t repeats) {
  const std::string impl = "auto";
  return nanoseconds(repeats, [&] {
    orchard::flash_attn_bwd(
        dout, {}, q, k, v, out, lse, {}, {}, {}, {}, 0.0, scale, -1, 0, 0, 0.0, false, impl);
  });
}

AOTIMetalKernelFunctionHandle empty_kernel() {
  static const auto kernel = [] {
    const char* source =
        "#include <metal_stdlib>\n"
        "kernel void nothing(device float* x [[buffer(0)]]) {}\n";
    AOTIMetalShaderLibraryHandle library = nullptr;
    AOTIMetalKernelFunctionHandle function = nullptr;
    check(aoti_torch_mps_create_shader_library(source, &library));
    check(aoti_torch_mps_get_kernel_function(library, "nothing", &function));
    return function;
  }();
  return kernel;
}

struct ShimCalls {
  AtenTensorHandle tensor;
  int64_t arguments;
};

void encode_nothing(AOTIMetalKernelFunctionHandle function, void* user_data) {
  const auto& calls = *static_cast<ShimCalls*>(user_data);
  aoti_torch_mps_start_encoding(function);
  for (int64_t i = 0; i < calls.arguments; i++) {
    aoti_torch_mps_set_arg_tensor(function, static_cast<unsigned>(i), calls.tensor);
  }
  const uint64_t threads[] = {128, 1, 1};
  aoti_torch_mps_dispatch_array_with_group_size(function, threads, 3, threads, 3);
}

/// The calls into torch that a kernel of this library cannot avoid, and nothing else: ALLOCATIONS
/// tensors like `like` made and freed, LAUNCHES command blocks with ARGUMENTS buffers each.
Tensor time_shims(
    Tensor like, int64_t allocations, int64_t launches, int64_t arguments, int64_t repeats) {
  const auto kernel = empty_kernel();
  const auto sizes = like.sizes(), strides = like.strides();
  int32_t dtype = 0, type = 0, index = 0;
  check(aoti_torch_get_dtype(like.get(), &dtype));
  check(aoti_torch_get_device_type(like.get(), &type));
  check(aoti_torch_get_device_index(like.get(), &index));
  ShimCalls calls{like.get(), arguments};
  return nanoseconds(repeats, [&] {
    std::vector<Tensor> made;
    for (int64_t i = 0; i < allocations; i++) {
      AtenTensorHandle handle = nullptr;
      check(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
          strides.data(), dtype, type, index, &handle));
      made.emplace_back(handle);
    }
    for (int64_t i = 0; i < launches; i++) {
      check(aoti_torch_mps_run_command_block(kernel, &encode_nothing, &calls));
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(orchard_host_cost, m) {
  m.def("time_forward(Tensor q, Tensor k, Tensor v, float scale, int repeats) -> Tensor");
  m.def(
      "time_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "float scale, int repeats) -> Tensor");
  m.def(
      "time_shims(Tensor like, int allocations, int launches, int arguments, int repeats) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(orchard_host_cost, CompositeExplicitAutograd, m) {
  m.impl("time_forward", TORCH_BOX(&time_forward));
  m.impl("time_backward", TORCH_BOX(&time_backward));
  m.impl("time_shims", TORCH_BOX(&time_shims));
}
