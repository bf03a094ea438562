// What dS sums up to over the queries of a head, for each key: the gradient of an additive mask
// that all queries share, before heads and batch entries are summed (backward_dmask_sum_keys.h).
#pragma once

#include "loader.h"
#include "params.h"
#include "tile.h"

/// The sum of one key for each row of a transposed tile (8 keys, queries): this lane's part of it.
/// SUMMED: whether the variant may have such a mask; params.has_key_sums says whether the call has.
template <bool SUMMED>
struct KeySums {
  float part;
  float earlier;  // parts, since one long sum of float32 would lose too much

  METAL_FUNC void start() {
    part = 0.0f;
    earlier = 0.0f;
  }

  /// Adds dS^T of the index-th block of queries.
  template <int COLS>
  METAL_FUNC void take(
      thread const Tile<float, 1, COLS>& ds, int index, constant AttentionParams& params) {
    if (!SUMMED || !params.has_key_sums) {
      return;
    }
    float2 sum = ds.fragments[0][0];
    ORCHARD_UNROLL
    for (int c = 1; c < COLS; c++) {
      sum += ds.fragments[0][c];
    }
    part += sum.x + sum.y;
    if (index % 64 == 0) {
      earlier += part;
      part = 0.0f;
    }
  }

  /// Stores the sums of keys from key0 on, of all queries of a head, to (B, Hq, S).
  METAL_FUNC void store(device float* sums, Head head, int key0, LanePosition at,
      constant AttentionParams& params) const {
    if (!SUMMED || !params.has_key_sums) {
      return;
    }
    const float sum = row_sum(earlier + part);
    const int key = key0 + at.row;
    if (at.col == 0 && key < params.kv_len) {
      sums[((int64_t)head.batch * params.num_heads + head.head) * params.kv_len + key] = sum;
    }
  }
};
