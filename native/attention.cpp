#include "attention.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <limits>
#include <stdexcept>
#include <utility>

#include "cache.h"
#include "call.h"
#include "checks.h"
#include "environment.h"
#include "flex.h"
#include "plan/decode.h"
#include "plan/join.h"
#include "plan/plan_cache.h"
#include "scoring.h"
#include "shader_library.h"

namespace orchard {
namespace {

std::atomic<int64_t> forward_calls{0};
std::atomic<int64_t> backward_calls{0};

/// A mask of four dimensions, or of five (Scoring.attn_mask in Python), as five.
MaskLayout layout_of_mask(const Tensor& mask, int64_t batch) {
  MaskLayout layout;
  const auto sizes = mask.sizes(), strides = mask.strides();
  const int64_t dims = mask.dim();
  for (int d = 0; d < 3; d++) {
    layout.sizes[2 + d] = sizes[dims - 3 + d];
    layout.strides[2 + d] = strides[dims - 3 + d];
  }
  layout.sizes[0] = sizes[0];
  layout.strides[0] = strides[0];
  layout.sizes[1] = dims == 5 ? sizes[1] : 1;
  layout.strides[1] = dims == 5 ? strides[1] : 0;
  layout.offset = mask.storage_offset();
  layout.inner = layout.sizes[1];
  if (dims == 5 && layout.sizes[1] == 1)
    layout.inner = batch / std::max<int64_t>(layout.sizes[0], 1);
  return layout;
}

/// The largest number of keys that gives the same plan as `span`, so that sequences of ever new
/// lengths share plans; 0 where there are not so many keys.
int64_t rounded_span(int64_t span, int64_t kv_len) {
  if (span >= kv_len) return 0;
  constexpr int64_t kWhereverItBegins = 7;  // in a block of 8 keys
  const int64_t blocks = blocks_of(span + kWhereverItBegins, ORCHARD_KEY_CHUNK);
  const int64_t rounded = ORCHARD_KEY_CHUNK * blocks - kWhereverItBegins;
  return rounded < kv_len ? rounded : 0;
}

Problem make_problem(const Operands& x, const Scoring& s, const Environment& environment) {
  Problem problem;
  problem.dtype = dtype_of(x.query);
  problem.q = layout_of(x.query);
  problem.k = layout_of(x.key);
  problem.v = layout_of(x.value);
  if (s.attn_mask.has_value()) {
    problem.has_mask = true;
    problem.mask_dtype = dtype_of(*s.attn_mask);
    problem.mask = layout_of_mask(*s.attn_mask, x.query.size(0));
  }
  if (s.alibi_slopes.has_value()) {
    const Tensor& slopes = *s.alibi_slopes;
    problem.has_alibi = true;
    problem.alibi_batch = slopes.dim() == 2 ? slopes.stride(0) : 0;
    problem.alibi_head = slopes.stride(slopes.dim() - 1);
  }
  problem.has_sinks = s.sinks.has_value();
  problem.per_head_float32 = is_float32(s.alibi_slopes) && is_float32(s.sinks);
  if (s.key_ranges.has_value()) {
    problem.has_key_ranges = true;
    const int64_t of_head = 4 * x.query.size(2), heads = s.key_ranges->size(1);
    problem.ranges_head = heads == 1 ? 0 : of_head;
    problem.ranges_batch = s.key_ranges->size(0) == 1 ? 0 : of_head * heads;
    if (s.key_span > 0) problem.key_span = rounded_span(s.key_span, x.key.size(2));
  }
  problem.dropout_p = s.dropout_p;
  problem.scale = s.scale;
  problem.window_left = s.window_left;
  problem.window_right = s.window_right;
  problem.diagonal = s.diagonal;
  problem.softcap = s.softcap;
  problem.scratch_bytes = environment.scratch_bytes();
  problem.gpu_cores = environment.gpu_cores();
  problem.tiles = environment.chosen_tiles();
  return problem;
}

/// Uninitialised and dense, of the mask's shape and dtype.
Tensor empty_like_mask(const Tensor& mask) {
  std::vector<int64_t> sizes, strides(mask.dim());
  for (int64_t size : mask.sizes()) sizes.push_back(size);
  int64_t next = 1;
  for (int64_t d = mask.dim() - 1; d >= 0; d--) {
    strides[d] = next;
    next *= std::max<int64_t>(sizes[d], 1);
  }
  return empty_strided(mask, sizes, strides, dtype_code(mask));
}

void set_seed(AttentionParams& params, uint64_t seed) {
  params.dropout_seed[0] = static_cast<uint32_t>(seed);
  params.dropout_seed[1] = static_cast<uint32_t>(seed >> 32);
}

/// What scores read besides q and k, for the kernels that form them.
struct ScoreTensors {
  const Scoring& scoring;
  OptionalTensor map;     ///< of the mask
  OptionalTensor sinks;   ///< dense
  OptionalTensor ranges;  ///< dense
  OptionalTensor hulls;   ///< of ranges, in a backward

  ScoreTensors(const Operands& x, const Scoring& s, const Plan& plan) : scoring(s) {
    if (plan.map_elements > 0) map = empty_floats(x.query, 2 * plan.map_elements);
    if (s.sinks.has_value()) {
      sinks = s.sinks->stride(0) == 1 ? *s.sinks : torch::stable::contiguous(*s.sinks);
    }
    if (s.key_ranges.has_value()) ranges = torch::stable::contiguous(*s.key_ranges);
    if (plan.hull_elements > 0) hulls = empty_floats(x.query, plan.hull_elements);
  }

  Bindings for_map() const {
    if (!map.has_value()) return {};
    Bindings tensors{{kBufferMask, *scoring.attn_mask}, {kBufferMaskMap, *map}};
    if (ranges.has_value()) tensors.bind({kBufferKeyRanges, *ranges});
    return tensors;
  }

  void bind(Bindings& tensors) const {
    if (scoring.attn_mask.has_value()) tensors.bind({kBufferMask, *scoring.attn_mask});
    if (map.has_value()) tensors.bind({kBufferMaskMap, *map});
    if (scoring.alibi_slopes.has_value()) {
      tensors.bind({kBufferAlibiSlopes, *scoring.alibi_slopes});
    }
    bind_ranges(tensors);
  }

  void bind_ranges(Bindings& tensors) const {
    if (ranges.has_value()) tensors.bind({kBufferKeyRanges, *ranges});
    if (hulls.has_value()) tensors.bind({kBufferRangeHulls, *hulls});
  }
};

/// A forward that no backward follows, on the decode kernel: out and row_stats, or nothing where
/// the plan leaves the call to the forward's own kernel. Throws MetalError.
std::optional<std::array<Tensor, 2>> run_forward_as_decode(
    const Problem& problem, const Operands& x, const Scoring& s, const Environment& environment) {
  if (s.key_span != kNoBackward) return std::nullopt;
  checked_seed(s);  // no plan is asked about a dropout_p that is no probability
  if (!prefers_decode(problem)) return std::nullopt;
  const Tensor& q = x.query;
  Tensor out = empty_in_order_of(q, x.value.size(3));
  const auto decode = cached_plan_forward_as_decode(problem, layout_of(out));
  if (!decode->plan.refusal.empty()) return std::nullopt;
  Tensor row_stats = empty_row_stats(q);
  log_metal("flash_attn_fwd", decode->plan, environment);
  Bindings tensors;
  if (s.attn_mask.has_value()) tensors.bind({kBufferMask, *s.attn_mask});
  if (s.alibi_slopes.has_value()) tensors.bind({kBufferAlibiSlopes, *s.alibi_slopes});
  OptionalTensor ranges;
  if (s.key_ranges.has_value()) {
    ranges = torch::stable::contiguous(*s.key_ranges);
    tensors.bind({kBufferKeyRanges, *ranges});
  }
  run_decode_plan(*decode, decode->params, x, tensors, s.sinks, out, row_stats);
  return std::array<Tensor, 2>{std::move(out), std::move(row_stats)};
}

/// out and row_stats on Metal. Throws MetalError.
std::array<Tensor, 2> run_forward(
    Problem problem, const Operands& x, const Scoring& s, const Environment& environment) {
  const auto& [q, k, v] = x;
  const uint64_t seed = checked_seed(s);
  Tensor out = empty_in_order_of(q, v.size(3));
  Tensor row_stats = empty_row_stats(q);
  problem.key_span = 0;  // a backward's matter
  auto plan = cached_plan_forward(problem, layout_of(out));
  throw_refusal(*plan);
  if (out.numel() == 0) return {out, row_stats};
  if (k.size(2) == 0 && !s.sinks.has_value()) {  // no keys: nothing to launch
    see_no_key(out, row_stats);
    return {out, row_stats};
  }
  OptionalTensor parts;
  if (plan->forward_part_elements > 0) {
    parts = try_empty_strided(q, {plan->forward_part_elements}, {1}, aoti_torch_dtype_float32());
    if (!parts.has_value()) {
      if (environment.debug_enabled()) {
        std::fprintf(stderr, "[orchard] flash_attn_fwd: no memory for parts, not dividing keys\n");
      }
      problem.gpu_cores = kUndivided;
      plan = cached_plan_forward(problem, layout_of(out));
    }
  }
  AttentionParams params = plan->params;
  set_seed(params, seed);
  log_metal("flash_attn_fwd", *plan, environment);
  const ScoreTensors scores(x, s, *plan);
  // Code that a flag passes over at run time still wants its buffer, so sinks have a stand-in that
  // is never read, as keys have where there are none. What is no part of a variant is not bound.
  const bool has_keys = k.size(2) > 0;
  Bindings tensors{{kBufferQuery, q}, {kBufferKey, has_keys ? k : q},
      {kBufferValue, has_keys ? v : q}, {kBufferOut, out}, {kBufferRowStats, row_stats},
      {kBufferSinks, scores.sinks.has_value() ? *scores.sinks : row_stats}};
  if (parts.has_value()) tensors.bind({kBufferForwardParts, *parts});
  scores.bind(tensors);
  const Bindings for_map = scores.for_map();
  for (const KernelLaunch& launch : plan->launches) {
    const KernelPlan& kernel = plan->kernels[launch.kernel];
    if (!has_keys && kernel.role == KernelRole::kMap) continue;
    launch.set(params);
    dispatch(kernel, launch.groups, kernel.role == KernelRole::kMap ? for_map : tensors, params);
  }
  return {std::move(out), std::move(row_stats)};
}

/// What a backward allocates for its kernels.
struct Gradients {
  Tensor dq, dk, dv;
  OptionalTensor dmask, dsinks;
};

/// On Metal. Throws MetalError.
Gradients run_backward(const BackwardCall& call, const Environment& environment) {
  const auto& [q, k, v] = call.operands;
  const Scoring& s = call.scoring;
  const Tensor &out = call.out, &dout = call.dout;
  const Tensor row_stats = dense_row_stats(call.row_stats, q);
  OptionalTensor dlse;
  if (call.dlse.has_value()) dlse = dense_rows(*call.dlse, q);
  const uint64_t seed = checked_seed(s);
  Problem problem = make_problem(call.operands, s, environment);
  problem.mask_grad = call.mask_grad && problem.has_mask;
  const auto plan_of = [&](const Problem& p) {
    return cached_plan_backward(p, layout_of(out), layout_of(dout));
  };
  const auto wanted = plan_of(problem);
  throw_refusal(*wanted);
  Gradients grads{empty_in_order_of(q, q.size(3)), empty_in_order_of(k, k.size(3)),
      empty_in_order_of(v, v.size(3)), std::nullopt, std::nullopt};
  if (s.sinks.has_value()) grads.dsinks = empty_floats(q, q.size(1));
  if (problem.mask_grad) grads.dmask = empty_like_mask(*s.attn_mask);
  if (q.numel() == 0 || k.numel() == 0) {  // no queries or no keys
    for (Tensor* x : {&grads.dq, &grads.dk, &grads.dv}) torch::stable::zero_(*x);
    if (grads.dmask.has_value()) torch::stable::zero_(*grads.dmask);
    if (q.numel() == 0 && grads.dsinks.has_value()) torch::stable::zero_(*grads.dsinks);
    if (q.numel() == 0 || !grads.dsinks.has_value()) return grads;
  }
  const Tensor delta = empty_rows(q);
  const BackwardScratch scratch =
      allocate_scratch("flash_attn_bwd", wanted, problem, plan_of, environment, q);
  const auto& [plan, ds, dkv_parts] = scratch;
  AttentionParams params = plan->params;
  set_seed(params, seed);
  params.dq = strides_of(grads.dq);
  params.dk = strides_of(grads.dk);
  params.dv = strides_of(grads.dv);
  params.has_dlse = dlse.has_value();
  log_metal("flash_attn_bwd", *plan, environment);
  const ScoreTensors scores(call.operands, s, *plan);
  // dlse has a stand-in that is never read, as in the forward.
  Bindings for_delta{{kBufferOut, out}, {kBufferDout, dout},
      {kBufferDlse, dlse.has_value() ? *dlse : row_stats}, {kBufferDelta, delta}};
  Bindings for_keys{{kBufferQuery, q}, {kBufferKey, k}, {kBufferValue, v},
      {kBufferRowStats, row_stats}, {kBufferDout, dout}, {kBufferDelta, delta}};
  Bindings for_key_sums;
  scratch.bind_key_gradients(grads.dk, grads.dv, for_keys, for_key_sums);
  Bindings for_queries{{kBufferQuery, q}, {kBufferKey, k}, {kBufferValue, v},
      {kBufferRowStats, row_stats}, {kBufferDout, dout}, {kBufferDelta, delta},
      {kBufferDq, grads.dq}};  // as far as a kernel has them
  Bindings for_mask{{kBufferQuery, q}, {kBufferKey, k}, {kBufferValue, v},
      {kBufferRowStats, row_stats}, {kBufferDout, dout}, {kBufferDelta, delta}};
  Bindings for_sinks;
  if (ds.has_value()) {
    for_keys.bind({kBufferDs, *ds});
    for_queries.bind({kBufferDs, *ds});
    for_mask.bind({kBufferDs, *ds});
  }
  OptionalTensor dmask_parts;
  if (grads.dmask.has_value()) {
    if (plan->dmask_part_elements > 0) dmask_parts = empty_floats(q, plan->dmask_part_elements);
    for_mask.bind({kBufferDmask, dmask_parts.has_value() ? *dmask_parts : *grads.dmask});
    for_mask.bind({kBufferDlse, dlse.has_value() ? *dlse : row_stats});
    for_mask.bind({kBufferSinks, scores.sinks.has_value() ? *scores.sinks : row_stats});
  }
  Bindings for_mask_sum;
  if (dmask_parts.has_value()) {
    for_mask_sum = {{kBufferDmaskParts, *dmask_parts}, {kBufferDmask, *grads.dmask}};
  }
  if (problem.has_mask) {  // where it adds, the key's side may sum up its gradient
    for_keys.bind({kBufferDmaskParts, dmask_parts.has_value() ? *dmask_parts : delta});
  }
  for (Bindings* tensors : {&for_keys, &for_queries, &for_mask}) scores.bind(*tensors);
  OptionalTensor sink_parts;
  if (scores.sinks.has_value()) {
    sink_parts = empty_floats(q, query_heads(problem) * blocks_of(q.size(2), 8));
    for_delta.bind({kBufferSinks, *scores.sinks});
    for_delta.bind({kBufferSinkParts, *sink_parts});
    for_sinks = {{kBufferSinkParts, *sink_parts}, {kBufferDsinks, *grads.dsinks}};
  }
  const bool reads_stats = problem.has_sinks || problem.has_mask || problem.has_key_ranges;
  if (reads_stats) for_delta.bind({kBufferRowStats, row_stats});
  scores.bind_ranges(for_delta);
  const Bindings for_map = scores.for_map();
  for (const KernelLaunch& launch : plan->launches) {
    launch.set(params);
    const Bindings* tensors[] = {&for_map, &for_delta, &for_keys, &for_key_sums, &for_queries,
        &for_mask, &for_mask_sum, &for_sinks};
    const KernelPlan& kernel = plan->kernels[launch.kernel];
    const bool for_rows = kernel.role == KernelRole::kRows;
    if (k.numel() == 0 && !for_rows && kernel.role != KernelRole::kSinkGradient) continue;
    dispatch(kernel, launch.groups, *tensors[static_cast<int>(kernel.role)], params);
  }
  return grads;
}

/// A gradient that nobody asks for.
Tensor no_gradient(const Tensor& like) { return empty_strided(like, {0}, {1}, dtype_code(like)); }

}  // namespace

void flash_attn_fwd(StableIValue* stack, uint64_t num_arguments, uint64_t num_results) {
  check_counts(num_arguments == kNumForwardArguments && num_results == 2);
  const auto call = Arguments(stack).take<ForwardCall>();
  const Environment environment;
  std::string reason;
  try {
    check_operands(call.operands);
    check_scalars(call.scoring, call.impl);
    check_additions(call.scoring, call.operands);
    reason = switched_off(call.impl, environment);
    if (!reason.empty()) throw MetalError(reason);
    const Problem problem = make_problem(call.operands, call.scoring, environment);
    if (const auto decoded =
            run_forward_as_decode(problem, call.operands, call.scoring, environment)) {
      put_results(stack, *decoded);
      return;
    }
    put_results(stack, run_forward(problem, call.operands, call.scoring, environment));
    forward_calls++;
    return;
  } catch (const MetalError& error) {
    allow_fallback("orchard::flash_attn_fwd", call.impl, environment, error);
    reason = error.what();
  } catch (const Mistake& mistake) {
    reason = mistake.what();
  }
  run_reference("flash_attn_fwd_reference", call, reason, stack, num_results);
}

void flash_attn_bwd(StableIValue* stack, uint64_t num_arguments, uint64_t num_results) {
  check_counts(num_arguments == kNumBackwardArguments && num_results == 5);
  const auto call = Arguments(stack).take<BackwardCall>();
  const Environment environment;
  std::string reason;
  try {
    check_operands(call.operands);
    check_scalars(call.scoring, call.impl);
    check_additions(call.scoring, call.operands);
    check_like_out(call.dout, call.operands);
    check_like_out(call.out, call.operands);
    reason = switched_off(call.impl, environment);
    if (!reason.empty()) throw MetalError(reason);
    Gradients x = run_backward(call, environment);
    const Tensor& query = call.operands.query;
    put_results<5>(stack, {std::move(x.dq), std::move(x.dk), std::move(x.dv),
                              x.dmask.has_value() ? *x.dmask : no_gradient(query),
                              x.dsinks.has_value() ? *x.dsinks : no_gradient(query)});
    backward_calls++;
    return;
  } catch (const MetalError& error) {
    allow_fallback("orchard::flash_attn_bwd", call.impl, environment, error);
    reason = error.what();
  } catch (const Mistake& mistake) {
    reason = mistake.what();
  }
  run_reference("flash_attn_bwd_reference", call, reason, stack, num_results);
}

void flash_attn_plan(StableIValue* stack, uint64_t num_arguments, uint64_t num_results) {
  check_counts(num_arguments == kNumForwardArguments && num_results == kNumPlanResults);
  const auto call = Arguments(stack).take<ForwardCall>();
  check_operands(call.operands);
  check_scalars(call.scoring, call.impl);
  Plan forward, backward;
  const Environment environment;
  forward.refusal = switched_off(call.impl, environment);
  if (forward.refusal.empty()) {
    const Problem problem = make_problem(call.operands, call.scoring, environment);
    const Layout out = layout_of_out(problem);
    if (call.scoring.key_span == kNoBackward && prefers_decode(problem)) {
      forward = plan_forward_as_decode(problem, out).plan;
    }
    const bool decodes = forward.refusal.empty() && !forward.kernels.empty();
    if (!decodes) {
      forward = plan_forward(problem, out);
      backward = plan_backward(problem, out, out);
    }
  }
  put_plan(stack, std::move(forward), std::move(backward));
}

void metal_calls(StableIValue* stack, uint64_t, uint64_t) {
  stack[0] = torch::stable::detail::from(forward_calls.load());
  stack[1] = torch::stable::detail::from(backward_calls.load());
  stack[2] = torch::stable::detail::from(metal_decodes());
  stack[3] = torch::stable::detail::from(metal_flex_forwards());
  stack[4] = torch::stable::detail::from(metal_flex_backwards());
}

}  // namespace orchard
