// The border of the kernels for caches of keys and values, beside params.h.
#pragma once

#include "params.h"

/// Index of each [[buffer(n)]] that only these kernels have.
enum CacheBuffer {
  kBufferCacheLengths = 23,
  kBufferCacheStarts = 24,
  kBufferCacheEntries = 25,
  kBufferBlockTable = 26,
  kBufferParts = 27,
  kBufferPartSums = 28,
};

/// Keys that a simdgroup takes at once: those of such a block lie in one page.
#define ORCHARD_CACHE_BLOCK 16

/// Keys that are not divided any further between simdgroups.
#define ORCHARD_LEAST_PART 64

/// Where the keys and values of the sequences lie. In `attention` the strides named batch are those
/// from one entry of the cache to the next: an entry is the room of one sequence, or a page.
struct CacheParams {
  int64_t table_row;    ///< stride of block_table, from one sequence to the next
  int32_t entries;      ///< of the cache
  int32_t page_size;    ///< keys of a page, where there is a block_table
  int32_t capacity;     ///< keys that a sequence has room for
  int32_t added;        ///< keys of each sequence besides those that cache_seqlens counts
  int32_t has_lengths;  ///< whether cache_seqlens, cache_leftpad and cache_batch_idx are bound
  int32_t has_starts;
  int32_t has_entries;
  int32_t paged;  ///< whether block_table is
};

struct DecodeParams {
  AttentionParams attention;
  CacheParams cache;
  int32_t block_rows;   ///< rows that share a threadgroup: queries times heads of a group
  int32_t blocks;       ///< of so many rows, of a key/value head
  int32_t parts;        ///< threadgroups that share the keys of a sequence
  int32_t part_stride;  ///< floats from one row of the parts' sums to the next
  int32_t row_stats;    ///< whether row_stats of a forward are wanted, in place of lse
  int32_t powers_of_2;  ///< whether their logarithms are to the base 2, as of plain logits
};

static_assert(sizeof(CacheParams) == 8 + 8 * 4, "host and shader must agree on CacheParams");
static_assert(sizeof(DecodeParams) == sizeof(AttentionParams) + sizeof(CacheParams) + 6 * 4,
    "host and shader must agree on DecodeParams");
