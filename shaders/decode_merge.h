// out and lse of attention_decode, from the sums of its parts: a threadgroup for each query of each
// head. Its simdgroups take a run of the parts each, in their order, and their sums are added in
// the order of the simdgroups. A sink is one more part, without a value.
//
// A part's numbers are far away and few. What could wait for one after the other is read for
// several parts at once.
#pragma once

#include "decode_params.h"
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
#define ORCHARD_MERGED_AT_ONCE 8

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
  const int kAtOnce = ORCHARD_MERGED_AT_ONCE;
  const int kWidth = ORCHARD_SIMD_WIDTH;
  threadgroup float2 storage[SIMDGROUPS * ORCHARD_SIMD_WIDTH];

  constant AttentionParams& attention = params.attention;
  const int query = group.x % attention.q_len;
  const int head_index = group.x / attention.q_len;
  const int heads = attention.num_heads / attention.num_kv_heads;
  const int head = head_index % attention.num_heads;
  const int row = query * heads + head % heads;
  const int64_t block = (int64_t)(head_index / heads) * params.blocks + row / params.block_rows;
  const int64_t first = block * params.parts * params.block_rows + row % params.block_rows;

  float top = attention.has_sinks ? sinks[head] : numeric_limits<float>::lowest();
  for (int part = lane; part < params.parts; part += kWidth) {
    top = max(top, part_sums[first + part * params.block_rows].x);
  }
  top = simd_max(top);
  float total = 0.0f;
  for (int part = lane; part < params.parts; part += kWidth) {
    const float2 of_part = part_sums[first + part * params.block_rows];
    total += of_part.y != 0.0f ? of_part.y * Exp::of(of_part.x - top) : 0.0f;
  }
  total = simd_sum(total);
  total += attention.has_sinks ? Exp::of(sinks[head] - top) : 0.0f;
  const float factor = total == 0.0f ? 0.0f : 1.0f / total;

  device T* to = out + head_index / attention.num_heads * attention.out.batch +
                 head * attention.out.head + query * attention.out.row;
  const int run = (params.parts + SIMDGROUPS - 1) / SIMDGROUPS;
  const int begin = simdgroup * run;
  const int end = min(begin + run, params.parts);
  for (int col = 2 * lane; col < params.part_stride; col += 2 * kWidth) {
    float2 sum = float2(0.0f);
    for (int part0 = begin; part0 < end; part0 += kWidth) {
      // The factor of a part in each lane; -1 where its sums were never written.
      float own = -1.0f;
      if (part0 + lane < end) {
        const float2 of_part = part_sums[first + (part0 + lane) * params.block_rows];
        own = of_part.y != 0.0f ? Exp::of(of_part.x - top) : -1.0f;
      }
      const int behind = min(kWidth, end - part0);
      for (int i = 0; i < behind; i += kAtOnce) {
        float factors[kAtOnce];
        float2 read[kAtOnce];
        ORCHARD_UNROLL
        for (int n = 0; n < kAtOnce; n++) {
          factors[n] = simd_shuffle(own, ushort(i + n));
          read[n] = float2(0.0f);
          if (factors[n] != -1.0f) {
            const int64_t at = first + (part0 + i + n) * params.block_rows;
            read[n] = *reinterpret_cast<const device float2*>(sums + at * params.part_stride + col);
          }
        }
        ORCHARD_UNROLL
        for (int n = 0; n < kAtOnce; n++) {
          sum = fma(float2(factors[n]), read[n], sum);
        }
      }
    }
    storage[simdgroup * kWidth + lane] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simdgroup == 0) {
      for (int other = 1; other < SIMDGROUPS; other++) {
        sum += storage[other * kWidth + lane];
      }
      for (int i = 0; i < 2; i++) {
        if (col + i < attention.v_head_dim) {
          to[col + i] = T(sum[i] * factor);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (simdgroup == 0 && lane == 0) {
    const int64_t at = (int64_t)head_index * attention.q_len + query;
    if (params.row_stats) {
      reinterpret_cast<device float2*>(lse)[at] =
          forward_stats(top, total, params.powers_of_2 != 0);
    } else {
      lse[at] = total == 0.0f ? -INFINITY : top + log(total);
    }
  }
}
