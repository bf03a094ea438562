// Attention backward, the key's side: where a group's query heads are divided (dkv_parts.h), what
// the parts have stored, added up in order. A simdgroup takes a key.
#pragma once

#include "loader.h"

template <typename T, int SIMDGROUPS>
[[kernel, max_total_threads_per_threadgroup(ORCHARD_THREADS(SIMDGROUPS))]] void
attention_backward_dkv_sums(const device float* dkv_parts
    [[buffer(kBufferDkvParts)]],         // (Hkv of the dispatch, parts, S, D + Dv)
    device T* dk [[buffer(kBufferDk)]],  // (B, Hkv, S, D)
    device T* dv [[buffer(kBufferDv)]],  // (B, Hkv, S, Dv)
    constant AttentionParams& params [[buffer(kBufferParams)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  const int key = group.y * SIMDGROUPS + simdgroup;
  if (key >= params.kv_len) {
    return;
  }
  const Head head = first_of_group(group.x + params.first_kv_head, params);
  const OutputRows<T> dk_rows = head.key_output(dk, params.dk, params.head_dim);
  const OutputRows<T> dv_rows = head.key_output(dv, params.dv, params.v_head_dim);
  const int width = params.head_dim + params.v_head_dim;
  const int part = params.kv_len * width;  // elements: those of all parts fit into int32
  const device float* of_key = dkv_parts + group.x * params.dkv_parts * part + key * width;
  for (int col = lane; col < width; col += ORCHARD_SIMD_WIDTH) {
    float sum = 0.0f;
    for (int i = 0; i < params.dkv_parts; i++) {
      sum += of_key[i * part + col];
    }
    if (col < params.head_dim) {
      dk_rows.data[key * dk_rows.row_stride + col] = T(sum);
    } else {
      dv_rows.data[key * dv_rows.row_stride + col - params.head_dim] = T(sum);
    }
  }
}
