// Attention backward, the key's side: dk and dv, and dS for the query's side. Everything is
// transposed, so that P^T and dS^T are left operands as they are.
//
//   for each query head of the group, each block of BQ queries:
//     P^T  = exp((score(K Q^T) - m) - log(l))     dP^T = drop(V dO^T)
//     dS^T = P^T (dP^T - delta) softcap'
//     dV = dV + drop(P^T) dO
//     dK = dK + dS^T Q
//   dv = dV,  dk = scale * dK
//
// A threadgroup takes 8 SIMDGROUPS keys of one key/value head, each simdgroup 8 of them; Q and dO
// are staged once for all. Summing the group's heads here, in order, keeps the result
// deterministic. G is the heads that it takes, all of the group or a part of them (dkv_parts.h). T
// is the tensors' type, F that of the operands. dS is multiplied as float, since over long
// sequences it leaves half's range. P is at most 1, so that it can be scaled up into it.
// K, V, dK and dV stay in registers; backward_dkv_pairs.h is for wide heads, where they do not fit.
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

template <typename T, typename F, int BD, int BQ, bool STORE_DS, int SIMDGROUPS, typename V,
    typename G = WholeGroup>
[[kernel, max_total_threads_per_threadgroup(ORCHARD_THREADS(SIMDGROUPS))]] void
attention_backward_dkv(const device T* query [[buffer(kBufferQuery)]],  // (B, Hq, L, D)
    const device T* key [[buffer(kBufferKey)]],                         // (B, Hkv, S, D)
    const device T* value [[buffer(kBufferValue)]],                     // (B, Hkv, S, D)
    const device float2* row_stats [[buffer(kBufferRowStats)]],         // (B, Hq, L)
    const device T* dout [[buffer(kBufferDout)]],                       // (B, Hq, L, D)
    const device float* delta [[buffer(kBufferDelta)]],                 // (B, Hq, L)
    device typename G::template Sum<T>* dk [[buffer(kBufferDk)]],       // (B, Hkv, S, D), or parts
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
  const int kGroupKeys = 8 * SIMDGROUPS;
  const int kDepth = BD / 8;
  const int kBlocks = BQ / 8;
  const float kPScale = sizeof(F) == 2 ? 32768.0f : 1.0f;  // half's normal numbers from 2^-29 on
  const bool kHides = V::Score::Mask::kAny || V::kListed;
  const bool kNatural = V::Score::kNatural;
  using Blocks = QueryBlocks<T, F, BQ, BD, ORCHARD_THREADS(SIMDGROUPS), V::kVec>;
  using Sum = typename G::template Sum<T>;
  threadgroup uint4 storage[Blocks::kStorage];

  G taken;
  const int heads = taken.heads(params);
  Head head = query_head(params.first_head + group.x * heads, params);
  const Window window = head.window;
  const int group_key0 = params.key_begin + group.y * kGroupKeys;  // early keys are the heaviest
  const int key0 = group_key0 + simdgroup * 8;
  const LanePosition at = lane_position(lane);
  const int group_key1 = min(group_key0 + kGroupKeys, params.kv_len);
  const Range blocks_of_window = window.query_blocks(group_key0, group_key1, BQ);
  const Starts unmasked = window.unmasked_rows(key0, 8, BQ);
  const Starts ds_rows = window.rows_of_tiles(key0);
  const int64_t ds_first = STORE_DS ? dscore_row(key0, params).first : 0;

  LeftOperand<T, F, 1, kDepth, V::kVec, true> k;
  k.load(device_rows<V::kVec>(head.key_rows(key, params.k, params.head_dim), key0, at));
  LeftOperand<T, F, 1, kDepth, V::kVec, true> v;
  v.load(device_rows<V::kVec>(head.key_rows(value, params.v, params.v_head_dim), key0, at));
  Tile<float, 1, kDepth> dk_sum;
  zero(dk_sum);
  Tile<float, 1, kDepth> dv_sum;
  zero(dv_sum);
  const float dk_scale = score_derivative(params);
  const float dv_scale = (V::kDropout ? params.dropout_rescale : 1.0f) / kPScale;
  const OutputRows<Sum> dk_rows = taken.dk_rows(dk, group.x, head, params);
  const OutputRows<Sum> dv_rows = taken.dv_rows(dv, group.x, head, params);
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
    KeySums<(V::Score::Mask::kAdds)> sums_of_keys;
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
        scores.fetch(row0, masked);
        ColumnStats<kBlocks, kNatural> stats;  // asked for early: they come from device memory
        stats.load(row_stats + stats0, row0, params.q_len, at);
        ColumnValues<kBlocks> row_delta;
        row_delta.load(delta + stats0, row0, params.q_len, at);
        rows.stage(RowSight<kHides>::of(row_stats + stats0, row0, params.q_len, lane));

        Tile<float, 1, kBlocks> p;  // (8 keys, BQ queries)
        zero(p);
        mma_ABt<F, kDepth, Chains<T>::kCount>(p, k, rows.q);
        Tile<float, 1, kBlocks> derivatives;
        scores.apply(p, derivatives, ranges, row0, masked, params);
        map(p, stats);
        if (!unmasked.has(row0)) {
          mask_transposed(p, window, key0, row0, at);
          if (V::Score::kCapped && !kHides) {  // it is NaN where the score is
            mask_transposed(derivatives, window, key0, row0, at);
          }
        }
        ranges.hide(p, key0, row0, at);
        Tile<float, 1, kBlocks> ds_block;
        zero(ds_block);
        mma_ABt<F, kDepth, Chains<T>::kCount>(ds_block, v, rows.dout);  // dP^T
        uint kept = 0;
        if (V::kDropout) {
          kept = kept_transposed<kBlocks>(key0, row0, draws, lane);
          drop_transposed(ds_block, kept, params.dropout_rescale);
        }
        dscore_transposed<kHides>(ds_block, p, row_delta);
        sums_of_keys.take(ds_block, params);
        if (V::Score::kCapped) {
          times_derivative<kHides>(ds_block, derivatives);
        }
        if (STORE_DS) {
          store_dscore(ds_tiles, ds_first, ds_rows, ranges, key0, row0, ds_block, params);
        }
        if (V::kDropout) {
          drop_transposed(p, kept, kPScale);
        } else {
          scale(p, kPScale);
        }
        const Tile<F, 1, kBlocks> p_operand = as_operand<F>(p);
        mma_AB(dv_sum, p_operand, rows.dout);
        mma_AB(dk_sum, ds_block, rows.q);
        rows.advance(1);
      }
      if (parts.ended()) {
        scale(dk_sum, dk_scale);
        scale(dv_sum, dv_scale);
        parts.put_aside(dk_sum, dk_rows, key0, at);
        parts.put_aside(dv_sum, dv_rows, key0, at);
        parts.start_next();
      }
    }
    sums_of_keys.store(key_sums, head, key0, at, params);
  }

  scale(dk_sum, dk_scale);
  scale(dv_sum, dv_scale);
  parts.store(dk_sum, dk_rows, key0, at);
  parts.store(dv_sum, dv_rows, key0, at);
}
