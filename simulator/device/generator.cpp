#include "generator.h"

#include "memory.h"

namespace simulator {

MpsGenerator::MpsGenerator(uint64_t seed)
    : c10::GeneratorImpl(mps_device(), c10::DispatchKeySet(c10::DispatchKey::MPS)),
      inner(at::make_generator<at::CPUGeneratorImpl>(seed)) {}

void MpsGenerator::set_offset(uint64_t) {
  TORCH_CHECK(false, "simulator: the Philox offset of the mps generator is not simulated");
}
uint64_t MpsGenerator::get_offset() const {
  TORCH_CHECK(false, "simulator: the Philox offset of the mps generator is not simulated");
}
void MpsGenerator::set_state(const c10::TensorImpl& state) {
  inner.unsafeGetGeneratorImpl()->set_state(state);
}
c10::intrusive_ptr<c10::TensorImpl> MpsGenerator::get_state() const {
  return inner.unsafeGetGeneratorImpl()->get_state();
}
MpsGenerator* MpsGenerator::clone_impl() const {
  auto* copy = new MpsGenerator(0);
  copy->inner = inner.clone();
  return copy;
}

const at::Generator& default_generator() {
  static const at::Generator generator =
      at::make_generator<MpsGenerator>(c10::default_rng_seed_val);
  return generator;
}

at::Generator cpu_generator_of(const at::Generator& generator) {
  TORCH_CHECK(generator.device().is_mps(), "Expected a 'mps' device type for generator but found '",
      generator.device().type(), "'");
  return static_cast<MpsGenerator*>(generator.unsafeGetGeneratorImpl())->inner;
}

}  // namespace simulator
