// The map of what mask_mod and block_states let through: as mask_map.h writes that of attn_mask.
// mask_mod is asked only in blocks of which block_states do not know.
//
// A simdgroup takes ORCHARD_MAP_RUN blocks side by side, of ORCHARD_MAP_BLOCK queries and keys of
// one (batch, head) of the map. Those of which block_states know have a lane each. All lanes take
// the others in turn, each lane a key.
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
  const int kGroupCols = SIMDGROUPS * ORCHARD_MAP_RUN;
  const int groups_of_cols = (cols + kGroupCols - 1) / kGroupCols;
  const int row = group.y / groups_of_cols;
  const int col0 = group.y % groups_of_cols * kGroupCols + simdgroup * ORCHARD_MAP_RUN;
  if (col0 >= cols) {
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
  const int row0 = row * ORCHARD_MAP_BLOCK;
  const int row_end = min(row0 + ORCHARD_MAP_BLOCK, params.q_len);
  device uint2* blocks = mask_map + ((int64_t)group.x * rows + row) * cols;
  const bool whole = states.whole();
  const int own = col0 + lane;
  bool asks = lane < ORCHARD_MAP_RUN && own < cols;
  if (asks && whole) {
    const int key0 = own * ORCHARD_MAP_BLOCK;
    const int state = states.of(row0, key0);
    asks = state == kStateAsk;
    if (!asks) {
      const bool passes = state != kStateNothing;
      blocks[own] =
          uint2(passes ? VisibleKeys::bits_below(params.kv_len - key0) : 0u, passes ? 1u : 0u);
    }
  }
  for (uint asked = simd_or(asks ? 1u << lane : 0u); asked != 0; asked &= asked - 1) {
    const int col = col0 + int(ctz(asked));
    const int key = col * ORCHARD_MAP_BLOCK + lane;
    bool any = false;
    bool all = true;
    if (key < params.kv_len) {
      for (int i = row0; i < row_end;) {
        const int end = whole ? row_end : min(states.behind(i), row_end);
        const int state = whole ? int(kStateAsk) : states.of(i, key);
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
      blocks[col] = uint2(bits, all_pairs);
    }
  }
}
