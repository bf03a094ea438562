// Attention backward, the query's side: dq, with dS computed again. backward_dq_from_ds.h is for
// heads whose key's side has stored dS, all of it or that of some queries.
//
//   for each block of BK keys:
//     P  = exp((score(Q K^T) - m) - log(l))       dP = drop(dO V^T)
//     dS = P (dP - delta) softcap'
//     dQ = dQ + dS K
//   dq = scale * dQ
//
// A threadgroup takes BQ = 8 R SIMDGROUPS query rows of one head, each simdgroup 8 R of them; K and
// V are staged once for all. T is the tensors' type, F that of the operands of S and dP. dS is
// multiplied as float, since over long sequences it leaves half's range.
#pragma once

#include "dropout.h"
#include "dscore.h"
#include "hidden_blocks.h"
#include "keys.h"
#include "loader.h"
#include "ranges.h"
#include "scores.h"
#include "softmax.h"
#include "staging.h"

template <typename T, typename F, int BD, int R, int BK, int SIMDGROUPS, typename V>
[[kernel, max_total_threads_per_threadgroup(ORCHARD_THREADS(SIMDGROUPS))]] void
attention_backward_dq(const device T* query [[buffer(kBufferQuery)]],  // (B, Hq, L, D)
    const device T* key [[buffer(kBufferKey)]],                        // (B, Hkv, S, D)
    const device T* value [[buffer(kBufferValue)]],                    // (B, Hkv, S, D)
    const device float2* row_stats [[buffer(kBufferRowStats)]],        // (B, Hq, L)
    const device T* dout [[buffer(kBufferDout)]],                      // (B, Hq, L, D)
    const device float* delta [[buffer(kBufferDelta)]],                // (B, Hq, L)
    device T* dq [[buffer(kBufferDq)]],                                // (B, Hq, L, D)
    constant AttentionParams& params [[buffer(kBufferParams)]],
    const device uchar* attn_mask [[buffer(kBufferMask)]],
    const device uint2* mask_map [[buffer(kBufferMaskMap)]],          // MaskMap
    const device float* alibi_slopes [[buffer(kBufferAlibiSlopes)]],  // (Hq) or (B, Hq)
    const device int* key_ranges [[buffer(kBufferKeyRanges)]],        // (B, Hq, L, 4)
    const device int* range_hulls
    [[buffer(kBufferRangeHulls)]],  // RangeHulls, read if params.ds_partial
    uint3 group [[threadgroup_position_in_grid]], uint3 grid [[threadgroups_per_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  const int kDepth = BD / 8;
  const int kValueBD = V::template Value<BD>::kWidth;
  const int kValueDepth = kValueBD / 8;
  const int kGroupRows = 8 * R * SIMDGROUPS;
  const bool kKeep = R * BD * (4 + 2 * sizeof(F)) / 16 <= ORCHARD_OPERAND_REGISTERS;  // dQ, Q, dO
  const bool kHides = V::Score::Mask::kAny || V::kListed;
  const bool kNatural = V::Score::kNatural;
  using Ranges = TileRanges<V::kListed, R, kGroupRows>;
  using Blocks = KeyValueBlocks<T, F, BK, BD, ORCHARD_THREADS(SIMDGROUPS), V::kVec, 2, kValueBD>;
  threadgroup uint4 storage[Blocks::kStorage];

  const Head head = query_head(group.x, params);
  const Window window = head.window;
  const int group_row0 = (grid.y - 1 - group.y) * kGroupRows;  // heaviest first, as in the forward
  const int row0 = group_row0 + simdgroup * 8 * R;
  const LanePosition at = lane_position(lane);
  if (V::kListed && params.ds_partial &&
      stores_dscore(head, range_hulls, group_row0, lane, params)) {
    return;  // attention_backward_dq_from_ds has computed these
  }
  Ranges ranges;
  ranges.start(head, key_ranges, group_row0, row0, at, lane, params);
  const Range blocks = ranges.key_blocks(
      window.key_blocks(group_row0, min(group_row0 + kGroupRows, params.q_len), BK), BK);
  const Starts unmasked = window.unmasked_keys(row0, 8 * R, BK);
  const DropoutDraws draws = dropout_draws(head.batch, head.head, at, params);

  LeftOperand<T, F, R, kDepth, V::kVec, kKeep> q;
  q.load(device_rows<V::kVec>(head.query_rows(query, params.q, params.head_dim), row0, at));
  LeftOperand<T, F, R, kValueDepth, V::kVec, kKeep> do_;
  do_.load(device_rows<V::kVec>(head.query_rows(dout, params.dout, params.v_head_dim), row0, at));
  Blocks kv;
  kv.start(head.key_rows(key, params.k, params.head_dim),
      head.key_rows(value, params.v, params.v_head_dim), blocks.begin * BK, storage, thread_index,
      at);
  RowStats<R, kNatural> stats;
  float row_delta[R];
  ORCHARD_UNROLL
  for (int r = 0; r < R; r++) {
    const int row = min(row0 + 8 * r + at.row, params.q_len - 1);
    const int64_t place = (int64_t)group.x * params.q_len + row;
    stats.set(r, row_stats[place]);
    row_delta[r] = delta[place];
  }
  const ScoreBuffers buffers = score_buffers(attn_mask, alibi_slopes);
  Scores<typename V::Score, R, BK / 8> scores;
  scores.start(head, buffers, ranges, row0, at, params);
  MaskMap<typename V::Score::Mask> visible;
  visible.start(head, mask_map, params);
  Tile<float, R, kDepth> dq_sum;
  zero(dq_sum);

  for (int block = blocks.begin; block < blocks.end; block++) {
    const int key0 = block * BK;
    const auto seen =
        ranges.template narrow<BK>(visible.template keys<kGroupRows>(group_row0, key0), key0);
    if (!seen.template any<BK>()) {
      const int steps = steps_past_keys<kGroupRows, BK>(block, visible, group_row0, params, lane);
      kv.advance(steps);
      block += steps - 1;
      continue;
    }
    scores.fetch(key0, seen.masked());
    kv.stage_keys(seen);
    Tile<float, R, BK / 8> p;
    zero(p);
    mma_ABt<F, kDepth, Chains<T>::kCount>(p, q, kv.k);
    Tile<float, R, BK / 8> derivatives;
    scores.apply(p, derivatives, key0, seen.masked(), params);
    map(p, stats);
    if (!unmasked.has(key0)) {
      mask(p, window, row0, key0, 0.0f, at);
      if (V::Score::kCapped && !kHides) {  // it is NaN where the score is
        mask(derivatives, window, row0, key0, 0.0f, at);
      }
    }
    ranges.hide(p, key0, 0.0f, at);
    Tile<float, R, BK / 8> dp;
    zero(dp);
    mma_ABt<F, kValueDepth, Chains<T>::kCount>(dp, do_, kv.v);
    if (V::kDropout) {
      drop(dp, row0, key0, draws);
      scale(dp, params.dropout_rescale);
    }
    Tile<float, R, BK / 8> ds;
    dscore<kHides>(ds, p, dp, row_delta);
    if (V::Score::kCapped) {
      times_derivative<kHides>(ds, derivatives);
    }
    mma_AB(dq_sum, ds, kv.k);
    kv.advance(1);
  }

  scale(dq_sum, score_derivative(params));
  store_rows<V::kVec>(head.query_output(dq, params.dq, params.head_dim), dq_sum, row0, at);
}
