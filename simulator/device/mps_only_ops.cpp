// Operators that PyTorch routes by device to code which only a Mac build contains.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <ATen/ops/_scaled_dot_product_attention_math_for_mps.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/scaled_dot_product_attention_native.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <limits>
#include <vector>

#include "cpu_alias.h"

namespace simulator {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using ThreeTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// ------------------------------------------------------------- scaled dot product attention

// The forward that a Mac runs when no gradient is needed.
std::tuple<at::Tensor, at::Tensor> attention_math_for_mps(const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& value, const OptionalTensor& mask, double dropout,
    bool causal, const OptionalTensor& dropout_mask, std::optional<double> scale, bool enable_gqa) {
  return at::_scaled_dot_product_attention_math(
      query, key, value, mask, dropout, causal, dropout_mask, scale, enable_gqa);
}

OptionalTensor additive_mask(const OptionalTensor& mask, c10::ScalarType dtype) {
  if (!mask || !mask->defined() || mask->scalar_type() != at::kBool) return mask;
  const auto options = at::TensorOptions().dtype(dtype).device(mask->device());
  return at::where(mask->logical_not(), -std::numeric_limits<double>::infinity(),
      at::scalar_tensor(0.0, options));
}

// PyTorch's composite asks its backend chooser about the device, and that has no mps case in a
// build without MPS: an internal assert. So the composite is replaced by one that takes, for mps
// tensors, the branch a Mac takes. It sits at the composite's own dispatch key, so that kernels
// which others register for MPS or AutogradMPS win here exactly as they do on a Mac.
at::Tensor scaled_dot_product_attention(const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const OptionalTensor& mask, double dropout, bool causal,
    std::optional<double> scale, bool enable_gqa) {
  if (query.device().type() != c10::kMPS) {
    return at::native::scaled_dot_product_attention(
        query, key, value, mask, dropout, causal, scale, enable_gqa);
  }
  const auto float_mask = additive_mask(mask, query.scalar_type());
  const bool needs_grad = at::GradMode::is_enabled() &&
                          (query.requires_grad() || key.requires_grad() || value.requires_grad());
  if (needs_grad) {
    return std::get<0>(at::_scaled_dot_product_attention_math(
        query, key, value, float_mask, dropout, causal, std::nullopt, scale, enable_gqa));
  }
  TORCH_CHECK_NOT_IMPLEMENTED(
      dropout == 0.0, "scaled_dot_product_attention for MPS does not support dropout.");
  return std::get<0>(at::_scaled_dot_product_attention_math_for_mps(
      query, key, value, float_mask, dropout, causal, std::nullopt, scale, enable_gqa));
}

// ---------------------------------------------------------------------------------------- linear

ThreeTensors linear_backward(const at::Tensor& input, const at::Tensor& grad,
    const at::Tensor& weight, std::array<bool, 3> wanted) {
  at::Tensor grad_input, grad_weight, grad_bias;
  const auto rows = grad.reshape({-1, grad.size(-1)});
  if (wanted[0]) grad_input = at::matmul(grad, weight);
  if (wanted[1]) grad_weight = at::mm(rows.t(), input.reshape({-1, input.size(-1)}));
  if (wanted[2]) grad_bias = rows.sum(0);
  return {grad_input, grad_weight, grad_bias};
}

// ----------------------------------------------------------------------------------- convolution

struct ConvolutionShape {
  at::IntArrayRef stride, padding, dilation;
  bool transposed;
  at::IntArrayRef output_padding;
  int64_t groups;
};

at::Tensor convolution_on_cpu(const at::Tensor& input, const at::Tensor& weight,
    const OptionalTensor& bias, const ConvolutionShape& shape) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  CpuAliases aliases;
  OptionalTensor cpu_bias;
  if (bias && bias->defined()) cpu_bias = aliases.to_cpu(*bias);
  return aliases.to_mps(
      at::convolution(aliases.to_cpu(input), aliases.to_cpu(weight), cpu_bias, shape.stride,
          shape.padding, shape.dilation, shape.transposed, shape.output_padding, shape.groups));
}

ThreeTensors convolution_backward_on_cpu(const at::Tensor& grad, const at::Tensor& input,
    const at::Tensor& weight, const ConvolutionShape& shape, std::array<bool, 3> wanted) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  CpuAliases aliases;
  const std::vector<int64_t> bias_size{
      shape.transposed ? weight.size(1) * shape.groups : weight.size(0)};
  auto [grad_input, grad_weight, grad_bias] =
      at::convolution_backward(aliases.to_cpu(grad), aliases.to_cpu(input), aliases.to_cpu(weight),
          at::OptionalIntArrayRef(bias_size), shape.stride, shape.padding, shape.dilation,
          shape.transposed, shape.output_padding, shape.groups, wanted);
  return {aliases.to_mps(grad_input), aliases.to_mps(grad_weight), aliases.to_mps(grad_bias)};
}

// at::convolution sends a device it does not know to the "overrideable" operators...
at::Tensor convolution_overrideable(const at::Tensor& input, const at::Tensor& weight,
    const OptionalTensor& bias, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups) {
  return convolution_on_cpu(
      input, weight, bias, {stride, padding, dilation, transposed, output_padding, groups});
}

ThreeTensors convolution_backward_overrideable(const at::Tensor& grad, const at::Tensor& input,
    const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups,
    std::array<bool, 3> wanted) {
  return convolution_backward_on_cpu(
      grad, input, weight, {stride, padding, dilation, transposed, output_padding, groups}, wanted);
}

// ... and code traced for a Mac calls the mps ones.
at::Tensor mps_convolution(const at::Tensor& input, const at::Tensor& weight,
    const OptionalTensor& bias, at::IntArrayRef padding, at::IntArrayRef stride,
    at::IntArrayRef dilation, int64_t groups) {
  const std::vector<int64_t> no_output_padding(padding.size(), 0);
  return convolution_on_cpu(
      input, weight, bias, {stride, padding, dilation, false, no_output_padding, groups});
}

ThreeTensors mps_convolution_backward(const at::Tensor& input, const at::Tensor& grad,
    const at::Tensor& weight, at::IntArrayRef padding, at::IntArrayRef stride,
    at::IntArrayRef dilation, int64_t groups, std::array<bool, 3> wanted) {
  const std::vector<int64_t> no_output_padding(padding.size(), 0);
  return convolution_backward_on_cpu(
      grad, input, weight, {stride, padding, dilation, false, no_output_padding, groups}, wanted);
}

// TORCH_LIBRARY_IMPL by hand, to keep the dispatcher's remark about the override to ourselves.
[[maybe_unused]] const torch::Library* const attention_override = [] {
  struct Silence final : c10::WarningHandler {
    void process(const c10::Warning&) override {}
  } silence;
  c10::WarningUtils::WarningHandlerGuard guard(&silence);
  auto* library = new torch::Library(torch::Library::IMPL, "aten",
      c10::DispatchKey::CompositeImplicitAutograd, __FILE__, __LINE__);
  library->impl("scaled_dot_product_attention", TORCH_FN(scaled_dot_product_attention));
  return library;
}();

TORCH_LIBRARY_IMPL(aten, MPS, library) {
  library.impl("_scaled_dot_product_attention_math_for_mps", TORCH_FN(attention_math_for_mps));
  library.impl("linear_backward", TORCH_FN(linear_backward));
  library.impl("convolution_overrideable", TORCH_FN(convolution_overrideable));
  library.impl("convolution_backward_overrideable", TORCH_FN(convolution_backward_overrideable));
  library.impl("_mps_convolution", TORCH_FN(mps_convolution));
  library.impl("mps_convolution_backward", TORCH_FN(mps_convolution_backward));
}

}  // namespace
}  // namespace simulator
