// Attention backward, the gradient of the sinks: what backward_delta.h has summed up for 8 rows
// each, added up in a fixed order. A threadgroup of one simdgroup takes a query head.
#pragma once

#include "params.h"
#include "tile.h"

template <int SIMDGROUPS>
[[kernel, max_total_threads_per_threadgroup(ORCHARD_THREADS(SIMDGROUPS))]] void
attention_backward_dsinks(const device float* sink_parts
    [[buffer(kBufferSinkParts)]],                    // (B, Hq, L / 8 rounded up)
    device float* dsinks [[buffer(kBufferDsinks)]],  // (Hq)
    constant AttentionParams& params [[buffer(kBufferParams)]],
    uint3 group [[threadgroup_position_in_grid]], ushort lane [[thread_index_in_simdgroup]]) {
  const int parts = (params.q_len + 7) / 8;
  const int head = group.x;
  float sum = 0.0f;
  for (int batch = 0; batch < params.batch; batch++) {
    const device float* of_head = sink_parts + ((int64_t)batch * params.num_heads + head) * parts;
    for (int i = lane; i < parts; i += ORCHARD_SIMD_WIDTH) {
      sum += of_head[i];
    }
  }
  const float total = simd_sum(sum);
  if (lane == 0) {
    dsinks[head] = total;
  }
}
