#include "params.h"

#include <algorithm>
#include <cmath>

#include "plan.h"

namespace orchard {
namespace {

/// Strides of a dense tensor of these sizes; 0 where it has size 1 and is the same for all.
MaskStrides dense(const std::array<int64_t, 5>& sizes, int64_t inner) {
  std::array<int64_t, 5> strides{};
  int64_t next = 1;
  for (int d = 4; d >= 0; d--) {
    strides[d] = sizes[d] == 1 ? 0 : next;
    next *= sizes[d];
  }
  return {strides[0], strides[1], strides[2], strides[3], strides[4], inner};
}

void fill_mask_params(const Problem& p, AttentionParams& params) {
  std::array<int64_t, 5> strides = p.mask.strides;
  for (int d = 0; d < 5; d++) strides[d] = p.mask.sizes[d] == 1 ? 0 : strides[d];
  params.mask = {strides[0], strides[1], strides[2], strides[3], strides[4], p.mask.inner};
  params.dmask = dense(p.mask.sizes, p.mask.inner);
  params.mask_map = dense(mask_map_sizes(p), p.mask.inner);
}

}  // namespace

int32_t clamp_window(int64_t window) {
  return static_cast<int32_t>(
      window < 0 ? ORCHARD_WINDOW_OPEN : std::min<int64_t>(window, ORCHARD_WINDOW_OPEN));
}

bool has_plain_logits(const Problem& p) {
  return !p.has_mask && !p.has_alibi && !p.has_sinks && p.softcap == 0.0;
}

int64_t widest_head_dim(const Problem& p) { return std::max(p.q.sizes[3], p.v.sizes[3]); }

int64_t query_heads(const Problem& p) { return p.q.sizes[0] * p.q.sizes[1]; }

int64_t kv_heads(const Problem& p) { return p.k.sizes[0] * p.k.sizes[1]; }

int64_t blocks_of(int64_t length, int64_t block) { return (length + block - 1) / block; }

TensorStrides to_strides(const std::array<int64_t, 4>& s) { return {s[0], s[1], s[2], s[3]}; }

bool map_has_ranges(const Problem& p) {
  return p.has_mask && p.has_key_ranges && p.mask.sizes[3] > 1 && p.mask.strides[3] != 0;
}

std::array<int64_t, 5> mask_map_sizes(const Problem& p) {
  std::array<int64_t, 5> sizes = p.mask.sizes;
  for (int d = 0; d < 5; d++) {
    if (p.mask.strides[d] == 0) sizes[d] = 1;
  }
  // Windows and key ranges hide different keys from the rows of the mask.
  const bool windowed = !p.has_key_ranges && (p.window_left >= 0 || p.window_right >= 0);
  if ((windowed && sizes[3] > 1) || map_has_ranges(p)) sizes[4] = p.k.sizes[2];
  if (map_has_ranges(p) && p.ranges_batch != 0) {
    sizes[0] = p.q.sizes[0] / std::max<int64_t>(p.mask.inner, 1);
    sizes[1] = p.mask.inner;
  }
  if (map_has_ranges(p) && p.ranges_head != 0) sizes[2] = p.q.sizes[1];
  for (int d : {3, 4}) {
    if (sizes[d] > 1) sizes[d] = blocks_of(sizes[d], ORCHARD_MAP_BLOCK);
  }
  return sizes;
}

void fill_params(const Problem& p, AttentionParams& params) {
  params.q = to_strides(p.q.strides);
  params.k = to_strides(p.k.strides);
  params.v = to_strides(p.v.strides);
  if (p.has_mask) fill_mask_params(p, params);
  params.alibi_batch = p.alibi_batch;
  params.alibi_head = p.alibi_head;
  params.batch = static_cast<int32_t>(p.q.sizes[0]);
  params.num_heads = static_cast<int32_t>(p.q.sizes[1]);
  params.num_kv_heads = static_cast<int32_t>(p.k.sizes[1]);
  params.q_len = static_cast<int32_t>(p.q.sizes[2]);
  params.kv_len = static_cast<int32_t>(p.k.sizes[2]);
  params.head_dim = static_cast<int32_t>(p.q.sizes[3]);
  params.v_head_dim = static_cast<int32_t>(p.v.sizes[3]);
  params.diagonal = static_cast<int32_t>(p.diagonal);
  params.window_left = clamp_window(p.window_left);
  params.window_right = clamp_window(p.window_right);
  if (p.has_key_ranges) {  // these windows count from the rows' own positions
    params.ranges = {p.ranges_batch, p.ranges_head, params.window_left, params.window_right};
    params.window_left = params.window_right = ORCHARD_WINDOW_OPEN;
  }
  params.scale = static_cast<float>(p.scale);
  params.scale_log2 = static_cast<float>(p.scale * 1.4426950408889634);
  params.softcap = static_cast<float>(p.softcap);
  params.has_sinks = p.has_sinks;
  params.dropout_threshold = dropout_threshold(p.dropout_p);
  params.dropout_rescale = 65536.0f / static_cast<float>(65536 - params.dropout_threshold);
}

bool allows_chunks(const Layout& x, int element_size) {
  const int64_t chunk = 16 / element_size;
  if (x.sizes[3] % chunk != 0 || x.strides[3] != 1 || x.offset % chunk != 0) return false;
  for (int d = 0; d < 3; d++) {
    if (x.sizes[d] > 1 && x.strides[d] % chunk != 0) return false;
  }
  return true;
}

void advise_on_layout(bool chunks, Plan& plan) {
  if (!chunks) {
    plan.advice =
        "rows that start at multiples of 16 bytes with adjacent columns (and a head_dim of whole "
        "16-byte chunks) load faster than the element-wise loads this call needs";
  }
}

uint32_t dropout_threshold(double dropout_p) {
  // nearbyint rounds halves to even, as Python's round does.
  return static_cast<uint32_t>(std::min(std::nearbyint(dropout_p * 65536.0), 65535.0));
}

std::array<int64_t, 4> strides_in_order_of(
    const std::array<int64_t, 4>& like, const std::array<int64_t, 4>& sizes) {
  std::array<int, 3> order{0, 1, 2};
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return like[a] > like[b]; });
  std::array<int64_t, 4> strides{0, 0, 0, 1};
  int64_t next = std::max<int64_t>(sizes[3], 1);
  for (int i = 2; i >= 0; i--) {
    strides[order[i]] = next;
    next *= std::max<int64_t>(sizes[order[i]], 1);
  }
  return strides;
}

void Plan::add(KernelPlan kernel) {
  launches.push_back({kernels.size(), kernel.groups, 0, 0, params.kv_len});
  kernels.push_back(std::move(kernel));
}

void KernelLaunch::set(AttentionParams& params) const {
  params.first_head = first_head;
  params.key_begin = key_begin;
  params.key_end = key_end;
}

}  // namespace orchard
