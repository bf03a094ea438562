#include <algorithm>

#include "dkv_parts.h"
#include "instantiate.h"
#include "params.h"
#include "plan.h"
#include "refusals.h"

namespace orchard {
namespace {

/// dk and dv, and dq from the dS that they store or with dS computed again: launches in turns,
/// where dS is divided. Where groups are, dk and dv are summed up behind them. Returns whether they
/// leave dS of the whole call.
bool add_products(const Problem& p, const TileRow& row, int bd, bool chunks, Plan& plan) {
  const DTypeNames dtype = names(p.dtype);
  const int keys = keys_of_group(row.dkv);
  const DsDivision ds = divide_ds(p, row, bd);
  const bool store_ds = ds.tile_elements > 0;
  plan.ds_elements = ds.tile_elements + ds.sum_elements;
  plan.params.dq_sums = ds.tile_elements;
  plan.params.ds_keys = static_cast<int32_t>(ds.rows.keys);
  plan.params.ds_row = static_cast<int32_t>(ds.rows.tiles);
  plan.params.ds_folded = ds.rows.folded;
  plan.params.ds_partial = store_ds && p.has_key_ranges && ds.rows.keys < p.k.sizes[2];
  const GroupDivision groups = divide_groups(p, ds, keys);
  const bool divided = groups.parts > 1;
  plan.dkv_part_elements = groups.elements;
  plan.params.dkv_parts = static_cast<int32_t>(groups.parts);
  plan.params.dkv_sums = static_cast<int32_t>(groups.at_once);
  const size_t dkv = plan.kernels.size(), dq = dkv + 1, sums = dq + 1;
  plan.kernels.push_back(
      make_kernel(p, dkv_family(row.dkv), dkv_choice(row.dkv, store_ds, dtype.operand),
          variant_of_keys(p, chunks, divided), kv_heads(p) * groups.parts, p.k.sizes[2]));
  if (store_ds) {
    plan.kernels.push_back(
        make_kernel(p, "attention_backward_dq_from_ds", dq_choice(row.dq_from_ds, "float"),
            variant_of_visibility(p, chunks), query_heads(p), p.q.sizes[2]));
  } else {
    plan.kernels.push_back(make_kernel(p, "attention_backward_dq", dq_choice(row.dq, dtype.operand),
        full_variant(p, chunks), query_heads(p), p.q.sizes[2]));
  }
  if (divided) plan.kernels.push_back(make_key_sums(p));
  const auto launch = [&](size_t kernel, int64_t x, int64_t y, int64_t head, int64_t key,
                          int64_t key_end) {
    plan.launches.push_back({kernel, {static_cast<uint64_t>(x), static_cast<uint64_t>(y)},
        static_cast<int32_t>(head), static_cast<int32_t>(key), static_cast<int32_t>(key_end)});
  };
  const auto rows_of = [&](size_t kernel) {
    return static_cast<int64_t>(plan.kernels[kernel].groups[1]);
  };
  const int64_t all = kv_heads(p) > 0 ? query_heads(p) : 0;
  const int64_t group = all > 0 ? all / kv_heads(p) : 0;
  for (int64_t head = 0; head < all; head += ds.heads) {
    const int64_t end = std::min(head + ds.heads, all), heads = end - head;
    for (int64_t key = 0; key < p.k.sizes[2]; key += ds.keys) {
      const int64_t key_end = std::min(key + ds.keys, p.k.sizes[2]);
      launch(dkv, heads * groups.parts / group, blocks_of(key_end - key, keys), head, key, key_end);
      launch(dq, heads, rows_of(dq), head, key, key_end);
    }
    if (divided && end % group == 0) {  // the last turn of the group's heads
      const int64_t at_once = std::max(heads / group, int64_t{1});
      launch(sums, at_once, rows_of(sums), end - at_once * group, 0, p.k.sizes[2]);
    }
  }
  if (plan.params.ds_partial == 0) {
    return store_ds && ds.heads == query_heads(p) && ds.keys == p.k.sizes[2];
  }
  // The span of keys is the caller's word: queries that see keys farther apart are for this one.
  plan.add(make_kernel(p, "attention_backward_dq", dq_choice(row.dq, dtype.operand),
      full_variant(p, chunks), query_heads(p), p.q.sizes[2]));
  return false;
}

// Threadgroups that the mask's gradient is to have, so that they fill a large GPU: where it has
// fewer tiles, several share one. What they store is no more than so many tiles, 2 MiB.
constexpr int64_t kMaskGradientGroups = 512;
constexpr int64_t kPartRows = 1024;  // the queries of a head that one of them takes at least

bool has_mask_gradient(const Problem& p) {
  return p.mask_grad && p.has_mask && p.mask_dtype != DType::kBool;
}

/// Whether the key's side sums up the mask's gradient: where all queries share the mask. Pairs of
/// simdgroups that cap scores do not have dS before the cap's derivative in one place.
bool has_key_sums(const Problem& p, const TileRow& row) {
  const bool capped_pairs = row.dkv.simdgroups == 2 && p.softcap > 0.0;
  return has_mask_gradient(p) && p.mask.sizes[3] == 1 && p.mask.sizes[4] > 1 && !capped_pairs;
}

/// The gradient of an additive mask, where it is asked for. `has_ds`: whether dS of the whole call
/// is stored before. What the two kernels sum up, and in which order, is the same.
void add_mask_gradient(const Problem& p, const TileRow& row, bool chunks, bool has_ds, Plan& plan) {
  if (!has_mask_gradient(p)) return;
  const std::array<int64_t, 5>& sizes = p.mask.sizes;
  const int64_t heads = sizes[0] * sizes[1] * sizes[2];  // of the mask
  const bool shared_rows = sizes[3] == 1, shared_keys = sizes[4] == 1;
  const int64_t threads = kSimdgroups * ORCHARD_SIMD_WIDTH;
  const auto groups = [](int64_t x, int64_t y) {
    return std::array<uint64_t, 2>{static_cast<uint64_t>(x), static_cast<uint64_t>(y)};
  };
  plan.params.dmask_parts = 1;
  plan.params.dmask_elements = heads * sizes[3] * sizes[4];
  if (plan.params.dmask_elements == 0 || query_heads(p) == 0) return;
  if (shared_keys) {
    add_mask_kernel(p, "attention_backward_dmask_rows",
        groups(heads, shared_rows ? 1 : blocks_of(sizes[3], threads)), plan);
    return;
  }
  if (plan.params.has_key_sums) {
    plan.dmask_part_elements = query_heads(p) * sizes[4];
    add_mask_kernel(
        p, "attention_backward_dmask_sum_keys", groups(heads, blocks_of(sizes[4], threads)), plan);
    return;
  }
  const DTypeNames dtype = names(p.dtype);
  const TileChoice tile = dq_choice(row.dmask, dtype.operand);
  const int64_t tiles = blocks_of(sizes[3], tile.rows) * blocks_of(sizes[4], row.dmask.bk);
  const int64_t terms =
      query_heads(p) / heads * (shared_rows ? blocks_of(p.q.sizes[2], kPartRows) : 1);
  const int64_t wanted = blocks_of(kMaskGradientGroups, heads * tiles);
  const int64_t parts = std::clamp<int64_t>(terms, 1, wanted);
  plan.params.dmask_parts = static_cast<int32_t>(parts);
  if (has_ds && p.softcap == 0.0) {
    const int64_t blocks =
        blocks_of(sizes[3], ORCHARD_MAP_BLOCK) * blocks_of(sizes[4], ORCHARD_MAP_BLOCK);
    add_mask_gradient_from_ds(p, parts > 1, groups(heads * parts, blocks), plan);
  } else {
    plan.add(make_kernel(p, "attention_backward_dmask", tile,
        variant_of_mask_gradient(p, chunks, parts > 1), heads * parts, tiles * tile.rows));
  }
  if (parts == 1) return;
  plan.dmask_part_elements = parts * plan.params.dmask_elements;
  add_mask_kernel(p, "attention_backward_dmask_sum",
      groups(blocks_of(plan.params.dmask_elements, threads), 1), plan);
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
  if (p.has_key_ranges) {
    const int64_t batches = p.ranges_batch != 0 ? p.q.sizes[0] : 1;
    const int64_t heads = p.ranges_head != 0 ? p.q.sizes[1] : 1;
    plan.hull_elements = batches * heads * blocks_of(p.q.sizes[2], 8) * ORCHARD_RANGE_HULL;
  }
  plan.params.has_key_sums = has_key_sums(p, row);
  advise_on_layout(chunks, plan);

  add_mask_map(p, plan);
  plan.add(make_kernel(p, "attention_backward_delta", delta_choice(), variant_of_sinks(p, chunks),
      query_heads(p), p.q.sizes[2]));
  const bool has_ds = add_products(p, row, bd, chunks, plan);
  add_mask_gradient(p, row, chunks, has_ds, plan);
  add_sink_gradient(p, plan);
  return plan;
}

}  // namespace orchard
