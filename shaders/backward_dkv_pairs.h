// Attention backward, the key's side, for wide heads: as backward_dkv.h, by pairs of simdgroups. K,
// V, dK and dV of 8 keys fill more registers than a simdgroup has, so that
//
//   the first of a pair:   P^T = exp((score(K Q^T) - m) - log(l))
//                          dV = dV + drop(P^T) dO
//   the second:            dS^T = P^T softcap' (drop(V dO^T) - delta)
//                          dK = dK + dS^T Q
//
// with P^T softcap' handed over in threadgroup memory. Both do the same two products, of other
// matrices. A threadgroup takes 4 SIMDGROUPS keys. P and dS are multiplied as float.
#pragma once

#include "dkv_parts.h"
#include "dropout.h"
#include "dscore.h"
#include "hidden_blocks.h"
#include "key_sums.h"
#include "keys.h"
#include "loader.h"
#include "ranges.h"
#include "scores.h"
#include "softmax.h"
#include "staging.h"
#include "sum_parts.h"

/// A tile that one simdgroup of a pair leaves for the other: each lane's pairs of elements.
struct HandedOver {
  threadgroup float2* pairs;  // this lane's of the first fragment

  template <int COLS>
  METAL_FUNC void store(thread const Tile<float, 1, COLS>& x) const {
    ORCHARD_UNROLL
    for (int c = 0; c < COLS; c++) {
      pairs[c * ORCHARD_SIMD_WIDTH] = x.fragments[0][c];
    }
  }

  template <int COLS>
  METAL_FUNC void load(thread Tile<float, 1, COLS>& x) const {
    ORCHARD_UNROLL
    for (int c = 0; c < COLS; c++) {
      x.fragments[0][c] = pairs[c * ORCHARD_SIMD_WIDTH];
    }
  }
};

template <typename T, typename F, int BD, int BQ, bool STORE_DS, int SIMDGROUPS, typename V,
    typename G = WholeGroup>
[[kernel, max_total_threads_per_threadgroup(ORCHARD_THREADS(SIMDGROUPS))]] void
attention_backward_dkv_pairs(const device T* query [[buffer(kBufferQuery)]],  // (B, Hq, L, D)
    const device T* key [[buffer(kBufferKey)]],                               // (B, Hkv, S, D)
    const device T* value [[buffer(kBufferValue)]],                           // (B, Hkv, S, D)
    const device float2* row_stats [[buffer(kBufferRowStats)]],               // (B, Hq, L)
    const device T* dout [[buffer(kBufferDout)]],                             // (B, Hq, L, D)
    const device float* delta [[buffer(kBufferDelta)]],                       // (B, Hq, L)
    device typename G::template Sum<T>* dk [[buffer(kBufferDk)]],  // (B, Hkv, S, D), or parts
    device typename G::template Sum<T>* dv [[buffer(kBufferDv)]],
    device float* ds [[buffer(kBufferDs)]],  // DscoreTiles, bound and written if STORE_DS
    constant AttentionParams& params [[buffer(kBufferParams)]],
    const device uchar* attn_mask [[buffer(kBufferMask)]],
    const device uint2* mask_map [[buffer(kBufferMaskMap)]],          // MaskMap
    const device float* alibi_slopes [[buffer(kBufferAlibiSlopes)]],  // (Hq) or (B, Hq)
    const device int* key_ranges [[buffer(kBufferKeyRanges)]],        // (B, Hq, L, 4)
    const device int* range_hulls [[buffer(kBufferRangeHulls)]],      // RangeHulls
    device float* key_sums
    [[buffer(kBufferDmaskParts)]],  // (B, Hq, S), written if params.has_key_sums
    uint3 group [[threadgroup_position_in_grid]], uint thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  const int kGroupKeys = 8 * SIMDGROUPS / 2;
  const int kDepth = BD / 8;
  const int kValueBD = V::template Value<BD>::kWidth;
  const int kValueDepth = kValueBD / 8;
  const int kBlocks = BQ / 8;
  const bool kKeep = BD * (4 + sizeof(F)) / 16 <= ORCHARD_OPERAND_REGISTERS;  // dK or dV, K or V
  const int kHandedOver = SIMDGROUPS / 2 * kBlocks * ORCHARD_SIMD_WIDTH / 2;  // chunks of P^T
  const bool kHides = V::Score::Mask::kAny || V::kListed;
  const bool kNatural = V::Score::kNatural;
  using Blocks = QueryBlocks<T, F, BQ, BD, ORCHARD_THREADS(SIMDGROUPS), V::kVec, kValueBD>;
  using Staged = SharedBlock<F, StagedRow<F, BD>::kLength>;
  using Sum = typename G::template Sum<T>;
  threadgroup uint4 storage[Blocks::kStorage + kHandedOver];

  G taken;
  const int heads = taken.heads(params);
  Head head = query_head(params.first_head + group.x * heads, params);
  const Window window = head.window;
  const int group_key0 = params.key_begin + group.y * kGroupKeys;  // early keys are the heaviest
  const int pair = simdgroup / 2;
  const bool second = simdgroup % 2 == 1;
  const int key0 = group_key0 + pair * 8;
  const LanePosition at = lane_position(lane);
  const int group_key1 = min(group_key0 + kGroupKeys, params.kv_len);
  const Range blocks_of_window = window.query_blocks(group_key0, group_key1, BQ);
  const Starts unmasked = window.unmasked_rows(key0, 8, BQ);
  const Starts ds_rows = window.rows_of_tiles(key0);
  const int64_t ds_first = STORE_DS ? dscore_row(key0, params).first : 0;

  LeftOperand<T, F, 1, kDepth, V::kVec, kKeep> left;  // K or V
  const HeadRows<T> k_rows = head.key_rows(key, params.k, params.head_dim);
  const HeadRows<T> v_rows = head.key_rows(value, params.v, params.v_head_dim);
  left.load(device_rows<V::kVec>(second ? v_rows : k_rows, key0, at));
  HandedOver handed_over;
  handed_over.pairs = reinterpret_cast<threadgroup float2*>(storage + Blocks::kStorage) +
                      pair * kBlocks * ORCHARD_SIMD_WIDTH + lane;
  Tile<float, 1, kDepth> sum;  // dV or dK
  zero(sum);
  SumParts<T, BQ, V::kVec> parts;
  parts.start(taken.had_turns(params));

  const ScoreBuffers buffers = score_buffers(attn_mask, alibi_slopes);
  for (int member = 0; member < heads; member++, head.head++) {
    const int64_t stats0 = ((int64_t)head.batch * params.num_heads + head.head) * params.q_len;
    const DropoutDraws draws = dropout_draws(head.batch, head.head, at, params);
    const DscoreTiles ds_tiles = dscore_tiles(ds, group.x * heads + member, at, params);
    ColumnRanges<V::kListed, BQ> ranges;
    ranges.start(head, key_ranges, range_hulls, lane, params);
    const Range blocks = ranges.query_blocks(blocks_of_window, group_key0, group_key1);
    Blocks rows;
    rows.start(head.query_rows(query, params.q, params.head_dim),
        head.query_rows(dout, params.dout, params.v_head_dim), blocks.begin * BQ, storage,
        thread_index, at);
    ScoresTransposed<typename V::Score, kBlocks> scores;
    scores.start(head, buffers, key0, at, params);
    MaskMap<typename V::Score::Mask> visible;
    visible.start(head, mask_map, params);
    const Staged scored = second ? rows.dout.staged : rows.q.staged;  // S = K Q^T, dP = V dO^T
    const Staged summed = second ? rows.q.staged : rows.dout.staged;  // dV of dO, dK of Q
    KeySums<(V::Score::Mask::kAdds && !V::Score::kCapped)> sums_of_keys;
    sums_of_keys.start();
    for (int block = blocks.begin; block < blocks.end;) {
      const int last = parts.take(block, blocks.end);
      for (; block < last; block++) {
        const int row0 = block * BQ;
        if (!visible.passes(row0, group_key0) || !ranges.meets(row0, group_key0, group_key1)) {
          const int steps = steps_past_queries<BQ>(block, visible, group_key0, lane);
          rows.advance(steps);
          block += steps - 1;
          continue;
        }
        const bool masked = visible.template keys<BQ>(row0, group_key0).masked();
        ColumnStats<kBlocks, kNatural> stats;  // asked for early: they come from device memory
        ColumnValues<kBlocks> row_delta;
        if (second) {
          row_delta.load(delta + stats0, row0, params.q_len, at);
        } else {
          stats.load(row_stats + stats0, row0, params.q_len, at);
          scores.fetch(row0, masked);
        }
        rows.stage(RowSight<kHides>::of(row_stats + stats0, row0, params.q_len, lane));

        Tile<float, 1, kBlocks> x;  // (8 keys, BQ queries): S^T and P^T, or dP^T and dS^T
        zero(x);
        if (kValueDepth < kDepth && second) {
          mma_ABt<F, kValueDepth, Chains<T>::kCount>(x, left, scored);
        } else {
          mma_ABt<F, kDepth, Chains<T>::kCount>(x, left, scored);
        }
        if (!second) {
          Tile<float, 1, kBlocks> derivatives;
          scores.apply(x, derivatives, ranges, row0, masked, params);
          map(x, stats);
          if (!unmasked.has(row0)) {
            mask_transposed(x, window, key0, row0, at);
            if (V::Score::kCapped && !kHides) {  // it is NaN where the score is
              mask_transposed(derivatives, window, key0, row0, at);
            }
          }
          ranges.hide(x, key0, row0, at);
          if (V::Score::kCapped) {
            Tile<float, 1, kBlocks> p = x;
            times_derivative<kHides>(p, derivatives);
            handed_over.store(p);
          } else {
            handed_over.store(x);
          }
        }
        if (V::kDropout) {
          const uint kept = kept_transposed<kBlocks>(key0, row0, draws, lane);
          drop_transposed(x, kept, params.dropout_rescale);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);  // P^T is there
        if (second) {
          Tile<float, 1, kBlocks> p;
          handed_over.load(p);
          dscore_transposed<kHides>(x, p, row_delta);
          sums_of_keys.take(x, params);
          if (STORE_DS) {
            store_dscore(ds_tiles, ds_first, ds_rows, ranges, key0, row0, x, params);
          }
        }
        if (kValueDepth < kDepth && !second) {
          mma_AB_columns<kValueDepth>(sum, x, summed);
        } else {
          mma_AB(sum, x, summed);
        }
        rows.advance(1);
      }
      if (parts.ended()) {
        const OutputRows<Sum> rows_of_sum = second ? taken.dk_rows(dk, group.x, head, params)
                                                   : taken.dv_rows(dv, group.x, head, params);
        if (second) {
          scale(sum, score_derivative(params));
        }
        parts.put_aside(sum, rows_of_sum, key0, at);
        parts.start_next();
      }
    }
    if (second) {
      sums_of_keys.store(key_sums, head, key0, at, params);
    }
  }

  const OutputRows<Sum> rows_of_sum =
      second ? taken.dk_rows(dk, group.x, head, params) : taken.dv_rows(dv, group.x, head, params);
  if (second) {
    scale(sum, score_derivative(params));
  }
  parts.store(sum, rows_of_sum, key0, at);
}
