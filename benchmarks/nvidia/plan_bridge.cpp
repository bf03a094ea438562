// native/plan.cpp behind two C functions, for plans.py: the plan that the kernels run with on a Mac
// decides here too which variant runs, on which grid, with which parameters.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "../../native/plan.h"

extern "C" {

struct BridgeCall {
  int64_t dtype;  // orchard::DType
  orchard::Layout q, k, v, out, dout;
  double dropout_p;
  double scale;
  int64_t window_left;
  int64_t window_right;
  int64_t diagonal;
};

struct BridgeKernel {
  char family[64];
  char name[128];
  char instantiation[512];
  uint64_t groups[2];
  uint64_t threads;
};

constexpr size_t kMaxKernels = 8;

struct BridgePlan {
  char refusal[256];
  AttentionParams params;
  int64_t kernel_count;
  BridgeKernel kernels[kMaxKernels];
};
}

namespace {

template <size_t N>
void copy(char (&to)[N], const std::string& from) {
  if (from.size() >= N) throw std::length_error(from);
  std::memcpy(to, from.c_str(), from.size() + 1);
}

orchard::Problem problem_of(const BridgeCall& call) {
  orchard::Problem problem;
  problem.dtype = static_cast<orchard::DType>(call.dtype);
  problem.q = call.q;
  problem.k = call.k;
  problem.v = call.v;
  problem.dropout_p = call.dropout_p;
  problem.scale = call.scale;
  problem.window_left = call.window_left;
  problem.window_right = call.window_right;
  problem.diagonal = call.diagonal;
  return problem;
}

void write(const orchard::Plan& plan, BridgePlan* result) {
  if (plan.kernels.size() > kMaxKernels) throw std::length_error("kernels");
  copy(result->refusal, plan.refusal);
  result->params = plan.params;
  result->kernel_count = static_cast<int64_t>(plan.kernels.size());
  for (size_t i = 0; i < plan.kernels.size(); i++) {
    const orchard::KernelPlan& kernel = plan.kernels[i];
    BridgeKernel& to = result->kernels[i];
    copy(to.family, kernel.family);
    copy(to.name, kernel.name);
    copy(to.instantiation, kernel.instantiation);
    std::copy(kernel.groups.begin(), kernel.groups.end(), to.groups);
    to.threads = kernel.threads;
  }
}

}  // namespace

extern "C" {

void bridge_plan_forward(const BridgeCall* call, BridgePlan* result) {
  write(orchard::plan_forward(problem_of(*call), call->out), result);
}

void bridge_plan_backward(const BridgeCall* call, BridgePlan* result) {
  write(orchard::plan_backward(problem_of(*call), call->out, call->dout), result);
}

uint64_t bridge_size_of_plan() { return sizeof(BridgePlan); }
}
