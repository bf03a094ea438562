#include "attention.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <sstream>
#include <stdexcept>

#include "plan.h"
#include "plan_cache.h"
#include "shader_library.h"

namespace orchard {
namespace {

using torch::headeronly::ScalarType;

std::atomic<int64_t> forward_calls{0};
std::atomic<int64_t> backward_calls{0};

bool env_enabled(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' && std::strcmp(value, "0") != 0;
}

/// Raises with a message of its own: torch's macro would put this file's name before it.
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

std::string env_text(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

/// What a backward may take for dS. 0 is the low-memory mode.
int64_t scratch_bytes() {
  constexpr int64_t kDefaultMiB = 256;
  const std::string text = env_text("ORCHARD_BACKWARD_SCRATCH_MB");
  if (text.empty()) return kDefaultMiB << 20;
  char* end = nullptr;
  const long long mib = std::strtoll(text.c_str(), &end, 10);
  check(*end == '\0' && mib >= 0 && mib < (1LL << 40),
      "orchard::flash_attn: ORCHARD_BACKWARD_SCRATCH_MB must be a whole number of MiB, 0 or more; "
      "got '",
      text, "'");
  return static_cast<int64_t>(mib) << 20;
}

/// Tiles to take instead of the plan's; the forward's alone can be chosen.
std::string chosen_tiles() {
  const std::string text = env_text("ORCHARD_TILES");
  if (text.empty()) return text;  // a stream costs more than the rest of a call's checks
  std::istringstream entries(text);
  for (std::string entry; std::getline(entries, entry, ',');) {
    check(entry.rfind("attention_forward=", 0) == 0,
        "orchard::flash_attn: ORCHARD_TILES must be attention_forward=TILE; got '", text, "'");
  }
  return text;
}

bool debug_enabled() {
  return env_enabled("ORCHARD_DEBUG") || env_enabled("ORCHARD_DEBUG_FLASHATN");
}

/// The scoring arguments that both ops share.
struct Scoring {
  OptionalTensor attn_mask, alibi_slopes, sinks, dropout_seed;
  double dropout_p, scale;
  int64_t window_left, window_right, diagonal;
  double softcap;
};

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Float:
      return DType::kFloat32;
    default:
      return DType::kOther;
  }
}

Layout layout_of(const Tensor& x) {
  Layout layout;
  const auto sizes = x.sizes(), strides = x.strides();
  for (int d = 0; d < 4; d++) {
    layout.sizes[d] = sizes[d];
    layout.strides[d] = strides[d];
  }
  layout.offset = x.storage_offset();
  return layout;
}

/// A shape for a message: becomes text only when the message is written.
struct Shape {
  const Tensor& tensor;
};

Shape shape_of(const Tensor& x) { return {x}; }

std::ostream& operator<<(std::ostream& text, const Shape& shape) {
  const auto sizes = shape.tensor.sizes();
  text << "(";
  for (size_t d = 0; d < sizes.size(); d++) text << (d ? ", " : "") << sizes[d];
  return text << ")";
}

int32_t device_type_of(const Tensor& x) {
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  return device_type;
}

void check_device(const char* op, const char* name, const Tensor& x, const Tensor& query) {
  check(device_type_of(x) == device_type_of(query), op, ": ", name, " must be on query's device");
}

/// What the kernels rely on. The public function has checked more, with kinder messages; this
/// guards direct calls of the functional ops, whose mistakes would otherwise read out of bounds.
void check_operands(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
  for (const Tensor* x : {&q, &k, &v}) {
    check_device(op, "every operand", *x, q);
    check(x->dim() == 4, op,
        ": query, key and value must be (batch, heads, length, "
        "head_dim); got shape ",
        shape_of(*x));
    check(
        x->scalar_type() == q.scalar_type(), op, ": query, key and value must have the same dtype");
    check(x->size(0) == q.size(0), op, ": key and value must have query's batch size ", q.size(0),
        "; got ", x->size(0));
  }
  check(k.size(3) == q.size(3), op, ": key must have query's head_dim ", q.size(3), "; got ",
      k.size(3));
  check(v.size(1) == k.size(1) && v.size(2) == k.size(2), op,
      ": value must have key's heads and length; got shapes ", shape_of(v), " and ", shape_of(k));
  check(q.size(3) > 0 && v.size(3) > 0, op, ": head_dim must be at least 1");
  check(q.size(1) == k.size(1) || (k.size(1) > 0 && q.size(1) % k.size(1) == 0), op,
      ": the number of query heads must be a multiple of the number of key/value heads; got ",
      q.size(1), " and ", k.size(1));
}

/// The arguments that are no tensors.
void check_scalars(const char* op, const Scoring& s, const std::string& impl) {
  check(impl == "auto" || impl == "metal" || impl == "reference", op,
      ": impl must be one of auto, metal, reference; got '", impl, "'");
  check(s.window_left >= -1, op, ": window_left must be -1 (open) or at least 0; got ",
      s.window_left);
  check(s.window_right >= -1, op, ": window_right must be -1 (open) or at least 0; got ",
      s.window_right);
  constexpr int64_t kMaxDiagonal = int64_t{1} << 40;
  check(s.diagonal >= -kMaxDiagonal && s.diagonal <= kMaxDiagonal, op,
      ": diagonal must be within +-2^40; got ", s.diagonal);
  check(s.softcap >= 0.0 && s.softcap <= std::numeric_limits<double>::max(), op,
      ": softcap must be 0 (none) or positive and finite; got ", s.softcap);
}

/// The dropout seed; also checks the arguments that decide whether one is needed.
uint64_t checked_seed(const char* op, const Scoring& s) {
  check(s.dropout_p >= 0.0 && s.dropout_p < 1.0, op, ": dropout_p must be in [0, 1); got ",
      s.dropout_p);
  if (s.dropout_p == 0.0) return 0;
  check(
      s.dropout_seed.has_value(), op, ": dropout_p is ", s.dropout_p, " but dropout_seed is None");
  const Tensor& seed = *s.dropout_seed;
  check(seed.dim() == 0 && seed.is_cpu() && seed.scalar_type() == ScalarType::Long, op,
      ": dropout_seed must be a 0-dim int64 cpu tensor; got shape ", shape_of(seed));
  return static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
}

Problem make_problem(const Tensor& q, const Tensor& k, const Tensor& v, const Scoring& s) {
  Problem problem;
  problem.dtype = dtype_of(q);
  problem.q = layout_of(q);
  problem.k = layout_of(k);
  problem.v = layout_of(v);
  problem.has_mask = s.attn_mask.has_value();
  problem.has_alibi = s.alibi_slopes.has_value();
  problem.has_sinks = s.sinks.has_value();
  problem.dropout_p = s.dropout_p;
  problem.scale = s.scale;
  problem.window_left = s.window_left;
  problem.window_right = s.window_right;
  problem.diagonal = s.diagonal;
  problem.softcap = s.softcap;
  problem.scratch_bytes = scratch_bytes();
  problem.tiles = chosen_tiles();
  return problem;
}

/// None if it cannot be allocated.
OptionalTensor try_empty_strided(const Tensor& like, const std::vector<int64_t>& sizes,
    const std::vector<int64_t>& strides, int32_t dtype) {
  int32_t device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  const AOTITorchError code = aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()),
      sizes.data(), strides.data(), dtype, device_type_of(like), device_index, &handle);
  if (code != AOTI_TORCH_SUCCESS) return std::nullopt;
  return Tensor(handle);
}

Tensor empty_strided(const Tensor& like, const std::vector<int64_t>& sizes,
    const std::vector<int64_t>& strides, int32_t dtype) {
  OptionalTensor x = try_empty_strided(like, sizes, strides, dtype);
  check(x.has_value(), "orchard::flash_attn: cannot allocate a result: ", last_error());
  return *x;
}

/// Uninitialised, with like's dtype and stride order; the last size may differ.
Tensor empty_in_order_of(const Tensor& like, int64_t last) {
  Layout layout = layout_of(like);
  layout.sizes[3] = last;
  const auto strides = strides_in_order_of(layout.strides, layout.sizes);
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return empty_strided(
      like, {layout.sizes.begin(), layout.sizes.end()}, {strides.begin(), strides.end()}, dtype);
}

/// (B, H, L) float32
Tensor empty_rows(const Tensor& q) {
  const int64_t b = q.size(0), h = q.size(1), l = q.size(2);
  return empty_strided(q, {b, h, l}, {h * l, l, 1}, aoti_torch_dtype_float32());
}

/// (B, H, L, 2) float32
Tensor empty_row_stats(const Tensor& q) {
  const int64_t b = q.size(0), h = q.size(1), l = q.size(2);
  return empty_strided(q, {b, h, l, 2}, {h * l * 2, l * 2, 2, 1}, aoti_torch_dtype_float32());
}

void log_metal(const char* op, const Plan& plan) {
  if (!debug_enabled()) return;
  for (const KernelPlan& kernel : plan.kernels) {
    std::fprintf(
        stderr, "[orchard] %s: metal %s (%s)\n", op, kernel.name.c_str(), kernel.tile.c_str());
  }
}

/// Why a call does not even reach the plan; empty if it does.
std::string switched_off(const std::string& impl) {
  if (impl == "reference") return "impl=\"reference\" was asked for";
  if (env_enabled("ORCHARD_DISABLE_METAL")) return "ORCHARD_DISABLE_METAL is set";
  if (env_enabled("PYTORCH_MPS_FAST_MATH")) {
    return "PYTORCH_MPS_FAST_MATH is set: shaders then compile without infinities, which masks "
           "need";
  }
  return "";
}

/// Raises where the caller insisted on Metal.
void allow_fallback(const char* op, const std::string& impl, const std::string& reason) {
  const bool insisted = impl == "metal" || (impl == "auto" && env_enabled("ORCHARD_STRICT"));
  check(!insisted, "orchard::", op, ": the Metal kernels cannot run this call: ", reason);
}

/// Calls an op of this library by name with these arguments; its RESULTS tensors.
template <size_t RESULTS, typename... Args>
std::array<Tensor, RESULTS> call_op(const char* name, const Args&... args) {
  constexpr size_t kSlots = sizeof...(Args) > RESULTS ? sizeof...(Args) : RESULTS;
  std::array<StableIValue, kSlots> stack{torch::stable::detail::from(args)...};
  const AOTITorchError code = torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION);
  check(code == AOTI_TORCH_SUCCESS, last_error());
  std::array<Tensor, RESULTS> results;
  for (size_t i = 0; i < RESULTS; i++) results[i] = torch::stable::detail::to<Tensor>(stack[i]);
  return results;
}

void set_seed(AttentionParams& params, uint64_t seed) {
  params.dropout_seed[0] = static_cast<uint32_t>(seed);
  params.dropout_seed[1] = static_cast<uint32_t>(seed >> 32);
}

TensorStrides strides_of(const Tensor& x) {
  return {x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

/// The forward on Metal. Throws MetalError.
std::tuple<Tensor, Tensor> run_forward(const Tensor& q, const Tensor& k, const Tensor& v,
    const Scoring& s, uint64_t seed, const Problem& problem) {
  Tensor out = empty_in_order_of(q, v.size(3));
  Tensor row_stats = empty_row_stats(q);
  const auto plan = cached_plan_forward(problem, layout_of(out));
  if (!plan->refusal.empty()) throw MetalError(plan->refusal);
  if (out.numel() > 0 && k.size(2) == 0) {  // no keys: nothing to launch
    torch::stable::zero_(out);
    Tensor origin = torch::stable::select(row_stats, 3, 0);
    Tensor log_sum = torch::stable::select(row_stats, 3, 1);
    torch::stable::fill_(origin, std::numeric_limits<float>::lowest());
    torch::stable::fill_(log_sum, -std::numeric_limits<double>::infinity());
  } else if (out.numel() > 0) {
    AttentionParams params = plan->params;
    set_seed(params, seed);
    log_metal("flash_attn_fwd", *plan);
    dispatch(plan->kernels[0], plan->launches[0].groups,
        {{kBufferQuery, q}, {kBufferKey, k}, {kBufferValue, v}, {kBufferOut, out},
            {kBufferRowStats, row_stats}},
        params);
  }
  return {out, row_stats};
}

/// dq, dk, dv on Metal. Throws MetalError.
std::array<Tensor, 3> run_backward(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q,
    const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& row_stats, uint64_t seed,
    Problem problem) {
  auto plan = cached_plan_backward(problem, layout_of(out), layout_of(dout));
  if (!plan->refusal.empty()) throw MetalError(plan->refusal);
  Tensor dq = empty_in_order_of(q, q.size(3));
  Tensor dk = empty_in_order_of(k, k.size(3));
  Tensor dv = empty_in_order_of(v, v.size(3));
  if (q.numel() == 0 || k.numel() == 0) {  // no queries or no keys: nothing to launch
    for (Tensor* x : {&dq, &dk, &dv}) torch::stable::zero_(*x);
    return {dq, dk, dv};
  }
  const Tensor delta = empty_rows(q);
  OptionalTensor ds;
  if (plan->ds_elements > 0) {
    ds = try_empty_strided(q, {plan->ds_elements}, {1}, aoti_torch_dtype_float32());
    if (!ds.has_value()) {
      if (debug_enabled()) {
        std::fprintf(stderr, "[orchard] flash_attn_bwd: no memory for dS, computing it twice\n");
      }
      problem.scratch_bytes = 0;
      plan = cached_plan_backward(problem, layout_of(out), layout_of(dout));
    }
  }
  AttentionParams params = plan->params;
  set_seed(params, seed);
  params.dq = strides_of(dq);
  params.dk = strides_of(dk);
  params.dv = strides_of(dv);
  params.has_dlse = dlse.has_value();
  log_metal("flash_attn_bwd", *plan);
  const Tensor dlse_or_any = dlse.value_or(row_stats);  // what a call lacks is never read
  const Tensor ds_or_any = ds.value_or(delta);
  const Bindings for_delta{
      {kBufferOut, out}, {kBufferDout, dout}, {kBufferDlse, dlse_or_any}, {kBufferDelta, delta}};
  const Bindings for_keys{{kBufferQuery, q}, {kBufferKey, k}, {kBufferValue, v},
      {kBufferRowStats, row_stats}, {kBufferDout, dout}, {kBufferDelta, delta}, {kBufferDk, dk},
      {kBufferDv, dv}, {kBufferDs, ds_or_any}};
  const Bindings for_queries{{kBufferQuery, q}, {kBufferKey, k}, {kBufferValue, v},
      {kBufferRowStats, row_stats}, {kBufferDout, dout}, {kBufferDelta, delta}, {kBufferDq, dq},
      {kBufferDs, ds_or_any}};  // dq from dS takes those it declares
  const Bindings* tensors[] = {&for_delta, &for_keys, &for_queries};
  for (const KernelLaunch& launch : plan->launches) {
    launch.set(params);
    dispatch(plan->kernels[launch.kernel], launch.groups, *tensors[launch.kernel], params);
  }
  return {dq, dk, dv};
}

/// (B, H, L, 2) float32, dense.
Tensor dense_row_stats(const char* op, const Tensor& x, const Tensor& q) {
  check_device(op, "row_stats", x, q);
  check(x.dim() == 4 && x.size(0) == q.size(0) && x.size(1) == q.size(1) &&
            x.size(2) == q.size(2) && x.size(3) == 2 && x.scalar_type() == ScalarType::Float,
      op, ": row_stats must be float32 of shape (", q.size(0), ", ", q.size(1), ", ", q.size(2),
      ", 2); got shape ", shape_of(x));
  return torch::stable::contiguous(x);
}

/// dlse comes as dense (B, H, L) float32.
Tensor dense_rows(const char* op, const char* name, const Tensor& x, const Tensor& q) {
  check_device(op, name, x, q);
  check(x.dim() == 3 && x.size(0) == q.size(0) && x.size(1) == q.size(1) &&
            x.size(2) == q.size(2) && x.scalar_type() == ScalarType::Float,
      op, ": ", name, " must be float32 of shape (", q.size(0), ", ", q.size(1), ", ", q.size(2),
      "); got shape ", shape_of(x));
  const auto strides = x.strides();
  const bool dense =
      strides[2] == 1 && strides[1] == q.size(2) && strides[0] == q.size(1) * q.size(2);
  return dense ? x : torch::stable::contiguous(x);  // the usual case without the dispatcher
}

}  // namespace

std::tuple<Tensor, Tensor> flash_attn_fwd(Tensor query, Tensor key, Tensor value,
    OptionalTensor attn_mask, OptionalTensor alibi_slopes, OptionalTensor sinks,
    OptionalTensor dropout_seed, double dropout_p, double scale, int64_t window_left,
    int64_t window_right, int64_t diagonal, double softcap, std::string impl) {
  const char* op = "orchard::flash_attn_fwd";
  const Scoring scoring{attn_mask, alibi_slopes, sinks, dropout_seed, dropout_p, scale, window_left,
      window_right, diagonal, softcap};
  check_operands(op, query, key, value);
  check_scalars(op, scoring, impl);
  const uint64_t seed = checked_seed(op, scoring);
  std::string reason = switched_off(impl);
  if (reason.empty()) {
    try {
      auto result =
          run_forward(query, key, value, scoring, seed, make_problem(query, key, value, scoring));
      forward_calls++;
      return result;
    } catch (const MetalError& error) {
      reason = error.what();
    }
  }
  allow_fallback("flash_attn_fwd", impl, reason);
  auto [out, row_stats] = call_op<2>("orchard::flash_attn_fwd_reference", query, key, value,
      attn_mask, alibi_slopes, sinks, dropout_seed, dropout_p, scale, window_left, window_right,
      diagonal, softcap, impl, reason);
  return {out, row_stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> flash_attn_bwd(Tensor dout, OptionalTensor dlse,
    Tensor query, Tensor key, Tensor value, Tensor out, Tensor row_stats, OptionalTensor attn_mask,
    OptionalTensor alibi_slopes, OptionalTensor sinks, OptionalTensor dropout_seed,
    double dropout_p, double scale, int64_t window_left, int64_t window_right, int64_t diagonal,
    double softcap, bool mask_grad, std::string impl) {
  const char* op = "orchard::flash_attn_bwd";
  const Scoring scoring{attn_mask, alibi_slopes, sinks, dropout_seed, dropout_p, scale, window_left,
      window_right, diagonal, softcap};
  check_operands(op, query, key, value);
  check_scalars(op, scoring, impl);
  for (const Tensor* x : {&dout, &out}) {
    check_device(op, "every operand", *x, query);
    check(x->dim() == 4 && x->size(0) == query.size(0) && x->size(1) == query.size(1) &&
              x->size(2) == query.size(2) && x->size(3) == value.size(3) &&
              x->scalar_type() == query.scalar_type(),
        op, ": dout and out must have the forward output's shape and dtype; got shape ",
        shape_of(*x));
  }
  row_stats = dense_row_stats(op, row_stats, query);
  if (dlse.has_value()) dlse = dense_rows(op, "dlse", *dlse, query);
  const uint64_t seed = checked_seed(op, scoring);
  std::string reason = switched_off(impl);
  if (reason.empty()) {
    try {
      auto [dq, dk, dv] = run_backward(dout, dlse, query, key, value, out, row_stats, seed,
          make_problem(query, key, value, scoring));
      backward_calls++;
      int32_t dtype = 0;
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(query.get(), &dtype));
      // Nobody asks for these on Metal: masks and sinks are refused by the plan.
      return {
          dq, dk, dv, empty_strided(query, {0}, {1}, dtype), empty_strided(query, {0}, {1}, dtype)};
    } catch (const MetalError& error) {
      reason = error.what();
    }
  }
  allow_fallback("flash_attn_bwd", impl, reason);
  auto [dq, dk, dv, dmask, dsinks] = call_op<5>("orchard::flash_attn_bwd_reference", dout, dlse,
      query, key, value, out, row_stats, attn_mask, alibi_slopes, sinks, dropout_seed, dropout_p,
      scale, window_left, window_right, diagonal, softcap, mask_grad, impl, reason);
  return {dq, dk, dv, dmask, dsinks};
}

std::string flash_attn_plan(Tensor query, Tensor key, Tensor value, OptionalTensor attn_mask,
    OptionalTensor alibi_slopes, OptionalTensor sinks, OptionalTensor dropout_seed,
    double dropout_p, double scale, int64_t window_left, int64_t window_right, int64_t diagonal,
    double softcap, std::string impl) {
  const Scoring scoring{attn_mask, alibi_slopes, sinks, dropout_seed, dropout_p, scale, window_left,
      window_right, diagonal, softcap};
  check_operands("orchard::flash_attn_plan", query, key, value);
  check_scalars("orchard::flash_attn_plan", scoring, impl);
  Plan plan;
  plan.refusal = switched_off(impl);
  if (plan.refusal.empty()) {
    const Problem problem = make_problem(query, key, value, scoring);
    Layout out = problem.q;  // as the forward would allocate it; dout is taken to be like it
    out.sizes[3] = problem.v.sizes[3];
    out.strides = strides_in_order_of(problem.q.strides, out.sizes);
    out.offset = 0;
    plan = plan_forward(problem, out);
    Plan backward = plan_backward(problem, out, out);
    for (KernelLaunch launch : backward.launches) {
      launch.kernel += plan.kernels.size();
      plan.launches.push_back(launch);
    }
    for (KernelPlan& kernel : backward.kernels) plan.kernels.push_back(std::move(kernel));
    plan.ds_elements = backward.ds_elements;
    for (const KernelPlan& kernel : plan.kernels) {
      if (plan.refusal.empty()) plan.refusal = known_failure(kernel);
    }
  }
  return to_json(plan);
}

std::tuple<int64_t, int64_t> metal_calls() { return {forward_calls.load(), backward_calls.load()}; }

}  // namespace orchard
