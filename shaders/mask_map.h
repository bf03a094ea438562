// The map of what a mask lets through (MaskMap in masks.h), for the kernels to skip what is hidden.
//
// A simdgroup takes a block of ORCHARD_MAP_BLOCK queries and keys of one (batch, head) of the map,
// each lane a key of it. LISTED: the rows of the mask differ, and so do their key_ranges.
#pragma once

#include "masks.h"
#include "ranges.h"

/// Whether a mask lets a pair through.
METAL_FUNC bool lets_through(uchar element) { return element; }

template <typename E>
METAL_FUNC bool lets_through(E element) {
  return float(element) != -INFINITY;
}

METAL_FUNC int blocks_of(int length) {
  return (length + ORCHARD_MAP_BLOCK - 1) / ORCHARD_MAP_BLOCK;
}

/// Bit j of lane i becomes bit i of lane j: squares off the diagonal change places, from 16 x 16
/// down to 1 x 1.
METAL_FUNC uint transposed_bits(uint bits, ushort lane) {
  uint left = 0x0000ffff;  // of the squares
  for (ushort size = 16; size > 0; size /= 2) {
    const uint other = simd_shuffle_xor(bits, size);
    bits = (lane & size) == 0 ? (bits & left) | ((other & left) << size)
                              : (bits & ~left) | ((other >> size) & left);
    left ^= left << (size / 2);
  }
  return bits;
}

/// Which of ORCHARD_MAP_BLOCK queries from row0 on have each lane's key in their ranges: row0 + i
/// is bit i. The lanes' keys begin with key0.
METAL_FUNC uint rows_in_range(RangeRows ranges, int row0, int key0, ushort lane) {
  return transposed_bits(ranges.of(row0 + lane).bits(key0), lane);
}

template <typename E, int SIMDGROUPS, bool LISTED>
[[kernel, max_total_threads_per_threadgroup(ORCHARD_THREADS(SIMDGROUPS))]] void attention_mask_map(
    const device uchar* attn_mask [[buffer(kBufferMask)]],
    device uint2* mask_map [[buffer(kBufferMaskMap)]],
    constant AttentionParams& params [[buffer(kBufferParams)]],
    const device int* key_ranges [[buffer(kBufferKeyRanges)]],  // (B, Hq, L, 4)
    uint3 group [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  const int rows = params.mask_map.row != 0 ? blocks_of(params.q_len) : 1;
  const int cols = params.mask_map.col != 0 ? blocks_of(params.kv_len) : 1;
  const int groups_of_cols = (cols + SIMDGROUPS - 1) / SIMDGROUPS;
  const int row = group.y / groups_of_cols;
  const int col = group.y % groups_of_cols * SIMDGROUPS + simdgroup;
  if (col >= cols) {
    return;
  }
  const int heads = params.mask_map.head != 0 ? params.num_heads : 1;
  const int inner_size = params.mask_map.inner != 0 ? int(params.mask_map.inner_size) : 1;
  const int head = group.x % heads;
  const int batch = group.x / heads;
  const device E* mask = reinterpret_cast<const device E*>(attn_mask) +
                         batch / inner_size * params.mask.outer +
                         batch % inner_size * params.mask.inner + head * params.mask.head;
  const int row0 = row * ORCHARD_MAP_BLOCK;
  const int key = col * ORCHARD_MAP_BLOCK + lane;
  const bool for_every_key = params.mask_map.col == 0 && params.mask.col == 0;
  const bool exists = for_every_key || key < params.kv_len;
  const int row_end = params.mask.row == 0 ? 1 : min(row0 + ORCHARD_MAP_BLOCK, params.q_len);
  // A mask of keys alone is the same for rows that see different keys.
  const bool by_row = params.mask.row != 0;
  const Window window = window_of(params);
  uint in_range = 0;
  if (LISTED) {
    Head listed;
    listed.batch = batch / inner_size * int(params.mask.inner_size) + batch % inner_size;
    listed.head = head;
    in_range =
        rows_in_range(range_rows(listed, key_ranges, params), row0, col * ORCHARD_MAP_BLOCK, lane);
  }
  bool any = false;
  bool all = true;
  if (exists) {
    const device E* column = mask + key * params.mask.col;
    for (int i = row0; i < row_end; i++) {
      const bool passes = lets_through(column[i * params.mask.row]);
      const bool sees = LISTED ? in_range >> (i - row0) & 1 : !by_row || window.sees(i, key);
      any = any || (passes && sees);
      all = all && passes;
    }
  }
  const uint bits = simd_sum(any ? 1u << lane : 0u);
  const uint all_pairs = simd_min(all ? 1u : 0u);
  if (lane == 0) {
    mask_map[((int64_t)group.x * rows + row) * cols + col] = uint2(bits, all_pairs);
  }
}
