// Attention forward: out and the rows' statistics.
//
//   for each block of BK keys that the mask does not hide:
//     S = score(Q K^T)                       rows of the simdgroup x BK
//     where S exceeds m by more than 2^8, m moves to the row's maximum, and O and l are rescaled
//     P = exp(S - m)
//     O = O + drop(P) V;  l = l + rowsum(P)
//   l = l + exp(sink - m)
//   out = O / l,  row_stats = (m, log(l))
//
// Exponentials and logarithms are powers of two where the score is plain, and natural otherwise
// (scores.h).
//
// A threadgroup takes BQ = 8 R SIMDGROUPS query rows of one head, each simdgroup 8 R of them with
// Q, S, P and O in registers. T is the tensors' type, F that of the matrix unit's operands. BUFFERS
// says how K and V reach it (staging.h). LEFT is what a threadgroup leaves at its end: where there
// are few of them, several share the keys of their rows (forward_parts.h).
#pragma once

#include "dropout.h"
#include "forward_parts.h"
#include "hidden_blocks.h"
#include "keys.h"
#include "loader.h"
#include "ranges.h"
#include "scores.h"
#include "softmax.h"
#include "staging.h"

template <typename T, typename F, int BD, int R, int BK, int BUFFERS, int SIMDGROUPS, typename V,
    typename LEFT = Finished>
[[kernel, max_total_threads_per_threadgroup(ORCHARD_THREADS(SIMDGROUPS))]] void attention_forward(
    const device T* query [[buffer(kBufferQuery)]],        // (B, Hq, L, D)
    const device T* key [[buffer(kBufferKey)]],            // (B, Hkv, S, D)
    const device T* value [[buffer(kBufferValue)]],        // (B, Hkv, S, D)
    device T* out [[buffer(kBufferOut)]],                  // (B, Hq, L, D)
    device float2* row_stats [[buffer(kBufferRowStats)]],  // (B, Hq, L)
    constant AttentionParams& params [[buffer(kBufferParams)]],
    const device uchar* attn_mask [[buffer(kBufferMask)]],
    const device uint2* mask_map [[buffer(kBufferMaskMap)]],          // MaskMap
    const device float* alibi_slopes [[buffer(kBufferAlibiSlopes)]],  // (Hq) or (B, Hq)
    const device int* key_ranges [[buffer(kBufferKeyRanges)]],        // (B, Hq, L, 4)
    const device float* sinks [[buffer(kBufferSinks)]],               // (Hq)
    device float* parts [[buffer(kBufferForwardParts)]],              // ForwardResults
    uint3 group [[threadgroup_position_in_grid]], uint3 grid [[threadgroups_per_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  const int kDepth = BD / 8;
  const int kValueBD = V::template Value<BD>::kWidth;
  const int kGroupRows = 8 * R * SIMDGROUPS;
  const bool kKeepQ = R * BD * (4 + sizeof(F)) / 16 <= ORCHARD_OPERAND_REGISTERS;
  const bool kNatural = V::Score::kNatural;
  using Ranges = TileRanges<V::kListed, R, kGroupRows>;
  using Blocks =
      KeyValueBlocks<T, F, BK, BD, ORCHARD_THREADS(SIMDGROUPS), V::kVec, BUFFERS, kValueBD>;
  threadgroup uint4 storage[Blocks::kStorage];

  // Heads run fastest and late rows first: under a causal mask the heaviest blocks start first.
  const Head head = query_head(group.x, params);
  const Window window = head.window;
  LEFT left;
  left.start(grid.y - 1 - group.y, params);
  const int group_row0 = left.block * kGroupRows;
  const int row0 = group_row0 + simdgroup * 8 * R;
  const LanePosition at = lane_position(lane);
  Ranges ranges;
  ranges.start(head, key_ranges, group_row0, row0, at, lane, params);
  const Range blocks = left.keys(ranges.key_blocks(
      window.key_blocks(group_row0, min(group_row0 + kGroupRows, params.q_len), BK), BK));
  const Starts unmasked = window.unmasked_keys(row0, 8 * R, BK);
  const DropoutDraws draws = dropout_draws(head.batch, head.head, at, params);

  LeftOperand<T, F, R, kDepth, V::kVec, kKeepQ> q;
  q.load(device_rows<V::kVec>(head.query_rows(query, params.q, params.head_dim), row0, at));
  Blocks kv;
  kv.start(head.key_rows(key, params.k, params.head_dim),
      head.key_rows(value, params.v, params.v_head_dim), blocks.begin * BK, storage, thread_index,
      at);
  Tile<float, R, kValueBD / 8> o;
  zero(o);
  OnlineSoftmax<R, kNatural> softmax;
  softmax.init();
  const ScoreBuffers buffers = score_buffers(attn_mask, alibi_slopes);
  Scores<typename V::Score, R, BK / 8> scores;
  scores.start(head, buffers, ranges, row0, at, params);
  MaskMap<typename V::Score::Mask> visible;
  visible.start(head, mask_map, params);

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
    Tile<float, R, BK / 8> s;
    zero(s);
    mma_ABt<F, kDepth, Chains<T>::kCount>(s, q, kv.k);
    kv.stage_values(seen);
    scores.apply(s, key0, seen.masked(), params);
    if (!unmasked.has(key0)) {
      mask(s, window, row0, key0, -INFINITY, at);
    }
    ranges.hide(s, key0, -INFINITY, at);
    softmax.update(s, o);  // s is P now
    if (V::kDropout) {
      drop(s, row0, key0, draws);
    }
    const Tile<F, R, BK / 8> p = as_operand<F>(s);
    kv.wait_for_values();
    mma_AB(o, p, kv.v);
    kv.advance(1);
  }

  ForwardResults<T> results;
  results.out = out;
  results.row_stats = row_stats;
  results.parts = parts;
  left.template leave<V>(o, softmax, results, head, group.x, sinks, row0, at, params);
}
