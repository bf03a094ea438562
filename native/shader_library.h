// Kernel variants compiled on first use, and how they are dispatched. The only Metal-facing file.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "plan.h"

namespace orchard {

/// Metal refused: a shader did not compile or a dispatch failed. what() is the reason shown to
/// users.
struct MetalError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The message of the torch shim call that has just failed on this thread, where torch keeps it
/// (2.13 and later).
std::string last_error();

/// Tensors by buffer index.
using Bindings = std::vector<std::pair<AttentionBuffer, torch::stable::Tensor>>;

/// Why an earlier call could not compile this variant; empty if it could, or was never asked to.
std::string known_failure(const KernelPlan& kernel);

/// Compiles the kernel's variant if need be and encodes it on PyTorch's own command encoder.
/// Throws MetalError.
void dispatch(const KernelPlan& kernel, const Bindings& tensors, const AttentionParams& params);

}  // namespace orchard
