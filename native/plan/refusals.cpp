#include "refusals.h"

#include <algorithm>
#include <cmath>

#include "join.h"
#include "tiles.h"

namespace orchard {
namespace {

/// One reason. Its text holds none of the call's values: warnings and stats count by it. The values
/// go into `detail`, which messages add.
struct Reason {
  const char* text;
  bool (*holds)(const Problem&);
  std::string (*detail)(const Problem&);
  const char* advice;  // gives the same result
};

constexpr int64_t kMaxHeads = INT32_MAX / (kSimdgroups * ORCHARD_SIMD_WIDTH);
static_assert(kMaxHeadDim == 256 && ORCHARD_MAX_LENGTH == 1 << 28 && kMaxHeads == 16777215,
    "the reasons below name these bounds");

int64_t longest(const Problem& p) {
  return std::max({p.q.sizes[2], p.k.sizes[2], std::abs(p.diagonal)});
}

/// Whether kernels, which compute in float, have what softcap's tanh multiplies products by
/// (shaders/scores.h).
bool has_cap_factor(const Problem& p) {
  if (p.softcap == 0.0 || p.scale == 0.0) return true;
  const double of_scale = 2.0 * M_LOG2E * p.scale;  // tanh_unit() * scale
  const auto is_normal = [](double x) { return std::isnormal(static_cast<float>(x)); };
  return is_normal(of_scale) && is_normal(of_scale / p.softcap);
}

std::string no_detail(const Problem&) { return ""; }

// In the order in which they are reported.
const Reason kReasons[] = {
    {"the dtype is not float16, bfloat16 or float32",
        [](const Problem& p) { return p.dtype == DType::kOther || p.dtype == DType::kBool; },
        no_detail, "cast query, key and value to one of these"},
    {"head_dim is above 256", [](const Problem& p) { return widest_head_dim(p) > kMaxHeadDim; },
        [](const Problem& p) { return join("got ", widest_head_dim(p)); },
        "F.scaled_dot_product_attention takes such heads and may be faster than the reference "
        "kernels"},
    {"attn_mask is of another dtype than bool, float32 and query's",
        [](const Problem& p) {
          return p.has_mask && p.mask_dtype != DType::kBool && p.mask_dtype != DType::kFloat32 &&
                 p.mask_dtype != p.dtype;
        },
        no_detail, "cast it to one of these"},
    {"alibi_slopes or sinks are not float32",
        [](const Problem& p) { return (p.has_alibi || p.has_sinks) && !p.per_head_float32; },
        no_detail, "cast them to float32"},
    {"the scale divided by the softcap is no normal float32 number",
        [](const Problem& p) { return !has_cap_factor(p); },
        [](const Problem& p) { return join("got ", p.scale, " and ", p.softcap); },
        "multiply query by a part of the scale and pass the rest of it"},
    {"a length or the diagonal is above 2^28",
        [](const Problem& p) { return longest(p) > ORCHARD_MAX_LENGTH; },
        [](const Problem& p) { return join("got ", longest(p)); },
        "split the queries into several calls: each row of the result stands alone"},
    {"batch times heads is above 16777215",
        [](const Problem& p) { return query_heads(p) > kMaxHeads; },
        [](const Problem& p) { return join("got ", query_heads(p)); },
        "split the batch into several calls: each part of the result stands alone"},
};

}  // namespace

void refuse(const Problem& p, Plan& plan) {
  for (const Reason& reason : kReasons) {
    if (!reason.holds(p)) continue;
    plan.refusal = reason.text;
    plan.detail = reason.detail(p);
    plan.advice = reason.advice;
    return;
  }
}

}  // namespace orchard
