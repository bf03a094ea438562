// Kernel variants compiled on first use, and how they are dispatched. The only Metal-facing file.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "plan/problem.h"

namespace orchard {

/// Metal cannot run the call: the plan refuses it, a shader did not compile or a dispatch failed.
/// what() is the reason shown to users, `detail` the values of this call that it is about.
struct MetalError : std::runtime_error {
  explicit MetalError(const std::string& reason, std::string detail = "")
      : std::runtime_error(reason), detail(std::move(detail)) {}
  std::string detail;
};

/// The message of the torch shim call that has just failed on this thread, where torch keeps it
/// (2.13 and later).
std::string last_error();

/// A tensor and its buffer index; borrows the tensor for the duration of a dispatch.
struct Binding {
  Binding() = default;
  Binding(unsigned index, const torch::stable::Tensor& tensor)
      : index(index), tensor(tensor.get()) {}
  unsigned index;
  AtenTensorHandle tensor;
};

/// The tensors of a dispatch, without memory of their own to allocate or to clear.
class Bindings {
 public:
  Bindings() = default;
  Bindings(std::initializer_list<Binding> bindings) {
    for (const Binding& binding : bindings) bind(binding);
  }
  void bind(const Binding& binding) { bindings_.at(size_++) = binding; }
  const Binding* begin() const { return bindings_.data(); }
  const Binding* end() const { return bindings_.data() + size_; }

 private:
  std::array<Binding, 31> bindings_;  // as many as a kernel can have
  size_t size_ = 0;
};

/// The reason why an earlier call could not compile this variant. It is empty if that call could,
/// or if there was none.
std::string known_failure(const KernelPlan& kernel);

/// Compiles the kernel's variant if need be and encodes it on PyTorch's own command encoder, with
/// so many threadgroups in x and y and the bytes of its params. Throws MetalError.
void dispatch_bytes(const KernelPlan& kernel, const std::array<uint64_t, 2>& groups,
    const Bindings& tensors, const void* params, uint64_t size);

template <typename Params>
void dispatch(const KernelPlan& kernel, const std::array<uint64_t, 2>& groups,
    const Bindings& tensors, const Params& params) {
  dispatch_bytes(kernel, groups, tensors, &params, sizeof params);
}

}  // namespace orchard
