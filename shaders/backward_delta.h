// Attention backward, row by row: delta = rowsum(dO * O) - dlse, which both sides need.
//
// A threadgroup takes 8 SIMDGROUPS query rows of one head, each simdgroup 8 of them.
#pragma once

#include "loader.h"

template <typename T, int BD, int SIMDGROUPS, typename V>
[[kernel, max_total_threads_per_threadgroup(ORCHARD_THREADS(SIMDGROUPS))]] void
attention_backward_delta(const device T* out [[buffer(kBufferOut)]],  // (B, Hq, L, D)
    const device T* dout [[buffer(kBufferDout)]],                     // (B, Hq, L, D)
    const device float* dlse [[buffer(kBufferDlse)]],  // (B, Hq, L), bound if params.has_dlse
    device float* delta [[buffer(kBufferDelta)]],      // (B, Hq, L)
    constant AttentionParams& params [[buffer(kBufferParams)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  const Head head = query_head(group.x, params);
  const int row0 = (group.y * SIMDGROUPS + simdgroup) * 8;
  const LanePosition at = lane_position(lane);
  const DeviceRows<T, V::kVec> out_rows =
      device_rows<V::kVec>(head.query_rows(out, params.out), row0, at);
  const DeviceRows<T, V::kVec> dout_rows =
      device_rows<V::kVec>(head.query_rows(dout, params.dout), row0, at);
  float part = 0.0f;
  ORCHARD_UNROLL
  for (int d = 0; d < BD / 8; d++) {
    const float2 product =
        operand<float>(dout_rows.pair(0, d)) * operand<float>(out_rows.pair(0, d));
    part += product.x + product.y;
  }
  const float sum = row_sum(part);
  const int row = row0 + at.row;
  if (row < params.q_len && at.col == 0) {
    const int64_t stats = (int64_t)group.x * params.q_len + row;
    // The dlse of a row without a key may be anything.
    const bool subtracts = params.has_dlse && out_rows.rows.has(row - out_rows.rows.first);
    delta[stats] = subtracts ? sum - dlse[stats] : sum;
  }
}
