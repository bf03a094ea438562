// out and row_stats of attention_forward, from what its parts leave (forward_parts.h): a simdgroup
// for each row, a lane for each part's (origin, sum), and for each column a sum over the parts in
// order. A sink is taken here, once.
#pragma once

#include "forward_parts.h"

template <typename T, int SIMDGROUPS, bool NATURAL, bool DROPOUT>
[[kernel, max_total_threads_per_threadgroup(ORCHARD_THREADS(SIMDGROUPS))]] void
attention_forward_merge(const device float* parts [[buffer(kBufferForwardParts)]],
    const device float* sinks [[buffer(kBufferSinks)]],    // (Hq)
    device T* out [[buffer(kBufferOut)]],                  // (B, Hq, L, Dv)
    device float2* row_stats [[buffer(kBufferRowStats)]],  // (B, Hq, L)
    constant AttentionParams& params [[buffer(kBufferParams)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  const int rows = rows_of_part(params);
  const int row = group.x * SIMDGROUPS + simdgroup;
  if (row >= rows) {
    return;
  }
  const int count = params.forward_parts;
  const Head head = query_head(row / params.q_len, params);
  const device float2* stats = reinterpret_cast<const device float2*>(parts) + row;
  float2 own = float2(numeric_limits<float>::lowest(), 0.0f);
  if (lane < count) {
    own = stats[lane * rows];
  }
  const bool has_sink = NATURAL && params.has_sinks;
  const float sink = has_sink ? sinks[head.head] : numeric_limits<float>::lowest();
  own.y = has_sink ? sum_beside(own.y, sink) : own.y;
  OnlineSoftmax<1, NATURAL> softmax;
  softmax.origin[0] = max(simd_max(own.x), sink);
  const float weight = Exponential<NATURAL>::of(own.x - softmax.origin[0]);
  FinishedRow finished;
  finished.template finish<DROPOUT>(softmax, 0, simd_sum(own.y * weight), has_sink, sink, params);
  if (lane == 0) {
    row_stats[row] = finished.stats;
  }

  const int width = params.v_head_dim;
  const device float* sums = parts + floats_before_sums(params) + row * width;
  device T* to = out + head.batch * params.out.batch + head.head * params.out.head +
                 row % params.q_len * params.out.row;
  for (int col0 = 0; col0 < width; col0 += ORCHARD_SIMD_WIDTH) {
    const int col = col0 + lane;
    float sum = 0.0f;
    for (int part = 0; part < count; part++) {
      const float of_part = col < width ? sums[part * rows * width + col] : 0.0f;
      sum = fma(simd_shuffle(weight, ushort(part)), of_part, sum);
    }
    if (col < width) {
      to[col] = T(sum * finished.factor);
    }
  }
}
