// Kernel variants compiled on first use, and how they are dispatched. The only Metal-facing file.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <stdexcept>
#include <string>

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

/// A tensor and its buffer index; borrows the tensor for the duration of a dispatch.
struct Binding {
  Binding(AttentionBuffer index, const torch::stable::Tensor& tensor)
      : index(index), tensor(tensor.get()) {}
  AttentionBuffer index;
  AtenTensorHandle tensor;
};
using Bindings = std::initializer_list<Binding>;

/// Why an earlier call could not compile this variant; empty if it could, or was never asked to.
std::string known_failure(const KernelPlan& kernel);

/// Compiles the kernel's variant if need be and encodes it on PyTorch's own command encoder, with
/// so many threadgroups in x and y. Throws MetalError.
void dispatch(const KernelPlan& kernel, const std::array<uint64_t, 2>& groups, Bindings tensors,
    const AttentionParams& params);

}  // namespace orchard
