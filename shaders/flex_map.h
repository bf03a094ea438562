// The map of what mask_mod and block_states let through: as mask_map.h writes that of attn_mask.
// mask_mod is asked only in blocks of which block_states do not know.
//
// A simdgroup takes a block of ORCHARD_MAP_BLOCK queries and keys of one (batch, head) of the map,
// each lane a key of it.
#pragma once

#include "flex_scores.h"

template <typename MASK_MOD, int SIMDGROUPS>
[[kernel, max_total_threads_per_threadgroup(ORCHARD_THREADS(SIMDGROUPS))]] void attention_flex_map(
    const device uchar* block_states [[buffer(kBufferMask)]],
    device uint2* mask_map [[buffer(kBufferMaskMap)]],
    constant FlexParams& flex [[buffer(kBufferParams)]],
    const device uchar* capture0 [[buffer(kBufferCapture0)]],
    const device uchar* capture1 [[buffer(kBufferCapture1)]],
    const device uchar* capture2 [[buffer(kBufferCapture2)]],
    const device uchar* capture3 [[buffer(kBufferCapture3)]],
    const device uchar* capture4 [[buffer(kBufferCapture4)]],
    const device uchar* capture5 [[buffer(kBufferCapture5)]],
    const device uchar* capture6 [[buffer(kBufferCapture6)]],
    const device uchar* capture7 [[buffer(kBufferCapture7)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  constant AttentionParams& params = flex.attention;
  const int rows = (params.q_len + ORCHARD_MAP_BLOCK - 1) / ORCHARD_MAP_BLOCK;
  const int cols = (params.kv_len + ORCHARD_MAP_BLOCK - 1) / ORCHARD_MAP_BLOCK;
  const int groups_of_cols = (cols + SIMDGROUPS - 1) / SIMDGROUPS;
  const int row = group.y / groups_of_cols;
  const int col = group.y % groups_of_cols * SIMDGROUPS + simdgroup;
  if (col >= cols) {
    return;
  }
  const int heads = params.mask_map.head != 0 ? params.num_heads : 1;
  const int head = group.x % heads;
  const int batch = group.x / heads;
  BlockStates states;
  states.start(batch, head, block_states, flex);
  MASK_MOD mask_mod;
  mask_mod.captures = flex_captures(
      capture0, capture1, capture2, capture3, capture4, capture5, capture6, capture7, flex);
  const int key = col * ORCHARD_MAP_BLOCK + lane;
  const int row0 = row * ORCHARD_MAP_BLOCK;
  const int row_end = min(row0 + ORCHARD_MAP_BLOCK, params.q_len);
  bool any = false;
  bool all = true;
  if (key < params.kv_len) {
    for (int i = row0; i < row_end;) {
      const int end = min(states.behind(i), row_end);
      const int state = states.of(i, key);
      if (state == kStateAsk) {
        for (; i < end; i++) {
          const bool passes = mask_mod.sees(batch, head, i, key);
          any = any || passes;
          all = all && passes;
        }
      } else {
        const bool passes = state != kStateNothing;
        any = any || passes;
        all = all && passes;
        i = end;
      }
    }
  }
  const uint bits = simd_sum(any ? 1u << lane : 0u);
  const uint all_pairs = simd_min(all ? 1u : 0u);
  if (lane == 0) {
    mask_map[((int64_t)group.x * rows + row) * cols + col] = uint2(bits, all_pairs);
  }
}
