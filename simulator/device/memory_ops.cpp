// The operators that create, reshape and copy device tensors. They cannot go through the
// fallback, because they are about the device's own storage.
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include <cstring>

#include "command_block.h"
#include "cpu_alias.h"
#include "handle.h"
#include "memory.h"
#include "waits.h"

namespace simulator {
namespace {

constexpr c10::DispatchKeySet kMpsKey(c10::DispatchKey::MPS);

c10::ScalarType checked_dtype(std::optional<at::ScalarType> dtype) {
  const auto chosen = dtype.value_or(at::typeMetaToScalarType(at::get_default_dtype()));
  check_dtype(chosen);
  return chosen;
}

// ------------------------------------------------------------------------------------ creation

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout> layout, std::optional<at::Device>, std::optional<bool>,
    std::optional<at::MemoryFormat> memory_format) {
  TORCH_CHECK(layout.value_or(at::kStrided) == at::kStrided,
      "simulator: only strided mps tensors are simulated");
  return at::detail::empty_generic(size, allocator(), kMpsKey, checked_dtype(dtype), memory_format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
    std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, allocator(), kMpsKey, checked_dtype(dtype));
}

// PyTorch's version has a null storage, which would reach CPU kernels as a null pointer.
at::Tensor efficient_zero_tensor(at::IntArrayRef size, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout> layout, std::optional<at::Device> device,
    std::optional<bool> pin_memory) {
  return empty(size, dtype, layout, device, pin_memory, std::nullopt).zero_();
}

// ------------------------------------------------------------------------------ resize and set_

void grow_storage(const at::Tensor& tensor) {
  auto* storage = tensor.storage().unsafeGetStorageImpl();
  const size_t needed = at::detail::computeStorageNbytes(
      tensor.sizes(), tensor.strides(), tensor.dtype().itemsize(), tensor.storage_offset());
  if (storage->nbytes() >= needed) return;
  auto grown = allocator()->allocate(needed);
  if (storage->nbytes() > 0) {
    std::memcpy(host_of(grown.get()), host_of(storage->data()), storage->nbytes());
  }
  storage->set_data_ptr_noswap(std::move(grown));
  storage->set_nbytes(needed);
}

const at::Tensor& resize_(
    const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> memory_format) {
  auto* impl = self.unsafeGetTensorImpl();
  if (self.sizes() != size) {
    impl->set_sizes_contiguous(size);
    grow_storage(self);
  }
  if (memory_format) impl->empty_tensor_restride(*memory_format);
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size,
    at::IntArrayRef stride) {
  TORCH_CHECK(source.device().is_mps(),
      "Attempted to set the storage of a tensor on device \"mps:0\" to a storage on "
      "different device \"",
      source.device(), "\"");
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(offset);
  if (stride.empty()) {
    impl->set_sizes_contiguous(size);
  } else {
    impl->set_sizes_and_strides(size, stride);
  }
  grow_storage(self);
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage source) {
  const auto elements = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  return set_storage(self, std::move(source), 0, {elements}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  if (self.is_same(source)) return self;
  return set_storage(
      self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Tensor& set_empty(at::Tensor& self) {
  c10::Storage nothing(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), 0, allocator(), /*resizable=*/true));
  return set_storage(self, std::move(nothing), 0, {0}, {});
}

// ---------------------------------------------------------------------------------------- copies

// Any direction between cpu and mps. A float64 source is converted on the way in, as on a Mac:
// only the destination's type matters, and that was checked when it was made.
at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  TORCH_CHECK(!in_command_block(), "simulator: copy_() of an mps tensor inside runCommandBlock()");
  TORCH_CHECK(self.is_mps() || self.is_cpu(), "simulator: copy_() to device ", self.device());
  // On a Mac a copy from the device waits even if it is non_blocking (to pageable memory).
  if (self.is_mps() != source.is_mps() && !(self.is_mps() && non_blocking)) {
    count_wait(Wait::kCopy);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  CpuAliases aliases;
  auto to = self.is_mps() ? aliases.to_cpu(self) : self;
  auto from = source.is_mps() ? aliases.to_cpu(source) : source;
  to.copy_(from, non_blocking);
  return self;
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& destination, bool non_blocking) {
  auto to = destination;
  copy_(to, self, non_blocking);
  return destination;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& destination) {
  auto to = destination;
  to.resize_(self.sizes());
  copy_(to, self, /*non_blocking=*/false);
  return destination;
}

TORCH_LIBRARY_IMPL(aten, MPS, library) {
  library.impl("empty.memory_format", TORCH_FN(empty));
  library.impl("empty_strided", TORCH_FN(empty_strided));
  library.impl("_efficientzerotensor", TORCH_FN(efficient_zero_tensor));

  library.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  library.impl("view", TORCH_FN(at::native::view));
  library.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  library.impl("unfold", TORCH_FN(at::native::unfold));
  library.impl("view_as_real", TORCH_FN(at::native::view_as_real));
  library.impl("view_as_complex", TORCH_FN(at::native::view_as_complex));

  library.impl("resize_", TORCH_FN(resize_));
  library.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  library.impl("set_.source_Storage", TORCH_FN(set_whole_storage));
  library.impl("set_.source_Tensor", TORCH_FN(set_tensor));
  library.impl("set_", TORCH_FN(set_empty));

  library.impl("copy_", TORCH_FN(copy_));
  library.impl("_copy_from", TORCH_FN(copy_from));
  library.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
}

}  // namespace
}  // namespace simulator
