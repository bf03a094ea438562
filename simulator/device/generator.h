// Random numbers of the device.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Generator.h>
#include <c10/core/GeneratorImpl.h>

namespace simulator {

// A CPU generator under an mps tag: CPU kernels get `inner`. Numbers are reproducible by seed,
// but they are those of the CPU (Mersenne twister), not the Philox numbers of a Mac.
struct MpsGenerator final : c10::GeneratorImpl {
  explicit MpsGenerator(uint64_t seed);
  static c10::DeviceType device_type() { return c10::DeviceType::MPS; }

  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_offset(uint64_t) override;
  uint64_t get_offset() const override;
  void set_state(const c10::TensorImpl& state) override;
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override;
  MpsGenerator* clone_impl() const override;

  at::Generator inner;
};

const at::Generator& default_generator();

// The CPU generator behind an mps one.
at::Generator cpu_generator_of(const at::Generator& generator);

}  // namespace simulator
