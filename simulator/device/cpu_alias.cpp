#include "cpu_alias.h"

#include <c10/core/CPUAllocator.h>

#include "handle.h"
#include "memory.h"

namespace simulator {
namespace {

c10::Storage make_storage(size_t nbytes, at::DataPtr data, c10::Allocator* allocator) {
  return c10::Storage(c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(),
      nbytes, std::move(data), allocator,
      /*resizable=*/true));
}

// A tensor of device `key` over `storage`, otherwise like `like`.
at::Tensor retagged(c10::DispatchKey key, const c10::Storage& storage, const at::Tensor& like) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storage), c10::DispatchKeySet(key), like.dtype());
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) impl->_set_conj(true);
  if (like.is_neg()) impl->_set_neg(true);
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return tensor;
}

bool same_geometry(const at::Tensor& a, const at::Tensor& b) {
  return a.sizes() == b.sizes() && a.strides() == b.strides() &&
         a.storage_offset() == b.storage_offset();
}

}  // namespace

void check_dtype(c10::ScalarType dtype) {
  TORCH_CHECK_TYPE(dtype != c10::kDouble,
      "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't "
      "support float64. Please use float32 instead.");
  TORCH_CHECK_TYPE(dtype != c10::kComplexDouble,
      "Trying to convert ComplexDouble to the MPS backend but it does not have "
      "support for that dtype.");
}

c10::Storage CpuAliases::cpu_storage_of(const c10::Storage& mps) {
  for (auto& pair : storages_) {
    if (pair.mps.unsafeGetStorageImpl() == mps.unsafeGetStorageImpl()) return pair.cpu;
  }
  // The alias keeps the device storage alive: the CPU kernel may keep the alias.
  auto* keep_alive = new c10::Storage(mps);
  at::DataPtr data(
      host_of(mps.data()), keep_alive,
      [](void* context) { delete static_cast<c10::Storage*>(context); }, c10::Device(c10::kCPU));
  auto cpu = make_storage(mps.nbytes(), std::move(data), c10::GetCPUAllocator());
  storages_.push_back({mps, cpu});
  return cpu;
}

at::Tensor CpuAliases::to_cpu(const at::Tensor& mps) {
  for (auto& pair : tensors_) {
    if (pair.mps.is_same(mps)) return pair.cpu;
  }
  TORCH_CHECK(mps.has_storage() && mps.layout() == at::kStrided,
      "simulator: only strided mps tensors with storage are simulated");
  auto cpu = retagged(c10::DispatchKey::CPU, cpu_storage_of(mps.storage()), mps);
  tensors_.push_back({mps, cpu});
  return cpu;
}

at::Tensor CpuAliases::to_mps(const at::Tensor& cpu) {
  if (!cpu.defined() || !cpu.is_cpu()) return cpu;
  for (auto& pair : tensors_) {
    if (pair.cpu.is_same(cpu)) return pair.mps;
  }
  check_dtype(cpu.scalar_type());
  for (auto& pair : storages_) {
    if (pair.cpu.unsafeGetStorageImpl() == cpu.storage().unsafeGetStorageImpl()) {
      return retagged(c10::DispatchKey::MPS, pair.mps, cpu);
    }
  }
  auto storage = make_storage(cpu.storage().nbytes(), adopt(cpu.storage()), allocator());
  storages_.push_back({storage, cpu.storage()});
  auto mps = retagged(c10::DispatchKey::MPS, storage, cpu);
  tensors_.push_back({mps, cpu});
  return mps;
}

void CpuAliases::carry_back_resizes() {
  for (auto& pair : storages_) {
    auto* mps = pair.mps.unsafeGetStorageImpl();
    if (host_of(mps->data()) != pair.cpu.data()) mps->set_data_ptr_noswap(adopt(pair.cpu));
    if (mps->nbytes() != pair.cpu.nbytes()) mps->set_nbytes(pair.cpu.nbytes());
  }
  for (auto& pair : tensors_) {
    if (same_geometry(pair.mps, pair.cpu)) continue;
    pair.mps.unsafeGetTensorImpl()->set_sizes_and_strides(
        pair.cpu.sizes(), pair.cpu.strides(), pair.cpu.storage_offset());
  }
}

}  // namespace simulator
