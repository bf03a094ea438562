#include "cache.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <limits>

#include "call.h"
#include "checks.h"
#include "plan/plan.h"
#include "plan/plan_cache.h"

namespace orchard {

#define ORCHARD_COUNT(Type, name) +1
constexpr uint64_t kNumDecodeArguments = 0 ORCHARD_OPERANDS(ORCHARD_COUNT)
                                             ORCHARD_CACHE(ORCHARD_COUNT)
                                                 ORCHARD_DECODE_SCORING(ORCHARD_COUNT) +
                                         1;
constexpr uint64_t kNumAppendArguments =
    0 ORCHARD_FILLED(ORCHARD_COUNT) ORCHARD_ADDED(ORCHARD_COUNT) ORCHARD_PLACES(ORCHARD_COUNT) + 1;
#undef ORCHARD_COUNT

#define ORCHARD_TAKE(Type, name) arguments.take<Type>(),

// The parts of an initializer in braces are evaluated in order.
template <>
inline Cache Arguments::take<Cache>() {
  Arguments& arguments = *this;
  return {ORCHARD_CACHE(ORCHARD_TAKE)};
}

template <>
inline DecodeCall Arguments::take<DecodeCall>() {
  Arguments& arguments = *this;
  return {
      take<Operands>(), take<Cache>(), ORCHARD_DECODE_SCORING(ORCHARD_TAKE) take<std::string>()};
}

template <>
inline AppendCall Arguments::take<AppendCall>() {
  Arguments& arguments = *this;
  return {ORCHARD_FILLED(ORCHARD_TAKE) ORCHARD_ADDED(ORCHARD_TAKE) ORCHARD_PLACES(ORCHARD_TAKE)
          take<std::string>()};
}

#undef ORCHARD_TAKE
#define ORCHARD_PUT(Type, name) put(x.name);

template <>
inline void Stack::put(const Cache& x) {
  ORCHARD_CACHE(ORCHARD_PUT)
}

template <>
inline void Stack::put(const DecodeCall& x) {
  put(x.operands);
  put(x.cache);
  ORCHARD_DECODE_SCORING(ORCHARD_PUT)
  put(x.impl);
}

template <>
inline void Stack::put(const AppendCall& x) {
  ORCHARD_FILLED(ORCHARD_PUT)
  ORCHARD_ADDED(ORCHARD_PUT)
  ORCHARD_PLACES(ORCHARD_PUT)
  put(x.impl);
}

#undef ORCHARD_PUT
#define ORCHARD_SCHEMA(Type, name) +schema_type<Type>() + #name ", "

std::string decode_arguments() {
  return std::string() ORCHARD_OPERANDS(ORCHARD_SCHEMA) ORCHARD_CACHE(ORCHARD_SCHEMA)
             ORCHARD_DECODE_SCORING(ORCHARD_SCHEMA) +
         "str impl";
}

std::string append_arguments() {
  return std::string("Tensor(a!) key_cache, Tensor(b!) value_cache, ") ORCHARD_ADDED(ORCHARD_SCHEMA)
             ORCHARD_PLACES(ORCHARD_SCHEMA) +
         "str impl";
}

#undef ORCHARD_SCHEMA

namespace {

std::atomic<int64_t> decodes{0};

void check(bool condition, const char* what) {
  if (!condition) throw Mistake(std::string("the native library takes no such ") + what);
}

/// That numbers of the sequences are int32, or none.
void check_integers(const OptionalTensor& x, const Tensor& query, int64_t dims, const char* name) {
  if (!x.has_value()) return;
  check(device_type_of(*x) == device_type_of(query) && dtype_code(*x) == aoti_torch_dtype_int32() &&
            x->dim() == dims && x->size(0) == query.size(0),
      name);
}

/// Dense int32 numbers of the sequences, checked; or none.
OptionalTensor dense_integers(
    const OptionalTensor& x, const Tensor& query, int64_t dims, const char* name) {
  check_integers(x, query, dims, name);
  if (!x.has_value()) return std::nullopt;
  return torch::stable::contiguous(*x);
}

/// What the cache of a call says, with its tensors dense.
Cache checked_cache(const Cache& cache, const Operands& operands) {
  const auto& [q, k, v] = operands;
  for (const Tensor* x : {&q, &k, &v}) {
    check(device_type_of(*x) == device_type_of(q), "mixture of devices");
    check(x->dim() == 4, "number of dimensions");
    check(dtype_code(*x) == dtype_code(q), "mixture of dtypes");
  }
  check(k.size(3) == q.size(3), "mixture of head_dims");
  for (int d = 0; d < 3; d++) check(v.size(d) == k.size(d), "mixture of key and value shapes");
  check(q.size(3) > 0 && v.size(3) > 0, "head_dim");
  check(k.size(1) > 0 && q.size(1) % k.size(1) == 0, "number of heads");
  check(cache.added >= 0, "number of added keys");
  Cache dense{dense_integers(cache.cache_seqlens, q, 1, "cache_seqlens"),
      dense_integers(cache.cache_batch_idx, q, 1, "cache_batch_idx"),
      dense_integers(cache.cache_leftpad, q, 1, "cache_leftpad"),
      dense_integers(cache.block_table, q, 2, "block_table"), cache.added};
  const bool own_entries = !dense.block_table.has_value() && !dense.cache_batch_idx.has_value();
  check(own_entries ? k.size(0) == q.size(0) : k.size(0) > 0 || q.size(0) == 0, "batch size");
  check(!dense.block_table.has_value() || !dense.cache_batch_idx.has_value(), "cache_batch_idx");
  return dense;
}

void check_scoring(const DecodeCall& call) {
  const Tensor& q = call.operands.query;
  Scoring scoring{};
  scoring.alibi_slopes = call.alibi_slopes;
  scoring.sinks = call.sinks;
  scoring.scale = call.scale;
  scoring.window_left = call.window_left;
  scoring.window_right = call.window_right;
  scoring.softcap = call.softcap;
  check_scalars(scoring, call.impl);
  check_additions(scoring, {q, call.operands.key, call.operands.value});
}

CacheProblem make_cache_problem(
    const DecodeCall& call, const Cache& cache, const Environment& environment) {
  const auto& [q, k, v] = call.operands;
  CacheProblem problem;
  problem.paged = cache.block_table.has_value();
  problem.pages = problem.paged ? cache.block_table->size(1) : 0;
  problem.page_size = k.size(2);
  problem.entries = k.size(0);
  problem.added = cache.added;
  problem.cache.table_row = problem.pages;
  problem.cache.has_lengths = cache.cache_seqlens.has_value();
  problem.cache.has_starts = cache.cache_leftpad.has_value();
  problem.cache.has_entries = cache.cache_batch_idx.has_value();
  Problem& attention = problem.attention;
  attention.dtype = dtype_of(q);
  attention.q = layout_of(q);
  attention.k = layout_of(k);
  attention.v = layout_of(v);
  attention.k.sizes[2] = attention.v.sizes[2] = capacity_of(problem);
  if (call.alibi_slopes.has_value()) {
    const Tensor& slopes = *call.alibi_slopes;
    attention.has_alibi = true;
    attention.alibi_batch = slopes.dim() == 2 ? slopes.stride(0) : 0;
    attention.alibi_head = slopes.stride(slopes.dim() - 1);
  }
  attention.has_sinks = call.sinks.has_value();
  attention.per_head_float32 = is_float32(call.alibi_slopes) && is_float32(call.sinks);
  attention.scale = call.scale;
  attention.window_left = call.window_left;
  attention.window_right = call.window_right;
  attention.softcap = call.softcap;
  attention.gpu_cores = environment.gpu_cores();
  return problem;
}

/// out and lse on Metal. Throws MetalError.
std::array<Tensor, 2> run_decode(
    const DecodeCall& call, const Cache& cache, const Environment& environment) {
  const auto& [q, k, v] = call.operands;
  Tensor out = empty_in_order_of(q, v.size(3));
  Tensor lse = empty_rows(q);
  const CacheProblem problem = make_cache_problem(call, cache, environment);
  const auto decode = cached_plan_decode(problem, layout_of(out));
  throw_refusal(decode->plan);
  if (out.numel() == 0) return {out, lse};
  log_metal("flash_attn_decode", decode->plan, environment);
  DecodeParams params = decode->params;
  params.cache.added = static_cast<int32_t>(cache.added);
  Bindings tensors;
  if (cache.cache_seqlens.has_value()) tensors.bind({kBufferCacheLengths, *cache.cache_seqlens});
  if (cache.cache_leftpad.has_value()) tensors.bind({kBufferCacheStarts, *cache.cache_leftpad});
  if (cache.cache_batch_idx.has_value())
    tensors.bind({kBufferCacheEntries, *cache.cache_batch_idx});
  if (call.alibi_slopes.has_value()) tensors.bind({kBufferAlibiSlopes, *call.alibi_slopes});
  if (problem.paged) tensors.bind({kBufferBlockTable, *cache.block_table});
  run_decode_plan(*decode, params, call.operands, tensors, call.sinks, out, lse);
  return {out, lse};
}

/// A cache, and what goes into it, checked.
void check_filled(const Tensor& cache, const Tensor& added, int64_t entries) {
  check(device_type_of(cache) == device_type_of(added), "mixture of devices");
  check(cache.dim() == 4 && added.dim() == 4, "number of dimensions");
  check(dtype_code(cache) == dtype_code(added), "mixture of dtypes");
  check(cache.size(1) == added.size(1) && cache.size(3) == added.size(3), "shape of a cache");
  check(entries < 0 || entries == cache.size(0), "batch size");
  for (int d = 0; d < 4; d++) {  // two numbers in one place would be written to at once
    check(cache.size(d) <= 1 || cache.stride(d) != 0, "strides of a cache");
  }
}

void check_append(const AppendCall& call) {
  const Tensor& key = call.key;
  check(key.dim() == 4 && call.offset >= 0, "offset");
  check_integers(call.cache_seqlens, key, 1, "cache_seqlens");
  check_integers(call.cache_batch_idx, key, 1, "cache_batch_idx");
  check_integers(call.block_table, key, 2, "block_table");
  const OptionalTensor &entries = call.cache_batch_idx, &table = call.block_table;
  check(!table.has_value() || !entries.has_value(), "cache_batch_idx");
  const bool own = !table.has_value() && !entries.has_value();
  check_filled(call.key_cache, key, own ? key.size(0) : -1);
  check_filled(call.value_cache, call.value, call.key_cache.size(0));
  check(dtype_code(call.key) == dtype_code(call.value), "mixture of dtypes");
  check(call.key_cache.size(2) == call.value_cache.size(2), "shape of a cache");
  for (int d = 0; d < 3; d++) check(key.size(d) == call.value.size(d), "shape of value");
}

/// Of keys, and of values.
std::array<AppendProblem, 2> append_problems(const AppendCall& call) {
  std::array<AppendProblem, 2> problems;
  const bool paged = call.block_table.has_value();
  for (int i = 0; i < 2; i++) {
    const Tensor& added = i == 0 ? call.key : call.value;
    AppendProblem& problem = problems[i];
    problem.dtype = dtype_of(added);
    problem.added = layout_of(added);
    problem.cache = layout_of(i == 0 ? call.key_cache : call.value_cache);
    problem.pages = paged ? call.block_table->size(1) : 0;
    problem.offset = call.offset;
    problem.params.table_row = problem.pages;
    problem.params.paged = paged;
    problem.params.has_lengths = call.cache_seqlens.has_value();
    problem.params.has_entries = call.cache_batch_idx.has_value();
  }
  return problems;
}

/// On Metal. Throws MetalError.
void run_append(const AppendCall& call, const Environment& environment) {
  const Tensor& key = call.key;
  check_append(call);
  const OptionalTensor lengths = dense_integers(call.cache_seqlens, key, 1, "cache_seqlens");
  const OptionalTensor entries = dense_integers(call.cache_batch_idx, key, 1, "cache_batch_idx");
  const OptionalTensor table = dense_integers(call.block_table, key, 2, "block_table");
  const std::pair<const Tensor&, const Tensor&> filled[] = {
      {call.key_cache, key}, {call.value_cache, call.value}};
  const std::array<AppendProblem, 2> problems = append_problems(call);
  std::array<std::shared_ptr<const DecodePlan>, 2> plans;
  for (int i = 0; i < 2; i++) {
    plans[i] = cached_plan_append(problems[i]);
    throw_refusal(plans[i]->plan);
  }
  for (int i = 0; i < 2; i++) {  // only now: none is filled where one is refused
    const auto& [cache, added] = filled[i];
    if (added.numel() == 0 || cache.numel() == 0) continue;
    log_metal("flash_attn_append", plans[i]->plan, environment);
    const auto given = [&](const OptionalTensor& x) { return x.has_value() ? *x : key; };
    const Bindings tensors{{kBufferKey, added}, {kBufferOut, cache},
        {kBufferCacheLengths, given(lengths)}, {kBufferCacheEntries, given(entries)},
        {kBufferBlockTable, given(table)}};
    const KernelPlan& kernel = plans[i]->plan.kernels[0];
    DecodeParams params = plans[i]->params;
    params.cache.added = static_cast<int32_t>(call.offset);
    dispatch(kernel, kernel.groups, tensors, params);
  }
}

}  // namespace

void flash_attn_append(StableIValue* stack, uint64_t num_arguments, uint64_t num_results) {
  check_counts(num_arguments == kNumAppendArguments && num_results == 0);
  const auto call = Arguments(stack).take<AppendCall>();
  const Environment environment;
  std::string reason;
  try {
    check(call.impl == "auto" || call.impl == "metal" || call.impl == "reference", "impl");
    reason = switched_off(call.impl, environment);
    if (!reason.empty()) throw MetalError(reason);
    run_append(call, environment);
    return;
  } catch (const MetalError& error) {
    allow_fallback("orchard::flash_attn_append", call.impl, environment, error);
    reason = error.what();
  } catch (const Mistake& mistake) {
    reason = mistake.what();
  }
  run_reference("flash_attn_append_reference", call, reason, stack, num_results);
}

void flash_attn_decode(StableIValue* stack, uint64_t num_arguments, uint64_t num_results) {
  check_counts(num_arguments == kNumDecodeArguments && num_results == 2);
  const auto call = Arguments(stack).take<DecodeCall>();
  const Environment environment;
  std::string reason;
  try {
    const Cache cache = checked_cache(call.cache, call.operands);
    check_scoring(call);
    reason = switched_off(call.impl, environment);
    if (!reason.empty()) throw MetalError(reason);
    put_results(stack, run_decode(call, cache, environment));
    return;
  } catch (const MetalError& error) {
    allow_fallback("orchard::flash_attn_decode", call.impl, environment, error);
    reason = error.what();
  } catch (const Mistake& mistake) {
    reason = mistake.what();
  }
  run_reference("flash_attn_decode_reference", call, reason, stack, num_results);
}

void run_decode_plan(const DecodePlan& decode, const DecodeParams& params, const Operands& operands,
    Bindings tensors, const OptionalTensor& given_sinks, const Tensor& out, const Tensor& stats) {
  const auto& [q, k, v] = operands;
  const Tensor sums = empty_floats(q, decode.part_rows * params.part_stride);
  const Tensor part_sums = empty_floats(q, decode.part_rows * 2);
  const bool has_keys = k.numel() > 0;
  for (const Binding& binding : {Binding(kBufferQuery, q), Binding(kBufferKey, has_keys ? k : q),
           Binding(kBufferValue, has_keys ? v : q), Binding(kBufferParts, sums),
           Binding(kBufferPartSums, part_sums)}) {
    tensors.bind(binding);
  }
  // What a flag passes over at run time still wants its buffer: a stand-in that is never read.
  const std::pair<bool, unsigned> flags[] = {{params.cache.has_lengths != 0, kBufferCacheLengths},
      {params.cache.has_starts != 0, kBufferCacheStarts},
      {params.cache.has_entries != 0, kBufferCacheEntries}};
  for (const auto& [bound, index] : flags) {
    if (!bound) tensors.bind({index, q});
  }
  const Tensor sinks = given_sinks.has_value() ? torch::stable::contiguous(*given_sinks) : q;
  const Bindings for_rows{{kBufferParts, sums}, {kBufferPartSums, part_sums}, {kBufferSinks, sinks},
      {kBufferOut, out}, {kBufferRowStats, stats}};
  const auto& kernels = decode.plan.kernels;
  dispatch(kernels[0], kernels[0].groups, tensors, params);
  dispatch(kernels[1], kernels[1].groups, for_rows, params);
  decodes++;
}

void flash_attn_decode_plan(StableIValue* stack, uint64_t num_arguments, uint64_t num_results) {
  check_counts(num_arguments == kNumDecodeArguments && num_results == kNumPlanResults);
  const auto call = Arguments(stack).take<DecodeCall>();
  const Cache cache = checked_cache(call.cache, call.operands);
  check_scoring(call);
  const Environment environment;
  Plan plan;
  plan.refusal = switched_off(call.impl, environment);
  if (plan.refusal.empty()) {
    const CacheProblem problem = make_cache_problem(call, cache, environment);
    plan = plan_decode(problem, layout_of_out(problem.attention)).plan;
  }
  put_plan(stack, std::move(plan));
}

void flash_attn_append_plan(StableIValue* stack, uint64_t num_arguments, uint64_t num_results) {
  check_counts(num_arguments == kNumAppendArguments && num_results == kNumPlanResults);
  const auto call = Arguments(stack).take<AppendCall>();
  check_append(call);
  Plan plan;
  plan.refusal = switched_off(call.impl, Environment());
  if (plan.refusal.empty()) {
    for (const AppendProblem& problem : append_problems(call)) {
      Plan part = plan_append(problem).plan;
      if (plan.refusal.empty()) {
        plan.refusal = part.refusal;
        plan.detail = part.detail;
        plan.advice = part.advice;
      }
      for (KernelPlan& kernel : part.kernels) plan.kernels.push_back(std::move(kernel));
    }
  }
  put_plan(stack, std::move(plan));
}

int64_t metal_decodes() { return decodes.load(); }

}  // namespace orchard
