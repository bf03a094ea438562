// out and lse of attention_decode, from the sums of its parts: a simdgroup for each query of each
// head, which takes the parts in their order. A sink is one more part, without a value.
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

// VD is the padded head dim of values. Grid: x rows.
template <typename T, int VD, int SIMDGROUPS>
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
  const int kColumns = VD / ORCHARD_SIMD_WIDTH;
  constant AttentionParams& attention = params.attention;
  const int index = group.x * SIMDGROUPS + simdgroup;
  const int query = index % attention.q_len;
  const int head_index = index / attention.q_len;
  if (head_index >= attention.batch * attention.num_heads) {
    return;
  }
  const int heads = attention.num_heads / attention.num_kv_heads;
  const int head = head_index % attention.num_heads;
  const int row = query * heads + head % heads;
  const int64_t block = (int64_t)(head_index / heads) * params.blocks + row / params.block_rows;
  const int64_t first = block * params.parts * params.block_rows + row % params.block_rows;

  float top = attention.has_sinks ? sinks[head] : numeric_limits<float>::lowest();
  for (int part = lane; part < params.parts; part += ORCHARD_SIMD_WIDTH) {
    top = max(top, part_sums[first + part * params.block_rows].x);
  }
  top = simd_max(top);
  // A lane holds what the row's sums are to be multiplied with for one part of 32, so that these
  // numbers are read once, and all columns of a part are read together.
  float total = 0.0f;
  float columns[kColumns];
  ORCHARD_UNROLL
  for (int c = 0; c < kColumns; c++) {
    columns[c] = 0.0f;
  }
  for (int part0 = 0; part0 < params.parts; part0 += ORCHARD_SIMD_WIDTH) {
    const int count = min(params.parts - part0, ORCHARD_SIMD_WIDTH);
    float2 own = float2(top, 0.0f);
    if (lane < count) {
      own = part_sums[first + (part0 + lane) * params.block_rows];
    }
    const float weight = Exp::of(own.x - top);
    for (int i = 0; i < count; i++) {
      const float of_part = simd_shuffle(own.y, ushort(i));
      if (of_part == 0.0f) {  // the sums of this part were never written
        continue;
      }
      const float factor = simd_shuffle(weight, ushort(i));
      total += of_part * factor;
      const device float* from =
          sums + (first + (part0 + i) * params.block_rows) * params.part_stride;
      ORCHARD_UNROLL
      for (int c = 0; c < kColumns; c++) {
        const int col = c * ORCHARD_SIMD_WIDTH + lane;
        if (col < attention.v_head_dim) {
          columns[c] = fma(factor, from[col], columns[c]);
        }
      }
    }
  }
  total += attention.has_sinks ? Exp::of(sinks[head] - top) : 0.0f;
  const float factor = total == 0.0f ? 0.0f : 1.0f / total;

  device T* to = out + head_index / attention.num_heads * attention.out.batch +
                 head * attention.out.head + query * attention.out.row;
  ORCHARD_UNROLL
  for (int c = 0; c < kColumns; c++) {
    const int col = c * ORCHARD_SIMD_WIDTH + lane;
    if (col < attention.v_head_dim) {
      to[col] = T(columns[c] * factor);
    }
  }
  if (lane == 0) {
    const int64_t at = (int64_t)head_index * attention.q_len + query;
    if (params.row_stats) {
      reinterpret_cast<device float2*>(lse)[at] =
          forward_stats(top, total, params.powers_of_2 != 0);
    } else {
      lse[at] = total == 0.0f ? -INFINITY : top + log(total);
    }
  }
}
