// The library's two entry points. Loading it registers nothing: Python (src/orchard_ops) first asks
// which ops it was built for, and has it register them only if those are the package's own.
#include <torch/csrc/stable/library.h>

#include <array>
#include <memory>

#include "attention.h"
#include "cache.h"
#include "call.h"
#include "flex.h"
#include "machine.h"
#include "plan/plan_cache.h"
#include "scoring.h"
#include "shader_library.h"

namespace orchard {
namespace {

using torch::stable::detail::StableLibrary;
using Kind = StableLibrary::Kind;

// Counts the changes that the schemas below do not show, in what results and arguments mean and in
// the ops that Python asks of the library alone.
constexpr int kInterface = 4;

/// Arguments of a query, which writes to none of them.
std::string read_only(std::string arguments) {
  for (const char* alias : {"(a!)", "(b!)"}) arguments.erase(arguments.find(alias), 4);
  return arguments;
}

/// The schemas of the ops that Python defines, without default values, and of the plan.
std::string forward_schema() {
  return "flash_attn_fwd(" + forward_arguments() + ") -> (Tensor out, Tensor row_stats)";
}
std::string backward_schema() {
  return "flash_attn_bwd(" + backward_arguments() +
         ") -> (Tensor dq, Tensor dk, Tensor dv, Tensor dmask, Tensor dsinks)";
}
std::string decode_schema() {
  return "flash_attn_decode(" + decode_arguments() + ") -> (Tensor out, Tensor lse)";
}
std::string append_schema() { return "flash_attn_append(" + append_arguments() + ") -> ()"; }
std::string flex_forward_schema() {
  return "flex_attn_fwd(" + flex_forward_arguments() + ") -> (Tensor out, Tensor row_stats)";
}
std::string flex_backward_schema() {
  return "flex_attn_bwd(" + flex_backward_arguments() + ") -> (Tensor dq, Tensor dk, Tensor dv)";
}
std::string flex_plan_schema() {
  return "flex_attn_plan(" + flex_forward_arguments() + ") -> " + kPlanResults;
}
std::string plan_schema() {
  return "flash_attn_plan(" + forward_arguments() + ") -> " + kPlanResults;
}

std::string decode_plan_schema() {
  return "flash_attn_decode_plan(" + decode_arguments() + ") -> " + kPlanResults;
}
std::string append_plan_schema() {
  return "flash_attn_append_plan(" + read_only(append_arguments()) + ") -> " + kPlanResults;
}

void register_ops() {
  // Never destroyed: what is registered stays until the process ends.
  static auto& libraries = *new std::array<std::unique_ptr<StableLibrary>, 3>;
  auto library = [](Kind kind, const char* key) {
    return std::make_unique<StableLibrary>(kind, op_namespace().c_str(), key, __FILE__, __LINE__);
  };
  auto definitions = library(Kind::FRAGMENT, nullptr);
  definitions->def(plan_schema().c_str());
  definitions->def(decode_plan_schema().c_str());
  definitions->def(append_plan_schema().c_str());
  definitions->def(flex_plan_schema().c_str());
  definitions->def("kernel_head_dims() -> int[]");
  definitions->def("set_machine(int gpu_cores, int scratch_bytes) -> ()");
  definitions->def("plans_computed() -> int");
  definitions->def("plans_remembered() -> int");
  definitions->def(
      "metal_calls() -> (int forward, int backward, int decode, int flex_forward, int "
      "flex_backward)");
  auto queries = library(Kind::IMPL, "CompositeExplicitAutograd");
  queries->impl("flash_attn_plan", &flash_attn_plan);
  queries->impl("flash_attn_decode_plan", &flash_attn_decode_plan);
  queries->impl("flash_attn_append_plan", &flash_attn_append_plan);
  queries->impl("flex_attn_plan", &flex_attn_plan);
  queries->impl("kernel_head_dims", TORCH_BOX(&kernel_head_dims));
  queries->impl("set_machine", TORCH_BOX(&set_machine));
  queries->impl("plans_computed", TORCH_BOX(&plans_computed));
  queries->impl("plans_remembered", TORCH_BOX(&plans_remembered));
  queries->impl("metal_calls", &metal_calls);
  auto kernels = library(Kind::IMPL, "MPS");
  kernels->impl("flash_attn_fwd", &flash_attn_fwd);
  kernels->impl("flash_attn_bwd", &flash_attn_bwd);
  kernels->impl("flash_attn_decode", &flash_attn_decode);
  kernels->impl("flash_attn_append", &flash_attn_append);
  kernels->impl("flex_attn_fwd", &flex_attn_fwd);
  kernels->impl("flex_attn_bwd", &flex_attn_bwd);
  libraries = {std::move(definitions), std::move(queries), std::move(kernels)};
}

}  // namespace
}  // namespace orchard

#define ORCHARD_EXPORT extern "C" __attribute__((visibility("default")))

/// What the library was built for, as one line:
///   orchard_ops interface 4: flash_attn_fwd(Tensor query, ..., str impl) -> (Tensor out, ...);
///   flash_attn_bwd(...) -> (...); flash_attn_plan(...) -> (...); flash_attn_decode(...) -> (...);
///   flash_attn_append(...) -> (); flash_attn_decode_plan(...) -> (...);
///   flash_attn_append_plan(...) -> (...); flex_attn_fwd(...) -> (...); flex_attn_bwd(...) ->
///   (...); flex_attn_plan(...) -> (...)
/// Two libraries whose lines are equal can stand in for each other.
ORCHARD_EXPORT const char* orchard_library_interface() {
  using namespace orchard;
  static const std::string line =
      "orchard_ops interface " + std::to_string(kInterface) + ": " + forward_schema() + "; " +
      backward_schema() + "; " + plan_schema() + "; " + decode_schema() + "; " + append_schema() +
      "; " + decode_plan_schema() + "; " + append_plan_schema() + "; " + flex_forward_schema() +
      "; " + flex_backward_schema() + "; " + flex_plan_schema();
  return line.c_str();
}

/// Registers the ops in a namespace, once for each loaded copy of the library. Null, or why it
/// could not: nothing is registered then.
ORCHARD_EXPORT const char* orchard_register_ops(const char* name) {
  static const std::string failure = [name]() -> std::string {
    try {
      orchard::op_namespace() = name;
      orchard::register_ops();
      return "";
    } catch (const std::exception&) {  // its text is a place in torch's headers
      return "PyTorch refuses its ops, as where another copy of it is loaded: " +
             orchard::last_error();
    }
  }();
  return failure.empty() ? nullptr : failure.c_str();
}
