// Attention backward, the key's side: where a group's query heads are divided (dkv_parts.h), the
// sums that its parts have stored, added up in order. A thread takes an element of dk or dv.
#pragma once

#include "loader.h"

template <typename T, int SIMDGROUPS>
[[kernel, max_total_threads_per_threadgroup(ORCHARD_THREADS(SIMDGROUPS))]] void
attention_backward_dkv_sums(const device float* dkv_parts
    [[buffer(kBufferDkvParts)]],         // (Hkv of the dispatch, dkv_sums, S, D + Dv)
    device T* dk [[buffer(kBufferDk)]],  // (B, Hkv, S, D)
    device T* dv [[buffer(kBufferDv)]],  // (B, Hkv, S, Dv)
    constant AttentionParams& params [[buffer(kBufferParams)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]]) {
  const int width = params.head_dim + params.v_head_dim;
  const int elements = params.kv_len * width;  // of a sum: those of all sums fit into int32
  const int element = group.y * ORCHARD_THREADS(SIMDGROUPS) + thread_index;
  if (element >= elements) {
    return;
  }
  const device float* part = dkv_parts + group.x * params.dkv_sums * elements + element;
  float sum = 0.0f;
  for (int i = 0; i < params.dkv_sums; i++) {
    sum += part[i * elements];
  }
  const int heads_of_group = params.num_heads / params.num_kv_heads;
  const Head head = query_head(params.first_head + group.x * heads_of_group, params);
  const int key = element / width;
  const int col = element % width;
  if (col < params.head_dim) {
    const OutputRows<T> rows = head.key_output(dk, params.dk, params.head_dim);
    rows.data[key * rows.row_stride + col] = T(sum);
  } else {
    const OutputRows<T> rows = head.key_output(dv, params.dv, params.v_head_dim);
    rows.data[key * rows.row_stride + col - params.head_dim] = T(sum);
  }
}
