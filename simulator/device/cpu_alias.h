// CPU aliases: how a CPU kernel works on device memory.
//
// For the duration of one operator call, each mps tensor gets a CPU tensor over the very same
// bytes, and the results of the CPU kernel become mps tensors without a copy. Identity is kept:
// the same tensor stays the same tensor (in-place ops), tensors that share a storage still share
// one (views, overlap checks), and an out= tensor that the kernel resized is resized on mps.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

namespace simulator {

// Raises the TypeError of a Mac for types that Metal does not have.
void check_dtype(c10::ScalarType dtype);

class CpuAliases {
 public:
  at::Tensor to_cpu(const at::Tensor& mps);
  at::Tensor to_mps(const at::Tensor& cpu);
  // Call after the CPU kernel and before to_mps().
  void carry_back_resizes();

 private:
  struct StoragePair {
    c10::Storage mps, cpu;
  };
  struct TensorPair {
    at::Tensor mps, cpu;
  };
  c10::Storage cpu_storage_of(const c10::Storage& mps);

  c10::SmallVector<StoragePair, 8> storages_;
  c10::SmallVector<TensorPair, 8> tensors_;
};

}  // namespace simulator
