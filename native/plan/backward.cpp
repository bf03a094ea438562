#include <algorithm>

#include "dscore_scratch.h"
#include "instantiate.h"
#include "params.h"
#include "plan.h"
#include "refusals.h"

namespace orchard {
namespace {

/// dk and dv, and dq from the dS that they store or with dS computed again: launches in turns,
/// where dS is divided.
void add_products(const Problem& p, const TileRow& row, int bd, bool chunks, Plan& plan) {
  const DTypeNames dtype = names(p.dtype);
  const int keys = keys_of_group(row.dkv);
  const DsDivision ds = divide_ds(p, bd, keys);
  const bool store_ds = ds.tile_elements > 0;
  plan.ds_elements = ds.tile_elements + ds.sum_elements;
  plan.params.dq_sums = ds.tile_elements;
  const size_t dkv = plan.kernels.size(), dq = dkv + 1;
  plan.kernels.push_back(
      make_kernel(p, dkv_family(row.dkv), dkv_choice(row.dkv, store_ds, dtype.operand),
          full_variant(p, chunks), kv_heads(p), p.k.sizes[2]));
  if (store_ds) {
    plan.kernels.push_back(
        make_kernel(p, "attention_backward_dq_from_ds", dq_choice(row.dq_from_ds, "float"),
            variant_of_visibility(p, chunks), query_heads(p), p.q.sizes[2]));
  } else {
    plan.kernels.push_back(make_kernel(p, "attention_backward_dq", dq_choice(row.dq, dtype.operand),
        full_variant(p, chunks), query_heads(p), p.q.sizes[2]));
  }
  const uint64_t query_heads_of_one =
      kv_heads(p) > 0 ? static_cast<uint64_t>(query_heads(p) / kv_heads(p)) : 0;
  for (int64_t head = 0; head < kv_heads(p); head += ds.kv_heads) {
    for (int64_t key = 0; key < p.k.sizes[2]; key += ds.keys) {
      const uint64_t heads = static_cast<uint64_t>(std::min(ds.kv_heads, kv_heads(p) - head));
      const int64_t key_end = std::min(key + ds.keys, p.k.sizes[2]);
      KernelLaunch launch{dkv, {heads, static_cast<uint64_t>(blocks_of(key_end - key, keys))},
          static_cast<int32_t>(head), static_cast<int32_t>(key), static_cast<int32_t>(key_end)};
      plan.launches.push_back(launch);
      launch.kernel = dq;
      launch.groups = {heads * query_heads_of_one, plan.kernels[dq].groups[1]};
      plan.launches.push_back(launch);
    }
  }
}

}  // namespace

Plan plan_backward(const Problem& p, const Layout& out, const Layout& dout) {
  Plan plan;
  refuse(p, plan);
  if (!plan.refusal.empty()) return plan;
  const DTypeNames dtype = names(p.dtype);
  const int bd = padded_head_dim(widest_head_dim(p));
  const TileRow& row = tiles(bd, dtype);
  bool chunks = true;
  for (const Layout* x : {&p.q, &p.k, &p.v, &out, &dout}) chunks &= allows_chunks(*x, dtype.size);
  fill_params(p, plan.params);
  plan.params.out = to_strides(out.strides);
  plan.params.dout = to_strides(dout.strides);
  advise_on_layout(chunks, plan);

  add_mask_map(p, plan);
  plan.add(make_kernel(p, "attention_backward_delta", delta_choice(), variant_of_sinks(p, chunks),
      query_heads(p), p.q.sizes[2]));
  add_products(p, row, bd, chunks, plan);
  add_sink_gradient(p, plan);
  return plan;
}

}  // namespace orchard
