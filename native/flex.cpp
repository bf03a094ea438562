#include "flex.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

#include "call.h"
#include "checks.h"
#include "flex_plan.h"
#include "plan/join.h"
#include "shader_library.h"

namespace orchard {
namespace {

std::atomic<int64_t> forwards{0};
std::atomic<int64_t> backwards{0};

/// The arguments besides the operands, in the order of the schemas.
struct FlexScoring {
  std::vector<Tensor> captures;
  OptionalTensor block_states;
  int64_t block_q, block_kv;
  std::string score, mask;
  double scale;
  std::string impl;
};
const char* const kScoring =
    "Tensor[] captures, Tensor? block_states, int block_q, int block_kv, str score, str mask, "
    "float scale, str impl";
constexpr uint64_t kNumScoring = 8;

struct FlexForward {
  Operands operands;
  FlexScoring scoring;
};

struct FlexBackward {
  Tensor dout;
  OptionalTensor dlse;
  Operands operands;
  Tensor out, row_stats;
  FlexScoring scoring;
};

// The parts of an initializer in braces are evaluated in order.
FlexScoring take_scoring(Arguments& x) {
  return {x.take<std::vector<Tensor>>(), x.take<OptionalTensor>(), x.take<int64_t>(),
      x.take<int64_t>(), x.take<std::string>(), x.take<std::string>(), x.take<double>(),
      x.take<std::string>()};
}

FlexForward take_forward(StableIValue* stack) {
  Arguments x(stack);
  return {x.take<Operands>(), take_scoring(x)};
}

FlexBackward take_backward(StableIValue* stack) {
  Arguments x(stack);
  return {x.take<Tensor>(), x.take<OptionalTensor>(), x.take<Operands>(), x.take<Tensor>(),
      x.take<Tensor>(), take_scoring(x)};
}

void check(bool condition, const char* what) {
  if (!condition) throw Mistake(std::string("the native library takes no such ") + what);
}

void check_states(const FlexScoring& s, const Operands& x) {
  if (!s.block_states.has_value()) return;
  const Tensor& states = *s.block_states;
  check(device_type_of(states) == device_type_of(x.query), "mixture of devices");
  check(states.dim() == 4 && dtype_code(states) == aoti_torch_dtype_uint8(), "block_states");
  check(states.size(0) == 1 || states.size(0) == x.query.size(0), "batches of block_states");
  check(states.size(1) == 1 || states.size(1) == x.query.size(1), "heads of block_states");
  check(s.block_q > 0 && s.block_kv > 0, "block size");
  check(states.size(2) >= blocks_of(x.query.size(2), s.block_q) &&
            states.size(3) >= blocks_of(x.key.size(2), s.block_kv),
      "number of blocks: block_states must cover all queries and keys");
}

void check_call(const FlexScoring& s, const Operands& x) {
  check_operands(x);
  Scoring plain{};
  plain.scale = s.scale;
  plain.window_left = plain.window_right = -1;
  check_scalars(plain, s.impl);
  check_states(s, x);
  for (const Tensor& capture : s.captures) {
    check(device_type_of(capture) == device_type_of(x.query), "mixture of devices");
    check(capture.numel() > 0, "capture: it has no elements");
  }
}

Mods mods_of(const FlexScoring& s) { return {s.score, s.mask, s.block_states.has_value()}; }

/// Sizes and strides of a capture. Throws MetalError where the kernels cannot count so far.
CaptureShape shape_of(const Tensor& capture) {
  CaptureShape shape{{1, 1, 1, 1}, {0, 0, 0, 0}};
  const auto sizes = capture.sizes(), strides = capture.strides();
  int64_t last = 0;
  for (int64_t d = 0; d < capture.dim(); d++) {
    last += (sizes[d] - 1) * strides[d];
    if (std::max(sizes[d], last) > std::numeric_limits<int32_t>::max()) {
      throw MetalError("a captured tensor spans more than 2^31 elements", join("got ", last));
    }
    shape.sizes[d] = static_cast<int32_t>(sizes[d]);
    shape.strides[d] = static_cast<int32_t>(strides[d]);
  }
  return shape;
}

void refuse_captures(const FlexScoring& s) {
  if (s.captures.size() > ORCHARD_MOST_CAPTURES) {
    throw MetalError(
        "score_mod and mask_mod capture more than 8 tensors", join("got ", s.captures.size()));
  }
  for (const Tensor& capture : s.captures) {
    if (capture.dim() > ORCHARD_CAPTURE_DIMS) {
      throw MetalError("a captured tensor has more than 4 dimensions", join("got ", capture.dim()));
    }
  }
}

Problem make_problem(const FlexScoring& s, const Operands& x, const Environment& environment) {
  Problem problem;
  problem.dtype = dtype_of(x.query);
  problem.q = layout_of(x.query);
  problem.k = layout_of(x.key);
  problem.v = layout_of(x.value);
  problem.scale = s.scale;
  problem.scratch_bytes = environment.scratch_bytes();
  problem.gpu_cores = environment.gpu_cores();
  problem.tiles = environment.chosen_tiles();
  const Mods mods = mods_of(s);
  const auto shared = [&](int d) { return !mods.has_states || s.block_states->size(d) == 1; };
  mask_as_mods_do(mods, shared(0) && !differs_by_batch(mods) ? 1 : problem.q.sizes[0],
      shared(1) && !differs_by_head(mods) ? 1 : problem.q.sizes[1], problem);
  return problem;
}

/// What a plan's params do not say. `states` is dense.
FlexParams make_params(const FlexScoring& s, const OptionalTensor& states, const Plan& plan) {
  FlexParams params{};
  params.attention = plan.params;
  for (size_t n = 0; n < s.captures.size(); n++) params.captures[n] = shape_of(s.captures[n]);
  if (!states.has_value()) {
    params.states.whole = 1;
    return params;
  }
  const auto bounded = [](int64_t block) {
    return static_cast<int32_t>(std::min<int64_t>(block, ORCHARD_MAX_LENGTH));
  };
  BlockStateParams& own = params.states;
  own.block_q = bounded(s.block_q);
  own.block_kv = bounded(s.block_kv);
  own.rows = static_cast<int32_t>(states->size(2));
  own.cols = static_cast<int32_t>(states->size(3));
  own.row = states->size(3);
  own.head = states->size(1) == 1 ? 0 : own.row * own.rows;
  own.batch = states->size(0) == 1 ? 0 : own.row * own.rows * states->size(1);
  own.given = 1;
  own.whole = own.block_q % ORCHARD_MAP_BLOCK == 0 && own.block_kv % ORCHARD_MAP_BLOCK == 0;
  return params;
}

/// What scores read besides q and k.
struct FlexTensors {
  const FlexScoring& scoring;
  OptionalTensor states;  ///< dense
  OptionalTensor map;
  const Tensor& stand_in;  ///< for what a flag passes over at run time

  FlexTensors(const FlexScoring& s, const Operands& x, const Plan& plan)
      : scoring(s), stand_in(x.query) {
    if (s.block_states.has_value()) states = torch::stable::contiguous(*s.block_states);
    if (plan.map_elements > 0) map = empty_floats(x.query, 2 * plan.map_elements);
  }

  void bind(Bindings& tensors) const {
    for (size_t n = 0; n < scoring.captures.size(); n++) {
      tensors.bind({static_cast<unsigned>(kBufferCapture0 + n), scoring.captures[n]});
    }
    if (!map.has_value()) return;
    tensors.bind({kBufferMask, states.has_value() ? *states : stand_in});
    tensors.bind({kBufferMaskMap, *map});
  }
};

/// out and row_stats. Throws MetalError.
std::array<Tensor, 2> run_forward(const FlexForward& call, const Environment& environment) {
  const auto& [q, k, v] = call.operands;
  const FlexScoring& s = call.scoring;
  refuse_captures(s);
  Tensor out = empty_in_order_of(q, v.size(3));
  Tensor row_stats = empty_row_stats(q);
  const Problem problem = make_problem(s, call.operands, environment);
  const auto plan = flex_plan_forward(problem, mods_of(s), layout_of(out));
  throw_refusal(*plan);
  if (out.numel() == 0) return {out, row_stats};
  if (k.size(2) == 0) {
    see_no_key(out, row_stats);
    return {out, row_stats};
  }
  log_metal("flex_attn_fwd", *plan, environment);
  const FlexTensors scores(s, call.operands, *plan);
  FlexParams params = make_params(s, scores.states, *plan);
  Bindings tensors{{kBufferQuery, q}, {kBufferKey, k}, {kBufferValue, v}, {kBufferOut, out},
      {kBufferRowStats, row_stats}, {kBufferSinks, row_stats}};  // sinks: a stand-in
  scores.bind(tensors);
  Bindings for_map;
  scores.bind(for_map);
  for (const KernelLaunch& launch : plan->launches) {
    const KernelPlan& kernel = plan->kernels[launch.kernel];
    launch.set(params.attention);
    dispatch(kernel, launch.groups, kernel.role == KernelRole::kMap ? for_map : tensors, params);
  }
  return {std::move(out), std::move(row_stats)};
}

/// dq, dk and dv. Throws MetalError.
std::array<Tensor, 3> run_backward(const FlexBackward& call, const Environment& environment) {
  const auto& [q, k, v] = call.operands;
  const FlexScoring& s = call.scoring;
  const Tensor &out = call.out, &dout = call.dout;
  refuse_captures(s);
  const Tensor row_stats = dense_row_stats(call.row_stats, q);
  OptionalTensor dlse;
  if (call.dlse.has_value()) dlse = dense_rows(*call.dlse, q);
  const Problem problem = make_problem(s, call.operands, environment);
  const Mods mods = mods_of(s);
  const auto plan_of = [&](const Problem& p) {
    return flex_plan_backward(p, mods, layout_of(out), layout_of(dout));
  };
  const auto wanted = plan_of(problem);
  throw_refusal(*wanted);
  std::array<Tensor, 3> grads{empty_in_order_of(q, q.size(3)), empty_in_order_of(k, k.size(3)),
      empty_in_order_of(v, v.size(3))};
  auto& [dq, dk, dv] = grads;
  if (q.numel() == 0 || k.numel() == 0) {
    for (Tensor& x : grads) torch::stable::zero_(x);
    return grads;
  }
  const Tensor delta = empty_rows(q);
  const BackwardScratch scratch =
      allocate_scratch("flex_attn_bwd", wanted, problem, plan_of, environment, q);
  const auto& [plan, ds, dkv_parts] = scratch;
  log_metal("flex_attn_bwd", *plan, environment);
  const FlexTensors scores(s, call.operands, *plan);
  FlexParams params = make_params(s, scores.states, *plan);
  params.attention.dq = strides_of(dq);
  params.attention.dk = strides_of(dk);
  params.attention.dv = strides_of(dv);
  params.attention.has_dlse = dlse.has_value();
  Bindings for_map;
  Bindings for_delta{{kBufferOut, out}, {kBufferDout, dout},
      {kBufferDlse, dlse.has_value() ? *dlse : row_stats}, {kBufferDelta, delta}};
  if (mods.has_map()) for_delta.bind({kBufferRowStats, row_stats});
  Bindings for_keys{{kBufferQuery, q}, {kBufferKey, k}, {kBufferValue, v},
      {kBufferRowStats, row_stats}, {kBufferDout, dout}, {kBufferDelta, delta}};
  Bindings for_key_sums;
  scratch.bind_key_gradients(dk, dv, for_keys, for_key_sums);
  Bindings for_queries{{kBufferQuery, q}, {kBufferKey, k}, {kBufferValue, v},
      {kBufferRowStats, row_stats}, {kBufferDout, dout}, {kBufferDelta, delta}, {kBufferDq, dq}};
  for (Bindings* tensors : {&for_map, &for_keys, &for_queries}) scores.bind(*tensors);
  if (ds.has_value()) {
    for_keys.bind({kBufferDs, *ds});
    for_queries.bind({kBufferDs, *ds});
  }
  for (const KernelLaunch& launch : plan->launches) {
    const KernelPlan& kernel = plan->kernels[launch.kernel];
    const Bindings* tensors[] = {&for_map, &for_delta, &for_keys, &for_key_sums, &for_queries};
    launch.set(params.attention);
    dispatch(kernel, launch.groups, *tensors[static_cast<int>(kernel.role)], params);
  }
  return grads;
}

/// Runs a call, or says why it cannot. There is no reference op to go on to: a function's text does
/// not run elsewhere, so that Python has the reference before it comes here.
template <typename Run>
void run_or_explain(const char* op, const FlexScoring& s, const Operands& x, const Run& run) {
  const Environment environment;
  try {
    check_call(s, x);
    const std::string off = switched_off(s.impl, environment);
    if (!off.empty()) throw MetalError(off);
    run(environment);
  } catch (const MetalError& error) {
    const std::string detail = error.detail.empty() ? "" : " (" + error.detail + ")";
    throw std::runtime_error(
        join(op, ": the Metal kernels cannot run this call: ", error.what(), detail));
  } catch (const Mistake& mistake) {
    throw std::runtime_error(join(op, ": ", mistake.what()));
  }
}

}  // namespace

std::string flex_forward_arguments() {
  return join("Tensor query, Tensor key, Tensor value, ", kScoring);
}

std::string flex_backward_arguments() {
  return join(
      "Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, Tensor out, "
      "Tensor row_stats, ",
      kScoring);
}

void flex_attn_fwd(StableIValue* stack, uint64_t num_arguments, uint64_t num_results) {
  check_counts(num_arguments == 3 + kNumScoring && num_results == 2);
  const FlexForward call = take_forward(stack);
  run_or_explain(
      "orchard::flex_attn_fwd", call.scoring, call.operands, [&](const Environment& environment) {
        put_results(stack, run_forward(call, environment));
        forwards++;
      });
}

void flex_attn_bwd(StableIValue* stack, uint64_t num_arguments, uint64_t num_results) {
  check_counts(num_arguments == 7 + kNumScoring && num_results == 3);
  const FlexBackward call = take_backward(stack);
  run_or_explain(
      "orchard::flex_attn_bwd", call.scoring, call.operands, [&](const Environment& environment) {
        check_like_out(call.dout, call.operands);
        check_like_out(call.out, call.operands);
        put_results(stack, run_backward(call, environment));
        backwards++;
      });
}

void flex_attn_plan(StableIValue* stack, uint64_t num_arguments, uint64_t num_results) {
  check_counts(num_arguments == 3 + kNumScoring && num_results == kNumPlanResults);
  const FlexForward call = take_forward(stack);
  const Environment environment;
  Plan forward, backward;
  try {
    check_call(call.scoring, call.operands);
    const std::string off = switched_off(call.scoring.impl, environment);
    if (!off.empty()) throw MetalError(off);
    refuse_captures(call.scoring);
    for (const Tensor& capture : call.scoring.captures) shape_of(capture);
    const Problem problem = make_problem(call.scoring, call.operands, environment);
    const Layout out = layout_of_out(problem);
    forward = *flex_plan_forward(problem, mods_of(call.scoring), out);
    backward = *flex_plan_backward(problem, mods_of(call.scoring), out, out);
  } catch (const MetalError& error) {
    forward.refusal = error.what();
    forward.detail = error.detail;
  } catch (const Mistake& mistake) {
    throw std::runtime_error(join("orchard::flex_attn_plan: ", mistake.what()));
  }
  put_plan(stack, std::move(forward), std::move(backward));
}

int64_t metal_flex_forwards() { return forwards.load(); }
int64_t metal_flex_backwards() { return backwards.load(); }

}  // namespace orchard
