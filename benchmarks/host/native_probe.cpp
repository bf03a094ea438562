// Measures the native code where it runs: once this library is loaded, the MPS kernels of
// orchard::flash_attn_fwd and flash_attn_bwd go through a clock. Linked with the objects of the
// native library; see probe.py. Beside them stand two controls: the same calls into torch without
// this project, and an attention of PyTorch's own whose kernels do nothing.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/c/shim_mps.h>
#include <torch/csrc/stable/library.h>

#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../../native/attention.h"
#include "../../native/scoring.h"
#include "../../native/shader_library.h"

namespace {

using orchard::OptionalTensor;
using orchard::Tensor;
using Clock = std::chrono::steady_clock;

void check(AOTITorchError code) {
  if (code != AOTI_TORCH_SUCCESS) throw std::runtime_error(orchard::last_error());
}

// Appended by one call at a time: the benchmark is serial, whatever thread runs the backward.
std::vector<int64_t> forward_ns, backward_ns;

struct Stopwatch {
  std::vector<int64_t>& times;
  Clock::time_point started = Clock::now();
  ~Stopwatch() {
    const std::chrono::nanoseconds elapsed = Clock::now() - started;
    times.push_back(elapsed.count());
  }
};

// With the taking of arguments from the dispatcher's stack and the putting of results there.
void timed_forward(StableIValue* stack, uint64_t num_arguments, uint64_t num_results) {
  const Stopwatch stopwatch{forward_ns};
  orchard::flash_attn_fwd(stack, num_arguments, num_results);
}

void timed_backward(StableIValue* stack, uint64_t num_arguments, uint64_t num_results) {
  const Stopwatch stopwatch{backward_ns};
  orchard::flash_attn_bwd(stack, num_arguments, num_results);
}

Tensor empty_on(
    int32_t device_type, int32_t device_index, int32_t dtype, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
  AtenTensorHandle handle = nullptr;
  check(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

Tensor empty_like(const Tensor& like) {
  int32_t dtype = 0, type = 0, index = 0;
  check(aoti_torch_get_dtype(like.get(), &dtype));
  check(aoti_torch_get_device_type(like.get(), &type));
  check(aoti_torch_get_device_index(like.get(), &index));
  const auto sizes = like.sizes();
  return empty_on(type, index, dtype, {sizes.begin(), sizes.end()});
}

/// The recorded nanoseconds as an int64 CPU tensor, and forgets them.
Tensor take(std::vector<int64_t>& times) {
  Tensor result = empty_on(aoti_torch_device_type_cpu(), 0, aoti_torch_dtype_int64(),
      {static_cast<int64_t>(times.size())});
  if (!times.empty()) {
    std::memcpy(result.mutable_data_ptr(), times.data(), times.size() * sizeof times[0]);
  }
  times.clear();
  return result;
}

std::tuple<Tensor, Tensor> take_times() { return {take(forward_ns), take(backward_ns)}; }

// ---- control: what the calls into torch cost without this project -------------------------------

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

/// ALLOCATIONS tensors like `like`, LAUNCHES command blocks with ARGUMENTS buffers each: the
/// nanoseconds of each of REPEATS times.
Tensor time_shims(
    Tensor like, int64_t allocations, int64_t launches, int64_t arguments, int64_t repeats) {
  const auto kernel = empty_kernel();
  ShimCalls calls{like.get(), arguments};
  std::vector<int64_t> times;
  for (int64_t n = 0; n < repeats; n++) {
    const Stopwatch stopwatch{times};
    std::vector<Tensor> made;
    for (int64_t i = 0; i < allocations; i++) made.push_back(empty_like(like));
    for (int64_t i = 0; i < launches; i++) {
      check(aoti_torch_mps_run_command_block(kernel, &encode_nothing, &calls));
    }
  }
  return take(times);
}

// ---- control: the attention that F.scaled_dot_product_attention runs on a CPU, on this device ---

std::tuple<Tensor, Tensor> empty_sdpa(Tensor query, Tensor key, Tensor value, double dropout_p,
    bool is_causal, OptionalTensor attn_mask, std::optional<double> scale) {
  return {empty_like(query), empty_like(query)};
}

std::tuple<Tensor, Tensor, Tensor> empty_sdpa_backward(Tensor dout, Tensor query, Tensor key,
    Tensor value, Tensor out, Tensor lse, double dropout_p, bool is_causal,
    OptionalTensor attn_mask, std::optional<double> scale) {
  return {empty_like(query), empty_like(key), empty_like(value)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orchard, MPS, m) {
  m.impl("flash_attn_fwd", &timed_forward);
  m.impl("flash_attn_bwd", &timed_backward);
}

STABLE_TORCH_LIBRARY_IMPL(aten, MPS, m) {
  m.impl("_scaled_dot_product_flash_attention_for_cpu", TORCH_BOX(&empty_sdpa));
  m.impl("_scaled_dot_product_flash_attention_for_cpu_backward", TORCH_BOX(&empty_sdpa_backward));
}

STABLE_TORCH_LIBRARY(orchard_host_cost, m) {
  m.def("take_times() -> (Tensor forward, Tensor backward)");
  m.def(
      "time_shims(Tensor like, int allocations, int launches, int arguments, int repeats) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(orchard_host_cost, CompositeExplicitAutograd, m) {
  m.impl("take_times", TORCH_BOX(&take_times));
  m.impl("time_shims", TORCH_BOX(&time_shims));
}
