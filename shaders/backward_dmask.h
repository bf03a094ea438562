// Attention backward, the gradient of an additive mask: what dS sums up to over all that share an
// element of the mask. dS is computed again; backward_dmask_from_ds.h is for calls whose key's side
// has stored all of it.
//
//   for each head of a batch entry that shares these elements, each block of queries that does:
//     P   = exp((score(Q K^T) - m) - log(l))      dP = drop(dO V^T)
//     sum = sum + P (dP - delta)
//   dmask = sum
//
// A threadgroup takes a tile of BQ = 8 R SIMDGROUPS query rows and BK keys of one (batch, head) of
// the mask, each simdgroup 8 R of the rows. Where all rows share one row of the mask, their sums
// are added up behind the loop. So the tile's part of the mask, and what it lets through, are the
// same for all that is summed up, and are read once. Where there are few tiles, several
// threadgroups share one, and backward_dmask_sum.h adds up what each of them stores: O, the type of
// the gradient's elements, is float then. A mask that all keys share is left to
// backward_dmask_rows.h, and one that all queries share, where it can, to the key's side
// (key_sums.h).
#pragma once

#include "dropout.h"
#include "dscore.h"
#include "keys.h"
#include "loader.h"
#include "long_sum.h"
#include "mask_gradient.h"
#include "mask_sharers.h"
#include "ranges.h"
#include "scores.h"
#include "softmax.h"
#include "staging.h"

/// Blocks of a head's rows that are summed up one after the other, where rows share a row of the
/// mask: several threadgroups share the others.
constant int kRunBlocks = 32;

template <typename T, typename F, int BD, int R, int BK, int SIMDGROUPS, typename V, typename O>
[[kernel, max_total_threads_per_threadgroup(ORCHARD_THREADS(SIMDGROUPS))]] void
attention_backward_dmask(const device T* query [[buffer(kBufferQuery)]],  // (B, Hq, L, D)
    const device T* key [[buffer(kBufferKey)]],                           // (B, Hkv, S, D)
    const device T* value [[buffer(kBufferValue)]],                       // (B, Hkv, S, D)
    const device float2* row_stats [[buffer(kBufferRowStats)]],           // (B, Hq, L)
    const device T* dout [[buffer(kBufferDout)]],                         // (B, Hq, L, D)
    const device float* delta [[buffer(kBufferDelta)]],                   // (B, Hq, L)
    device O* dmask [[buffer(kBufferDmask)]],  // (parts, outer, inner, Hq, L, S), dense
    constant AttentionParams& params [[buffer(kBufferParams)]],
    const device uchar* attn_mask [[buffer(kBufferMask)]],
    const device uint2* mask_map [[buffer(kBufferMaskMap)]],          // MaskMap
    const device float* alibi_slopes [[buffer(kBufferAlibiSlopes)]],  // (Hq) or (B, Hq)
    const device int* key_ranges [[buffer(kBufferKeyRanges)]],        // (B, Hq, L, 4)
    uint3 group [[threadgroup_position_in_grid]], uint3 grid [[threadgroups_per_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  const int kDepth = BD / 8;
  const int kGroupRows = 8 * R * SIMDGROUPS;
  const bool kKeep = R * (BD * sizeof(F) / 8 + BK / 2) <= ORCHARD_OPERAND_REGISTERS;  // Q, dO, sums
  const bool kNatural = V::Score::kNatural;
  using Seen = typename MaskMap<typename V::Score::Mask>::Seen;
  using Blocks = KeyValueBlocks<T, F, BK, BD, ORCHARD_THREADS(SIMDGROUPS), V::kVec, 2>;
  threadgroup uint4 storage[Blocks::kStorage];

  const bool shared_rows = params.dmask.row == 0;
  const int parts = params.dmask_parts;
  const int part = int(group.x) % parts;
  const int entry = int(group.x) / parts;
  const int key_blocks = (params.kv_len + BK - 1) / BK;
  const int key0 = int(group.y) % key_blocks * BK;
  const int own_block = int(group.y) / key_blocks;  // of rows
  const LanePosition at = lane_position(lane);
  MaskSharers sharers;
  sharers.start(entry, params);
  const Head first = sharers.present(params);
  const Window window = first.window;
  Range rows = window.query_blocks(key0, min(key0 + BK, params.kv_len), kGroupRows);
  if (!shared_rows) {
    rows.begin = max(rows.begin, own_block);
    rows.end = min(rows.end, own_block + 1);
  }
  MaskMap<typename V::Score::Mask> visible;
  visible.start(first, mask_map, params);
  Seen seen = visible.template keys<kGroupRows>(own_block * kGroupRows, key0);
  // Where key ranges tell heads apart, so does the map: each head's is looked at in its turn.
  const bool any_seen = V::kListed || seen.template any<BK>();
  const int blocks = any_seen ? max(rows.end - rows.begin, 0) : 0;
  const int runs = (blocks + kRunBlocks - 1) / kRunBlocks;  // of blocks of one head
  const Range terms = terms_of_part(sharers.count() * runs, part, parts);

  const int first_row0 = own_block * kGroupRows + simdgroup * 8 * R;
  const ScoreBuffers buffers = score_buffers(attn_mask, alibi_slopes);
  Scores<typename V::Score, R, BK / 8> scores;
  TileRanges<V::kListed, R, kGroupRows> ranges;
  ranges.start(first, key_ranges, own_block * kGroupRows, first_row0, at, lane, params);
  scores.start(first, buffers, ranges, first_row0, at, params);
  scores.fetch(key0, true);
  LongTileSum<R, BK / 8> sum;
  sum.start();
  int run = 0;
  if (runs > 0) {
    sharers.skip(terms.begin / runs);
    run = terms.begin % runs;
  }

  for (int term = terms.begin; term < terms.end; term++) {
    const Head head = sharers.present(params);
    const int64_t stats0 = ((int64_t)head.batch * params.num_heads + head.head) * params.q_len;
    const DropoutDraws draws = dropout_draws(head.batch, head.head, at, params);
    const HeadRows<T> q_rows = head.query_rows(query, params.q, params.head_dim);
    const HeadRows<T> do_rows = head.query_rows(dout, params.dout, params.v_head_dim);
    Blocks kv;
    kv.start(head.key_rows(key, params.k, params.head_dim),
        head.key_rows(value, params.v, params.v_head_dim), key0, storage, thread_index, at);
    const int first_block = rows.begin + run * kRunBlocks;
    int last_block = min(first_block + kRunBlocks, rows.end);
    if (V::kListed) {
      visible.start(head, mask_map, params);
      seen = visible.template keys<kGroupRows>(own_block * kGroupRows, key0);
      last_block = seen.template any<BK>() ? last_block : first_block;
    }
    kv.stage_keys(seen);
    for (int block = first_block; block < last_block; block++) {
      const int row0 = block * kGroupRows + simdgroup * 8 * R;
      ranges.start(head, key_ranges, block * kGroupRows, row0, at, lane, params);
      if (!ranges.meets(key0, key0 + BK)) {
        continue;
      }
      LeftOperand<T, F, R, kDepth, V::kVec, kKeep> q;
      q.load_in_loop(device_rows<V::kVec>(q_rows, row0, at));
      LeftOperand<T, F, R, kDepth, V::kVec, kKeep> do_;
      do_.load_in_loop(device_rows<V::kVec>(do_rows, row0, at));
      RowStats<R, kNatural> stats;
      float row_delta[R];
      ORCHARD_UNROLL
      for (int r = 0; r < R; r++) {
        const int64_t place = stats0 + min(row0 + 8 * r + at.row, params.q_len - 1);
        stats.set(r, row_stats[place]);
        row_delta[r] = delta[place];
      }
      scores.move(head, buffers, ranges, row0, at, params);
      Tile<float, R, BK / 8> p;
      zero(p);
      mma_ABt<F, kDepth, Chains<T>::kCount>(p, q, kv.k);
      scores.apply(p, key0, true, params);
      map(p, stats);
      if (!window.unmasked_keys(row0, 8 * R, BK).has(key0)) {
        mask(p, window, row0, key0, 0.0f, at);
      }
      ranges.hide(p, key0, 0.0f, at);
      Tile<float, R, BK / 8> dp;
      zero(dp);
      mma_ABt<F, kDepth, Chains<T>::kCount>(dp, do_, kv.v);
      if (V::kDropout) {
        drop(dp, row0, key0, draws);
        scale(dp, params.dropout_rescale);
      }
      Tile<float, R, BK / 8> ds;
      dscore<true>(ds, p, dp, row_delta);
      sum.take(ds);
    }
    run++;
    if (run == runs) {
      run = 0;
      sharers.advance();
    }
  }

  sum.put_aside();
  MaskGradient<O> to;
  to.rows = shared_rows ? 1 : params.q_len;
  to.keys = params.kv_len;
  const int entries = int(grid.x) / parts;
  to.data = dmask + ((int64_t)part * entries + entry) * to.rows * to.keys;
  if (!shared_rows) {
    to.store(sum.earlier, first_row0, key0, at);
    return;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // K and V have been read
  to.template store_columns<SIMDGROUPS>(sum.earlier, key0,
      reinterpret_cast<threadgroup float*>(storage), thread_index, simdgroup, at);
}
