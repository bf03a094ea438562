// Writes new keys, or values, behind those that a cache has. An element E is a number, or 16 bytes
// of a row: strides and widths count in it. What a sequence has no room for is left out, and so is
// what would go to an entry that the cache does not have.
#pragma once

#include "decode_params.h"

template <typename E, int SIMDGROUPS>
[[kernel, max_total_threads_per_threadgroup(ORCHARD_THREADS(SIMDGROUPS))]] void attention_append(
    const device E* added [[buffer(kBufferKey)]],  // (B, Hkv, L, width)
    device E* cache [[buffer(kBufferOut)]],        // (entries, Hkv, keys of an entry, width)
    constant DecodeParams& params [[buffer(kBufferParams)]],
    const device int* cache_lengths [[buffer(kBufferCacheLengths)]],  // (B)
    const device int* cache_entries [[buffer(kBufferCacheEntries)]],  // (B)
    const device int* block_table [[buffer(kBufferBlockTable)]],      // (B, pages of a sequence)
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]]) {
  constant AttentionParams& from = params.attention;
  constant CacheParams& to = params.cache;
  const int index = group.x * ORCHARD_THREADS(SIMDGROUPS) + thread_index;
  const int col = index % from.head_dim;
  const int token = index / from.head_dim % from.q_len;
  const int head_index = index / from.head_dim / from.q_len;
  const int head = head_index % from.num_kv_heads;
  const int batch = head_index / from.num_kv_heads;
  if (batch >= from.batch) {
    return;
  }
  const int cached = to.has_lengths ? clamp(cache_lengths[batch], 0, to.capacity) : 0;
  const int slot = cached + to.added + token;
  if (slot >= to.capacity) {
    return;
  }
  const int page = slot / to.page_size;  // 0 where there are no pages
  int entry = batch;
  if (to.paged) {
    entry = block_table[batch * to.table_row + page];
  } else if (to.has_entries) {
    entry = cache_entries[batch];
  }
  if (entry < 0 || entry >= to.entries) {
    return;
  }
  cache[entry * from.out.batch + head * from.out.head +
        (slot - page * to.page_size) * from.out.row + col * from.out.col] =
      added[batch * from.k.batch + head * from.k.head + token * from.k.row + col * from.k.col];
}
