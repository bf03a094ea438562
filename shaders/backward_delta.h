// Attention backward, row by row: delta = rowsum(dO * O) - dlse, which both sides need, and what
// the rows of a fragment add to the gradient of the sinks, -rowsum(exp((sink - m) - log(l)) *
// delta).
//
// A threadgroup takes 8 SIMDGROUPS query rows of one head, each simdgroup 8 of them.
#pragma once

#include "loader.h"
#include "ranges.h"
#include "scores.h"
#include "softmax.h"

/// What a row adds to the gradient of its sink, where there are sinks. Exponentials are natural
/// then.
struct Sinks {
  static constant constexpr const bool kAny = true;

  METAL_FUNC static float gradient(float sink, float2 stats, float delta) {
    return -weight_of_sink(sink, stats) * delta;
  }
};

struct NoSinks {
  static constant constexpr const bool kAny = false;

  METAL_FUNC static float gradient(float, float2, float) { return 0.0f; }
};

template <typename T, int BD, int SIMDGROUPS, typename V, typename SINKS>
[[kernel, max_total_threads_per_threadgroup(ORCHARD_THREADS(SIMDGROUPS))]] void
attention_backward_delta(const device T* out [[buffer(kBufferOut)]],  // (B, Hq, L, D)
    const device T* dout [[buffer(kBufferDout)]],                     // (B, Hq, L, D)
    const device float* dlse [[buffer(kBufferDlse)]],  // (B, Hq, L), bound if params.has_dlse
    device float* delta [[buffer(kBufferDelta)]],      // (B, Hq, L)
    constant AttentionParams& params [[buffer(kBufferParams)]],
    const device float* sinks [[buffer(kBufferSinks)]],  // (Hq), bound if SINKS
    const device float2* row_stats
    [[buffer(kBufferRowStats)]],                            // (B, Hq, L), bound if SINKS or a mask
    device float* sink_parts [[buffer(kBufferSinkParts)]],  // (B, Hq, L / 8 rounded up), the same
    const device int* key_ranges [[buffer(kBufferKeyRanges)]],  // (B, Hq, L, 4)
    device int* range_hulls [[buffer(kBufferRangeHulls)]],      // RangeHulls, if V::kListed
    uint3 group [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  const Head head = query_head(group.x, params);
  const int row0 = (group.y * SIMDGROUPS + simdgroup) * 8;
  const LanePosition at = lane_position(lane);
  const Range every_row = {0, params.q_len};
  const DeviceRows<T, V::kVec> out_rows = device_rows<V::kVec>(
      head.rows(out, params.out, params.v_head_dim, head.head, every_row), row0, at);
  const DeviceRows<T, V::kVec> dout_rows = device_rows<V::kVec>(
      head.rows(dout, params.dout, params.v_head_dim, head.head, every_row), row0, at);
  float part = 0.0f;
  ORCHARD_UNROLL
  for (int d = 0; d < V::template Value<BD>::kWidth / 8; d++) {
    const float2 product =
        operand<float>(dout_rows.pair(0, d)) * operand<float>(out_rows.pair(0, d));
    part += product.x + product.y;
  }
  const float sum = row_sum(part);
  const int row = row0 + at.row;
  const bool counts = row < params.q_len && at.col == 0;
  float of_sink = 0.0f;
  if (counts) {
    const int64_t place = (int64_t)group.x * params.q_len + row;
    // Whatever a row without a key holds, its delta meets weights of zero and must not be NaN.
    const bool sees = V::Score::Mask::kAny || V::kListed ? !sees_no_key(row_stats[place])
                                                         : head.window.seeing_rows().has(row);
    const float product = sees ? sum : 0.0f;
    const float difference = params.has_dlse ? product - dlse[place] : product;
    delta[place] = sees ? difference : 0.0f;
    if (SINKS::kAny) {
      of_sink = SINKS::gradient(sinks[head.head], row_stats[place], difference);
    }
  }
  if (SINKS::kAny) {
    const float of_rows = simd_sum(of_sink);
    if (lane == 0 && row0 < params.q_len) {
      sink_parts[(int64_t)group.x * ((params.q_len + 7) / 8) + row0 / 8] = of_rows;
    }
  }
  if (V::kListed) {
    write_hull(range_hulls, range_rows(head, key_ranges, params), head, row0, at, lane, params);
  }
}
