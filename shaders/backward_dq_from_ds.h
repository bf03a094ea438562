// Attention backward, the query's side: dq from the dS that the key's side has stored.
//
//   dQ = the sum over earlier dispatches' keys, if there were any
//   for each block of BK keys of this dispatch:
//     dQ = dQ + dS K
//   dq = scale * dQ
//
// A threadgroup takes BQ = 8 R SIMDGROUPS query rows of one head, each simdgroup 8 R of them; K is
// staged once for all. Tiles of dS whose queries see none of their keys have not been written, and
// are not read. T is the tensors' type, F that of the operands.
#pragma once

#include "dscore.h"
#include "hidden_blocks.h"
#include "keys.h"
#include "loader.h"
#include "ranges.h"
#include "scores.h"

/// Rows [row0, ...) of dq / scale from the keys of earlier dispatches: (query head, row, BD) float.
template <int BD>
struct PartialDq {
  device float* data;
  int row0;
  int length;
  LanePosition at;

  METAL_FUNC device float2* of(int r, int c) const {
    const int64_t row = row0 + 8 * r + at.row;
    return reinterpret_cast<device float2*>(data + row * BD + 8 * c + at.col);
  }

  template <int ROWS>
  METAL_FUNC void load(thread Tile<float, ROWS, BD / 8>& x) const {
    ORCHARD_UNROLL
    for (int r = 0; r < ROWS; r++) {
      ORCHARD_UNROLL
      for (int c = 0; c < BD / 8; c++) {
        x.fragments[r][c] = row0 + 8 * r + at.row < length ? *of(r, c) : float2(0.0f);
      }
    }
  }

  template <int ROWS>
  METAL_FUNC void store(thread const Tile<float, ROWS, BD / 8>& x) const {
    ORCHARD_UNROLL
    for (int r = 0; r < ROWS; r++) {
      ORCHARD_UNROLL
      for (int c = 0; c < BD / 8; c++) {
        if (row0 + 8 * r + at.row < length) {
          *of(r, c) = x.fragments[r][c];
        }
      }
    }
  }
};

template <int BD>
METAL_FUNC PartialDq<BD> partial_dq(
    device float* ds, int head, int row0, LanePosition at, constant AttentionParams& params) {
  PartialDq<BD> partial;
  partial.data = ds + params.dq_sums + (int64_t)head * params.q_len * BD;
  partial.row0 = row0;
  partial.length = params.q_len;
  partial.at = at;
  return partial;
}

template <typename T, typename F, int BD, int R, int BK, int SIMDGROUPS, typename V>
[[kernel, max_total_threads_per_threadgroup(ORCHARD_THREADS(SIMDGROUPS))]] void
attention_backward_dq_from_ds(const device T* key [[buffer(kBufferKey)]],  // (B, Hkv, S, D)
    device float* ds [[buffer(kBufferDs)]],                                // DscoreTiles
    device T* dq [[buffer(kBufferDq)]],                                    // (B, Hq, L, D)
    constant AttentionParams& params [[buffer(kBufferParams)]],
    const device uint2* mask_map [[buffer(kBufferMaskMap)]],      // MaskMap
    const device int* key_ranges [[buffer(kBufferKeyRanges)]],    // (B, Hq, L, 4)
    const device int* range_hulls [[buffer(kBufferRangeHulls)]],  // RangeHulls
    uint3 group [[threadgroup_position_in_grid]], uint3 grid [[threadgroups_per_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  const int kDepth = BD / 8;
  const int kGroupRows = 8 * R * SIMDGROUPS;
  threadgroup uint4 storage[BK * StagedRow<F, BD>::kLength * sizeof(F) / 16];

  const Head head = query_head(group.x + params.first_head, params);
  const Window window = head.window;
  const int group_row0 = (grid.y - 1 - group.y) * kGroupRows;
  const int row0 = group_row0 + simdgroup * 8 * R;
  const LanePosition at = lane_position(lane);
  if (V::kListed && params.ds_partial &&
      !stores_dscore(head, range_hulls, group_row0, lane, params)) {
    return;  // attention_backward_dq computes these
  }
  TileRanges<V::kListed, R, kGroupRows> ranges;
  ranges.start(head, key_ranges, group_row0, row0, at, lane, params);
  RowHulls<V::kListed, R> hulls;
  hulls.start(head, range_hulls, row0, params);
  const Range blocks = of_dispatch(
      ranges.key_blocks(
          window.key_blocks(group_row0, min(group_row0 + kGroupRows, params.q_len), BK), BK),
      BK, params);
  const Starts unmasked = window.unmasked_keys(row0, 8 * R, BK);
  RightOperand<T, F, BK, BD, ORCHARD_THREADS(SIMDGROUPS), V::kVec, true> k;
  k.start(head.key_rows(key, params.k, params.head_dim), blocks.begin * BK,
      reinterpret_cast<threadgroup F*>(storage), thread_index, at);
  Tile<float, R, kDepth> dq_sum;
  zero(dq_sum);
  const PartialDq<BD> partial = partial_dq<BD>(ds, group.x, row0, at, params);
  if (params.key_begin > 0) {
    partial.load(dq_sum);
  }
  DscoreBlocks<BK> stored;
  stored.tiles = dscore_tiles(ds, group.x, at, params);
  stored.row0 = row0;
  MaskMap<typename V::Score::Mask> visible;
  visible.start(head, mask_map, params);

  for (int block = blocks.begin; block < blocks.end;) {
    const int last = stored.start_lap(block, blocks.end, params);
    for (; block < last; block++) {
      const int key0 = block * BK;
      const auto seen =
          ranges.template narrow<BK>(visible.template keys<kGroupRows>(group_row0, key0), key0);
      if (!seen.template any<BK>()) {
        const int steps = steps_past_keys<kGroupRows, BK>(block, visible, group_row0, params, lane);
        k.advance(steps);
        stored.advance(steps);
        block += steps - 1;
        continue;
      }
      const bool all_seen = unmasked.has(key0);
      const bool passes = visible.passes(row0, key0);
      Tile<float, R, BK / 8> ds_block;
      ORCHARD_UNROLL
      for (int r = 0; r < R; r++) {
        ORCHARD_UNROLL
        for (int c = 0; c < BK / 8; c++) {
          const bool in_window = all_seen || window.sees_any(row0 + 8 * r, 8, key0 + 8 * c, 8);
          const bool written = in_window && passes && hulls.meets(r, key0 + 8 * c);
          ds_block.fragments[r][c] = written ? stored.load(r, c) : float2(0.0f);
        }
      }
      k.fetch(seen);
      threadgroup_barrier(mem_flags::mem_threadgroup);  // the previous block has been read
      k.store(seen);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      mma_AB(dq_sum, ds_block, k);
      k.advance(1);
      stored.advance(1);
    }
  }

  if (params.key_end < params.kv_len) {
    partial.store(dq_sum);
    return;
  }
  scale(dq_sum, score_derivative(params));
  store_rows<V::kVec>(head.query_output(dq, params.dq, params.head_dim), dq_sum, row0, at);
}
