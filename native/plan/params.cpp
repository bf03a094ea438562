#include "params.h"

#include <algorithm>
#include <cmath>

#include "plan.h"

namespace orchard {
namespace {

int32_t clamp_window(int64_t window) {
  return static_cast<int32_t>(
      window < 0 ? ORCHARD_WINDOW_OPEN : std::min<int64_t>(window, ORCHARD_WINDOW_OPEN));
}

}  // namespace

int64_t query_heads(const Problem& p) { return p.q.sizes[0] * p.q.sizes[1]; }

int64_t kv_heads(const Problem& p) { return p.k.sizes[0] * p.k.sizes[1]; }

int64_t blocks_of(int64_t length, int64_t block) { return (length + block - 1) / block; }

TensorStrides to_strides(const std::array<int64_t, 4>& s) { return {s[0], s[1], s[2], s[3]}; }

void fill_params(const Problem& p, AttentionParams& params) {
  params.q = to_strides(p.q.strides);
  params.k = to_strides(p.k.strides);
  params.v = to_strides(p.v.strides);
  params.num_heads = static_cast<int32_t>(p.q.sizes[1]);
  params.num_kv_heads = static_cast<int32_t>(p.k.sizes[1]);
  params.q_len = static_cast<int32_t>(p.q.sizes[2]);
  params.kv_len = static_cast<int32_t>(p.k.sizes[2]);
  params.head_dim = static_cast<int32_t>(p.q.sizes[3]);
  params.diagonal = static_cast<int32_t>(p.diagonal);
  params.window_left = clamp_window(p.window_left);
  params.window_right = clamp_window(p.window_right);
  params.scale = static_cast<float>(p.scale);
  params.scale_log2 = static_cast<float>(p.scale * 1.4426950408889634);
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

void KernelLaunch::set(AttentionParams& params) const {
  params.first_kv_head = first_kv_head;
  params.key_begin = key_begin;
  params.key_end = key_end;
}

}  // namespace orchard
