// Parts of a row of attention to a cache, which the simdgroups of a threadgroup have, become one.
#pragma once

#include "softmax.h"

/// The parts of one row, joined in the order of the simdgroups.
template <int SIMDGROUPS>
struct JoinedRow {
  float top;
  float total;
  float factors[SIMDGROUPS];

  /// `stats` are (origin, sum) of each part, `stride` apart.
  METAL_FUNC void find(const threadgroup float2* stats, int stride) {
    top = stats[0].x;
    ORCHARD_UNROLL
    for (int i = 1; i < SIMDGROUPS; i++) {
      top = max(top, stats[i * stride].x);
    }
    total = 0.0f;
    ORCHARD_UNROLL
    for (int i = 0; i < SIMDGROUPS; i++) {
      const float2 of_part = stats[i * stride];
      factors[i] = Exponential<true>::of(of_part.x - top);
      total += of_part.y * factors[i];
    }
  }

  /// Of a pair of columns, which the parts have `stride` apart.
  METAL_FUNC float2 sum(const threadgroup float2* values, int stride) const {
    float2 joined = float2(0.0f);
    ORCHARD_UNROLL
    for (int i = 0; i < SIMDGROUPS; i++) {
      joined = fma(float2(factors[i]), values[i * stride], joined);
    }
    return joined;
  }
};
