// What the ops' MPS kernels have in common: how a call becomes a problem, what it allocates, and
// how it ends where Metal cannot run it.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "environment.h"
#include "plan/problem.h"
#include "scoring.h"
#include "shader_library.h"

namespace orchard {

/// The dispatcher's namespace of the ops, which the Python package gives when it registers them.
std::string& op_namespace();

DType dtype_of(const Tensor& x);
Layout layout_of(const Tensor& x);
bool is_float32(const OptionalTensor& x);

/// A tensor, or none if it cannot be allocated.
OptionalTensor try_empty_strided(const Tensor& like, const std::vector<int64_t>& sizes,
    const std::vector<int64_t>& strides, int32_t dtype);
Tensor empty_strided(const Tensor& like, const std::vector<int64_t>& sizes,
    const std::vector<int64_t>& strides, int32_t dtype);

/// An uninitialised tensor in like's dtype and stride order, with a last size of its own.
Tensor empty_in_order_of(const Tensor& like, int64_t last);

/// (B, H, L) float32
Tensor empty_rows(const Tensor& q);

/// (B, H, L, 2) float32: the origin of a row's exponentials, and the logarithm of their sum.
Tensor empty_row_stats(const Tensor& q);

/// The results of rows that see no key.
void see_no_key(Tensor& out, const Tensor& row_stats);

TensorStrides strides_of(const Tensor& x);

/// Where a forward's out lies, as it is allocated; dout is taken to be like it.
Layout layout_of_out(const Problem& problem);

/// float32 scratch and results of the kernels.
Tensor empty_floats(const Tensor& like, int64_t elements);

/// A backward's plan, and what it may take memory for beside the results.
struct BackwardScratch {
  std::shared_ptr<const Plan> plan;
  OptionalTensor ds;
  OptionalTensor dkv_parts;

  /// Allocates as far as there is memory. Returns whether there was.
  bool allocate(const Tensor& like);

  /// Binds where the key's side stores its sums: dk and dv, or the buffer for those of its parts;
  /// what adds these up is in `for_sums` then.
  void bind_key_gradients(
      const Tensor& dk, const Tensor& dv, Bindings& for_keys, Bindings& for_sums) const;
};

/// The plan that `plan_of` makes of a problem, with its scratch. Where there is no memory for that,
/// it is the plan of a call that may take none: dS is computed twice, and no group divided.
template <typename PlanOf>
BackwardScratch allocate_scratch(const char* op, std::shared_ptr<const Plan> plan, Problem problem,
    const PlanOf& plan_of, const Environment& environment, const Tensor& like) {
  BackwardScratch scratch{std::move(plan), {}, {}};
  if (scratch.allocate(like)) return scratch;
  if (environment.debug_enabled()) {
    std::fprintf(stderr, "[orchard] %s: no memory for scratch, doing without\n", op);
  }
  problem.scratch_bytes = 0;
  return {plan_of(problem), {}, {}};
}

void log_metal(const char* op, const Plan& plan, const Environment& environment);

extern const char* const kPlanResults;  ///< of an op that says a plan, as its schema has them
constexpr uint64_t kNumPlanResults = 11;

/// The results of such an op: a forward's plan, and its backward's behind it. Refused if one of the
/// kernels has failed before.
void put_plan(StableIValue* stack, Plan forward, Plan backward = {});

/// The reason why a call does not reach the plan; empty if it does.
const char* switched_off(const std::string& impl, const Environment& environment);

void throw_refusal(const Plan& plan);

/// Raises where the caller insisted on Metal.
void allow_fallback(const char* op, const std::string& impl, const Environment& environment,
    const MetalError& error);

/// Raises unless the schema has as many arguments and results as the lists here: torch would
/// otherwise hand over something else under each name.
void check_counts(bool as_listed);

/// Calls the reference op of this name with what is on the stack.
void call_reference(const char* op, Stack& arguments, StableIValue* results, uint64_t num_results);

/// Hands a call over to a reference op: its results become this call's. That op, which is Python,
/// remembers what it raises, and Python's caller of this one raises that instead of the text here.
template <typename Call>
void run_reference(const char* op, const Call& call, const std::string& reason,
    StableIValue* results, uint64_t num_results) {
  Stack arguments;
  arguments.put(call);
  arguments.put(reason);
  call_reference(op, arguments, results, num_results);
}

template <size_t N>
void put_results(StableIValue* stack, const std::array<Tensor, N>& results) {
  for (const Tensor& x : results) *stack++ = torch::stable::detail::from(x);
}

}  // namespace orchard
