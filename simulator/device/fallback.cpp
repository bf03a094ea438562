// The boxed fallback of DispatchKey::MPS: runs the CPU kernel of an aten operator on CPU aliases.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <string_view>
#include <unordered_set>

#include "command_block.h"
#include "cpu_alias.h"
#include "generator.h"
#include "waits.h"

namespace simulator {
namespace {

// Which operators ran here, and how often: simulator.fallback_ops().
std::mutex calls_mutex;
std::map<std::string, int64_t> calls;

// Strict mode: the aten operators that have an MPS kernel on a Mac. Null: everything may run.
// Replaced as a whole, since an operator may be running on another thread.
using Names = std::unordered_set<std::string>;
std::atomic<std::shared_ptr<const Names>> strict_names;

// Operators that on a Mac, too, take CPU tensors of any rank beside mps tensors.
bool may_mix_devices(std::string_view name) {
  static constexpr std::array<std::string_view, 10> prefixes = {"aten::copy_", "aten::_copy_from",
      "aten::_copy_from_and_resize", "aten::index", "aten::index_put_", "aten::_index_put_impl_",
      "aten::_unsafe_index", "aten::set_", "aten::_fused", "aten::_pack_padded"};
  for (auto prefix : prefixes) {
    if (name.starts_with(prefix)) return true;
  }
  return false;
}

// Only the operators that come with PyTorch may borrow a CPU kernel: it stands in for Apple's.
// Anyone else's operator without an MPS kernel must fail here as it does on a Mac.
bool comes_with_pytorch(std::string_view name) {
  return name.starts_with("aten::") || name.starts_with("prims::") ||
         name.starts_with("inductor::");
}

bool has_cpu_kernel(const c10::OperatorHandle& op) {
  return op.hasKernelForDispatchKey(c10::DispatchKey::CPU) ||
         op.hasKernelForAnyDispatchKey(
             c10::DispatchKeySet({c10::DispatchKey::CompositeExplicitAutograd,
                 c10::DispatchKey::CompositeImplicitAutograd,
                 c10::DispatchKey::CompositeExplicitAutogradNonFunctional}));
}

bool is_optional_generator(const c10::Argument& argument) {
  const auto optional = argument.type()->cast<c10::OptionalType>();
  return optional && optional->getElementType()->kind() == c10::TypeKind::GeneratorType;
}

// Applies `convert` to every tensor in `value`, whatever list or optional holds it.
template <typename Convert>
void convert_tensors(c10::IValue& value, const Convert& convert) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) value = convert(value.toTensor());
  } else if (value.isTensorList()) {
    auto list = value.toTensorVector();
    for (auto& tensor : list) {
      if (tensor.defined()) tensor = convert(tensor);
    }
    value = c10::IValue(list);
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const auto& tensor : value.toOptionalTensorVector()) {
      const bool present = tensor.has_value() && tensor->defined();
      list.push_back(present ? std::optional<at::Tensor>(convert(*tensor)) : tensor);
    }
    value = list;
  }
}

void run_cpu_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  TORCH_CHECK(!in_command_block(), "simulator: ", op.operator_name(),
      " was called on an mps tensor inside runCommandBlock(); on a Mac this re-enters the "
      "stream's serial queue and deadlocks");
  CpuAliases aliases;
  bool any_mps = false;
  bool any_cpu_with_dimensions = false;
  const auto to_cpu = [&](const at::Tensor& tensor) {
    if (tensor.is_mps()) {
      any_mps = true;
      return aliases.to_cpu(tensor);
    }
    any_cpu_with_dimensions |= tensor.is_cpu() && tensor.dim() > 0;
    return tensor;
  };

  const auto& arguments = op.schema().arguments();
  const size_t first = stack->size() - arguments.size();
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto& value = (*stack)[first + i];
    if (value.isDevice()) {
      if (value.toDevice().is_mps()) {
        any_mps = true;
        value = c10::Device(c10::kCPU);
      }
    } else if (value.isGenerator()) {
      value = cpu_generator_of(value.toGenerator());
    } else if (value.isNone() && is_optional_generator(arguments[i])) {
      value = cpu_generator_of(default_generator());
    } else {
      convert_tensors(value, to_cpu);
    }
  }
  TORCH_CHECK(!(any_mps && any_cpu_with_dimensions) || may_mix_devices(op.schema().name()),
      "Expected all tensors to be on the same device, but found at least two devices, "
      "mps:0 and cpu! (",
      op.operator_name(), ")");
  TORCH_CHECK_NOT_IMPLEMENTED(has_cpu_kernel(op), "The operator '", op.operator_name(),
      "' is not currently implemented for the MPS device "
      "(simulator: it has no CPU kernel to borrow either).");
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  aliases.carry_back_resizes();
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); ++i) {
    convert_tensors((*stack)[i], [&](const at::Tensor& cpu) { return aliases.to_mps(cpu); });
  }
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string full_name = toString(op.operator_name());
  TORCH_CHECK_NOT_IMPLEMENTED(comes_with_pytorch(full_name), "The operator '", full_name,
      "' is not currently implemented for the MPS device.");
  if (const auto allowed = strict_names.load(); allowed && full_name.starts_with("aten::")) {
    TORCH_CHECK_NOT_IMPLEMENTED(allowed->count(full_name.substr(6)), "The operator '", full_name,
        "' is not currently implemented for the MPS device. "
        "(simulator: strict mode)");
  }
  if (reads_data(full_name)) count_wait(Wait::kRead);
  {
    std::lock_guard<std::mutex> lock(calls_mutex);
    ++calls[full_name];
  }
  run_cpu_kernel(op, stack);
}

TORCH_LIBRARY_IMPL(_, MPS, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

}  // namespace
}  // namespace simulator

extern "C" {

// Newline-separated names without "aten::"; null leaves strict mode.
void simulator_set_strict(const char* names) {
  std::shared_ptr<simulator::Names> set;
  if (names) {
    set = std::make_shared<simulator::Names>();
    std::istringstream lines(names);
    for (std::string line; std::getline(lines, line);) set->insert(line);
  }
  simulator::strict_names.store(std::move(set));
}

// Lines of "count name"; valid until the thread asks again.
const char* simulator_fallback_ops() {
  thread_local std::string text;
  text.clear();
  std::lock_guard<std::mutex> lock(simulator::calls_mutex);
  for (const auto& [name, count] : simulator::calls) {
    text += std::to_string(count) + " " + name + "\n";
  }
  return text.c_str();
}

}  // extern "C"
