#include "call.h"

#include <torch/csrc/stable/ops.h>

#include <cstdio>
#include <limits>
#include <optional>
#include <stdexcept>
#include <utility>

#include "checks.h"
#include "plan/join.h"
#include "plan/plan.h"

namespace orchard {

std::string& op_namespace() {
  static auto& name = *new std::string("orchard");  // read until the process ends
  return name;
}

DType dtype_of(const Tensor& x) {
  const int32_t code = dtype_code(x);
  if (code == aoti_torch_dtype_float16()) return DType::kFloat16;
  if (code == aoti_torch_dtype_bfloat16()) return DType::kBFloat16;
  if (code == aoti_torch_dtype_float32()) return DType::kFloat32;
  if (code == aoti_torch_dtype_bool()) return DType::kBool;
  return DType::kOther;
}

Layout layout_of(const Tensor& x) {
  Layout layout;
  const auto sizes = x.sizes(), strides = x.strides();
  for (int d = 0; d < 4; d++) {
    layout.sizes[d] = sizes[d];
    layout.strides[d] = strides[d];
  }
  layout.offset = x.storage_offset();
  return layout;
}

bool is_float32(const OptionalTensor& x) {
  return !x.has_value() || dtype_code(*x) == aoti_torch_dtype_float32();
}

OptionalTensor try_empty_strided(const Tensor& like, const std::vector<int64_t>& sizes,
    const std::vector<int64_t>& strides, int32_t dtype) {
  int32_t device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  const AOTITorchError code = aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()),
      sizes.data(), strides.data(), dtype, device_type_of(like), device_index, &handle);
  if (code != AOTI_TORCH_SUCCESS) return std::nullopt;
  return Tensor(handle);
}

Tensor empty_strided(const Tensor& like, const std::vector<int64_t>& sizes,
    const std::vector<int64_t>& strides, int32_t dtype) {
  OptionalTensor x = try_empty_strided(like, sizes, strides, dtype);
  if (!x.has_value()) {
    throw std::runtime_error("orchard::flash_attn: cannot allocate a result: " + last_error());
  }
  return *x;
}

Tensor empty_in_order_of(const Tensor& like, int64_t last) {
  Layout layout = layout_of(like);
  layout.sizes[3] = last;
  const auto strides = strides_in_order_of(layout.strides, layout.sizes);
  return empty_strided(like, {layout.sizes.begin(), layout.sizes.end()},
      {strides.begin(), strides.end()}, dtype_code(like));
}

Tensor empty_rows(const Tensor& q) {
  const int64_t b = q.size(0), h = q.size(1), l = q.size(2);
  return empty_strided(q, {b, h, l}, {h * l, l, 1}, aoti_torch_dtype_float32());
}

Tensor empty_row_stats(const Tensor& q) {
  const int64_t b = q.size(0), h = q.size(1), l = q.size(2);
  return empty_strided(q, {b, h, l, 2}, {2 * h * l, 2 * l, 2, 1}, aoti_torch_dtype_float32());
}

void see_no_key(Tensor& out, const Tensor& row_stats) {
  torch::stable::zero_(out);
  Tensor origin = torch::stable::select(row_stats, 3, 0);
  Tensor log_sum = torch::stable::select(row_stats, 3, 1);
  torch::stable::fill_(origin, std::numeric_limits<float>::lowest());
  torch::stable::fill_(log_sum, -std::numeric_limits<double>::infinity());
}

TensorStrides strides_of(const Tensor& x) {
  return {x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

Layout layout_of_out(const Problem& problem) {
  Layout out = problem.q;
  out.sizes[3] = problem.v.sizes[3];
  out.strides = strides_in_order_of(problem.q.strides, out.sizes);
  out.offset = 0;
  return out;
}

Tensor empty_floats(const Tensor& like, int64_t elements) {
  return empty_strided(like, {elements}, {1}, aoti_torch_dtype_float32());
}

bool BackwardScratch::allocate(const Tensor& like) {
  const auto floats = [&](int64_t elements) -> OptionalTensor {
    if (elements == 0) return std::nullopt;
    return try_empty_strided(like, {elements}, {1}, aoti_torch_dtype_float32());
  };
  ds = floats(plan->ds_elements);
  dkv_parts = floats(plan->dkv_part_elements);
  return ds.has_value() == (plan->ds_elements > 0) &&
         dkv_parts.has_value() == (plan->dkv_part_elements > 0);
}

void BackwardScratch::bind_key_gradients(
    const Tensor& dk, const Tensor& dv, Bindings& for_keys, Bindings& for_sums) const {
  if (dkv_parts.has_value()) {
    for_sums = {{kBufferDkvParts, *dkv_parts}, {kBufferDk, dk}, {kBufferDv, dv}};
  }
  for_keys.bind({kBufferDk, dkv_parts.has_value() ? *dkv_parts : dk});
  for_keys.bind({kBufferDv, dkv_parts.has_value() ? *dkv_parts : dv});
}

void log_metal(const char* op, const Plan& plan, const Environment& environment) {
  if (!environment.debug_enabled()) return;
  for (const KernelPlan& kernel : plan.kernels) {
    std::fprintf(
        stderr, "[orchard] %s: metal %s (%s)\n", op, kernel.name.c_str(), kernel.tile.c_str());
  }
}

const char* const kPlanResults =
    "(str refusal, str detail, str advice, str[] families, str[] names, str[] instantiations, "
    "str[] tiles, str[] tile_names, str[] alternatives, int[] launches, int scratch_bytes)";

void put_plan(StableIValue* stack, Plan plan, Plan backward) {
  for (KernelLaunch launch : backward.launches) {
    launch.kernel += plan.kernels.size();
    plan.launches.push_back(launch);
  }
  for (KernelPlan& kernel : backward.kernels) plan.kernels.push_back(std::move(kernel));
  for (const KernelPlan& kernel : plan.kernels) {
    if (plan.refusal.empty()) plan.refusal = known_failure(kernel);
  }
  std::vector<std::string> families, names, instantiations, tiles, tile_names, alternatives;
  for (const KernelPlan& kernel : plan.kernels) {
    families.push_back(kernel.family);
    names.push_back(kernel.name);
    instantiations.push_back(kernel.instantiation);
    tiles.push_back(kernel.tile);
    tile_names.push_back(kernel.tile_name);
    std::string joined;  // the stable ABI has no list of lists
    for (const std::string& name : kernel.alternatives)
      joined += (joined.empty() ? "" : ",") + name;
    alternatives.push_back(joined);
  }
  std::vector<int64_t> launches;  // six numbers each
  for (const KernelLaunch& x : plan.launches) {
    for (int64_t n : {static_cast<int64_t>(x.kernel), static_cast<int64_t>(x.groups[0]),
             static_cast<int64_t>(x.groups[1]), int64_t{x.first_head}, int64_t{x.key_begin},
             int64_t{x.key_end}}) {
      launches.push_back(n);
    }
  }
  const int64_t bytes =
      (backward.ds_elements + backward.dkv_part_elements) * static_cast<int64_t>(sizeof(float));
  using torch::stable::detail::from;
  for (const std::string& text : {plan.refusal, plan.detail, plan.advice}) *stack++ = from(text);
  for (const auto* texts :
      {&families, &names, &instantiations, &tiles, &tile_names, &alternatives}) {
    *stack++ = from(*texts);
  }
  *stack++ = from(launches);
  *stack++ = from(bytes);
}

const char* switched_off(const std::string& impl, const Environment& environment) {
  if (impl == "reference") return "impl=\"reference\" was asked for";
  if (environment.metal_disabled()) return "ORCHARD_DISABLE_METAL is set";
  if (environment.torch_fast_math()) {
    return "PYTORCH_MPS_FAST_MATH is set: shaders then compile without infinities, which masks "
           "need";
  }
  return "";
}

void throw_refusal(const Plan& plan) {
  if (!plan.refusal.empty()) throw MetalError(plan.refusal, plan.detail);
}

void allow_fallback(const char* op, const std::string& impl, const Environment& environment,
    const MetalError& error) {
  const bool insisted = impl == "metal" || (impl == "auto" && environment.strict());
  if (!insisted) return;
  const std::string detail = error.detail.empty() ? "" : " (" + error.detail + ")";
  throw std::runtime_error(
      join(op, ": the Metal kernels cannot run this call: ", error.what(), detail));
}

void check_counts(bool as_listed) {
  if (!as_listed) {
    throw std::runtime_error(
        "orchard::flash_attn: the native library is of another version than the Python package");
  }
}

void call_reference(const char* op, Stack& arguments, StableIValue* results, uint64_t num_results) {
  std::vector<StableIValue>& stack = arguments.with_room_for(num_results);
  const std::string name = op_namespace() + "::" + op;
  const AOTITorchError code =
      torch_call_dispatcher(name.c_str(), "", stack.data(), TORCH_ABI_VERSION);
  if (code != AOTI_TORCH_SUCCESS) throw std::runtime_error(last_error());
  std::copy_n(stack.begin(), num_results, results);
}

}  // namespace orchard
