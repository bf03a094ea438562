// What dS sums up to over the queries of a head, for each key: the gradient of an additive mask
// that all queries share, before heads and batch entries are summed (backward_dmask_sum_keys.h).
#pragma once

#include "loader.h"
#include "long_sum.h"
#include "params.h"
#include "tile.h"

/// The sum of one key for each row of a transposed tile (8 keys, queries): this lane's part of it.
/// SUMMED: whether the variant may have such a mask; params.has_key_sums says whether the call has.
template <bool SUMMED>
struct KeySums {
  LongSum sum;

  METAL_FUNC void start() { sum.start(); }

  /// Adds dS^T of a block of queries.
  template <int COLS>
  METAL_FUNC void take(thread const Tile<float, 1, COLS>& ds, constant AttentionParams& params) {
    if (!SUMMED || !params.has_key_sums) {
      return;
    }
    float2 of_block = ds.fragments[0][0];
    ORCHARD_UNROLL
    for (int c = 1; c < COLS; c++) {
      of_block += ds.fragments[0][c];
    }
    sum.take(of_block.x + of_block.y);
  }

  /// Stores the sums of keys from key0 on, of all queries of a head, to (B, Hq, S).
  METAL_FUNC void store(device float* sums, Head head, int key0, LanePosition at,
      constant AttentionParams& params) const {
    if (!SUMMED || !params.has_key_sums) {
      return;
    }
    const float total = row_sum(sum.total());
    const int key = key0 + at.row;
    if (at.col == 0 && key < params.kv_len) {
      sums[((int64_t)head.batch * params.num_heads + head.head) * params.kv_len + key] = total;
    }
  }
};
