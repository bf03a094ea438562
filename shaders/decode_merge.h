// out and lse of attention_decode, from the sums of its parts. A threadgroup has a query of a head,
// and two columns for each lane of a simdgroup. Its simdgroups take a run of the parts each, in
// their order, and are joined in the order of the simdgroups. A sink is one more part, without a
// value.
//
// A part's numbers are far away and few. So they are read for several parts at once, where they
// would be waited for one after the other.
#pragma once

#include "decode_params.h"
#include "joined_row.h"
#include "softmax.h"

/// row_stats of a forward, from those of a row in natural units. What the origin loses on its way
/// to powers of two is among the logarithm.
METAL_FUNC float2 forward_stats(float top, float total, bool powers) {
  if (total == 0.0f) {
    return float2(numeric_limits<float>::lowest(), -INFINITY);
  }
  if (!powers) {
    return float2(top, log(total));
  }
  const float kPower = Exponential<true>::kPower;
  const float kPowerRest = 1.92596303e-8f;
  const float origin = top * kPower;
  return float2(origin, log2(total) + (fma(top, kPower, -origin) + top * kPowerRest));
}

/// Parts whose sums a lane reads before it adds up any of them.
#define ORCHARD_MERGED_AT_ONCE 16

/// What one simdgroup's run of parts comes to.
struct RunOfParts {
  float top;       // of the run's origins
  float total;     // this lane's part of the sum
  float2 columns;  // of this lane

  METAL_FUNC void start() {
    top = numeric_limits<float>::lowest();
    total = 0.0f;
    columns = float2(0.0f);
  }

  /// Adds up to ORCHARD_SIMD_WIDTH parts. `sums` are this lane's columns of each, if it has any;
  /// what was never written there is read and left out.
  METAL_FUNC void add(const device float2* stats, const device float* sums, bool has_columns,
      int count, int stride, int sum_stride, ushort lane) {
    float2 pairs[ORCHARD_MERGED_AT_ONCE];
    read(pairs, sums, has_columns ? count : 0, sum_stride);
    const float2 none = float2(numeric_limits<float>::lowest(), 0.0f);
    const float2 of_part = lane < count ? stats[lane * stride] : none;
    const float before = top;
    top = max(before, simd_max(of_part.x));
    const float rescale = Exponential<true>::of(before - top);
    total *= rescale;
    columns *= rescale;
    float own = -1.0f;  // the factor of this lane's part; -1 where its sums were never written
    if (of_part.y != 0.0f) {
      own = Exponential<true>::of(of_part.x - top);
      total += of_part.y * own;
    }
    for (int i = 0; i < count; i += ORCHARD_MERGED_AT_ONCE) {
      if (i > 0) {
        read(pairs, sums + (int64_t)i * sum_stride, has_columns ? count - i : 0, sum_stride);
      }
      ORCHARD_UNROLL
      for (int n = 0; n < ORCHARD_MERGED_AT_ONCE; n++) {
        const float factor = simd_shuffle(own, ushort(i + n));
        columns = factor != -1.0f ? fma(float2(factor), pairs[n], columns) : columns;
      }
    }
  }

  /// This lane's columns of the next `count` parts, or of the first ORCHARD_MERGED_AT_ONCE of them.
  METAL_FUNC static void read(
      thread float2* pairs, const device float* sums, int count, int sum_stride) {
    ORCHARD_UNROLL
    for (int n = 0; n < ORCHARD_MERGED_AT_ONCE; n++) {
      pairs[n] = float2(0.0f);
      if (n < count) {
        pairs[n] = *reinterpret_cast<const device float2*>(sums + (int64_t)n * sum_stride);
      }
    }
  }
};

// Grid: x rows, y blocks of 2 ORCHARD_SIMD_WIDTH columns.
template <typename T, int SIMDGROUPS>
[[kernel,
    max_total_threads_per_threadgroup(ORCHARD_THREADS(SIMDGROUPS))]] void
attention_decode_merge(const device float* sums
    [[buffer(kBufferParts)]],                                    // as attention_decode leaves them
    const device float2* part_sums [[buffer(kBufferPartSums)]],  // (origin, sum) of each
    const device float* sinks [[buffer(kBufferSinks)]],          // (Hq)
    device T* out [[buffer(kBufferOut)]],                        // (B, Hq, L, Dv)
    device float* lse [[buffer(kBufferRowStats)]],               // (B, Hq, L), or 2 of each row
    constant DecodeParams& params [[buffer(kBufferParams)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  using Exp = Exponential<true>;
  const int kWidth = ORCHARD_SIMD_WIDTH;
  threadgroup float2 run_stats[SIMDGROUPS];
  threadgroup float2 run_columns[SIMDGROUPS * ORCHARD_SIMD_WIDTH];

  constant AttentionParams& attention = params.attention;
  const int query = group.x % attention.q_len;
  const int head_index = group.x / attention.q_len;
  const int heads = attention.num_heads / attention.num_kv_heads;
  const int head = head_index % attention.num_heads;
  const int row = query * heads + head % heads;
  const int64_t block = (int64_t)(head_index / heads) * params.blocks + row / params.block_rows;
  const int64_t first = block * params.parts * params.block_rows + row % params.block_rows;

  const int stride = params.block_rows;
  const int longest = (params.parts + SIMDGROUPS - 1) / SIMDGROUPS;
  const int begin = min(simdgroup * longest, params.parts);
  const int count = min(longest, params.parts - begin);
  const int64_t first_of_run = first + begin * stride;
  const int col = 2 * (group.y * kWidth + lane);
  RunOfParts run;
  run.start();
  for (int part = 0; part < count; part += kWidth) {
    const int64_t at = first_of_run + part * stride;
    run.add(part_sums + at, sums + at * params.part_stride + col, col < params.part_stride,
        min(count - part, kWidth), stride, stride * params.part_stride, lane);
  }
  const float total_of_run = simd_sum(run.total);
  if (lane == 0) {
    run_stats[simdgroup] = float2(run.top, total_of_run);
  }
  run_columns[simdgroup * kWidth + lane] = run.columns;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup != 0) {
    return;
  }

  JoinedRow<SIMDGROUPS> joined;
  joined.find(run_stats, 1);
  float top = joined.top;
  float total = joined.total;
  float weight = 1.0f;  // of the parts, from the sink's origin
  if (attention.has_sinks) {
    const float sink = sinks[head];
    top = max(top, sink);
    weight = Exp::of(joined.top - top);
    total = sum_beside(total, sink) * weight + exponential_of_sink(sink, top);
  }
  const float factor = joined.total == 0.0f ? 0.0f : weight / total;

  device T* to = out + head_index / attention.num_heads * attention.out.batch +
                 head * attention.out.head + query * attention.out.row;
  const float2 sum = joined.sum(run_columns + lane, kWidth);
  if (col < attention.v_head_dim) {
    to[col] = T(sum.x * factor);
  }
  if (col + 1 < attention.v_head_dim) {
    to[col + 1] = T(sum.y * factor);
  }
  if (group.y == 0 && lane == 0) {
    const int64_t at = (int64_t)head_index * attention.q_len + query;
    if (params.row_stats) {
      reinterpret_cast<device float2*>(lse)[at] =
          forward_stats(top, total, params.powers_of_2 != 0);
    } else {
      lse[at] = total == 0.0f ? -INFINITY : top + log(total);
    }
  }
}
