// A cache of keys and values: which keys of it belong to a sequence, where their rows lie, and what
// a simdgroup has of a block of them.
#pragma once

#include "decode_params.h"
#include "keys.h"
#include "loader.h"
#include "tile.h"

/// What says where sequences lie. What a call does not have is a stand-in that is never read.
struct CacheBuffers {
  const device int* lengths;  // (B)
  const device int* starts;   // (B)
  const device int* entries;  // (B)
  const device int* table;    // (B, pages of a sequence)
};

METAL_FUNC CacheBuffers cache_buffers(const device int* lengths, const device int* starts,
    const device int* entries, const device int* table) {
  CacheBuffers buffers;
  buffers.lengths = lengths;
  buffers.starts = starts;
  buffers.entries = entries;
  buffers.table = table;
  return buffers;
}

/// Where a block of ORCHARD_CACHE_BLOCK keys lies in every tensor of the cache.
struct CachedBlock {
  int entry;
  int row;

  METAL_FUNC int64_t offset(constant TensorStrides& strides) const {
    return entry * strides.batch + row * strides.row;
  }
};

/// The keys of one sequence, [start, length), counted from its first row in the cache. Whatever
/// numbers the buffers hold, they lie within the cache.
struct CachedSequence {
  int start;
  int length;
  int entry;                // of the cache, where there are no pages
  const device int* pages;  // of this sequence
  int page_size;
  int last_entry;

  METAL_FUNC void find(int batch, CacheBuffers buffers, constant CacheParams& params) {
    // Sums of three numbers of up to 2^28 do not overflow.
    const int cached = params.has_lengths ? clamp(buffers.lengths[batch], 0, params.capacity) : 0;
    length = min(cached + params.added, params.capacity);
    start = params.has_starts ? clamp(buffers.starts[batch], 0, length) : 0;
    last_entry = params.entries - 1;
    entry = params.has_entries ? clamp(buffers.entries[batch], 0, last_entry) : batch;
    pages = buffers.table + batch * params.table_row;
    page_size = params.page_size;
  }

  /// The block that key0 begins.
  template <bool PAGED>
  METAL_FUNC CachedBlock block(int key0) const {
    CachedBlock block;
    block.entry = entry;
    block.row = key0;
    if (PAGED) {
      const int page = key0 / page_size;
      block.entry = clamp(pages[page], 0, last_entry);
      block.row = key0 - page * page_size;
    }
    return block;
  }
};

/// 16 bytes of a row, of elements of 16 bits.
template <typename T>
struct Chunk {
  static constant constexpr const int kElements = 8;

  uint4 bits;

  METAL_FUNC vec<T, 2> pair(int i) const {
    uint word = bits[i];
    return reinterpret_cast<thread vec<T, 2>&>(word);
  }

  METAL_FUNC void set_pair(int i, vec<T, 2> elements) {
    bits[i] = reinterpret_cast<thread uint&>(elements);
  }

  METAL_FUNC T at(int i) const { return i % 2 == 0 ? pair(i / 2).x : pair(i / 2).y; }
};

template <>
struct Chunk<float> {
  static constant constexpr const int kElements = 4;

  uint4 bits;

  METAL_FUNC float2 pair(int i) const { return float2(at(2 * i), at(2 * i + 1)); }

  METAL_FUNC void set_pair(int i, float2 elements) {
    bits[2 * i] = as_type<uint>(elements.x);
    bits[2 * i + 1] = as_type<uint>(elements.y);
  }

  METAL_FUNC float at(int i) const { return as_type<float>(bits[i]); }
};

/// The rows of one head of a tensor of the cache.
template <typename T, bool VEC>
struct CacheRows {
  const device T* head;
  int64_t row_stride;
  int64_t col_stride;
  int width;

  METAL_FUNC void start(
      const device T* tensor, int kv_head, constant TensorStrides& strides, int columns) {
    head = tensor + kv_head * strides.head;
    row_stride = strides.row;
    col_stride = strides.col;
    width = columns;
  }

  /// The elements from column `col` on, zero beyond the last one.
  METAL_FUNC Chunk<T> chunk(int64_t row, int col) const {
    Chunk<T> chunk;
    if (VEC) {
      chunk.bits =
          col < width ? *reinterpret_cast<const device uint4*>(head + row + col) : uint4(0);
    } else {
      const device T* elements = head + row;
      ORCHARD_UNROLL
      for (int i = 0; i < Chunk<T>::kElements / 2; i++) {
        const int first = col + 2 * i;
        const int second = first + 1;
        chunk.set_pair(i, vec<T, 2>(first < width ? elements[first * col_stride] : T(0),
                              second < width ? elements[second * col_stride] : T(0)));
      }
    }
    return chunk;
  }
};

/// The rows of one block of a part's keys or values.
template <typename T, bool VEC>
struct BlockRows {
  CacheRows<T, VEC> all;
  Range keys;  // of the part
  int key0;
  int64_t row0;

  METAL_FUNC void move_to(int first, CachedBlock block, constant TensorStrides& strides) {
    key0 = first;
    row0 = block.offset(strides);
  }

  /// Whether key i of the block is of this part.
  METAL_FUNC bool has(int i) const { return keys.has(key0 + i); }

  METAL_FUNC bool has_all() const { return has(0) && has(ORCHARD_CACHE_BLOCK - 1); }

  /// Of key i of the block. Keys that are not of this part have the row of one that is: no other
  /// numbers are looked at, and what comes of them is hidden later.
  METAL_FUNC Chunk<T> chunk(int i, int col) const {
    const int row = clamp(key0 + i, keys.begin, keys.end - 1) - key0;
    return all.chunk(row0 + row * all.row_stride, col);
  }
};

/// What a lane multiplies of a block's keys: GROUPS chunks of two keys of each of COLUMNS
/// fragments.
template <typename T, int COLUMNS, int GROUPS>
struct KeyChunks {
  Chunk<T> first[COLUMNS][GROUPS];
  Chunk<T> second[COLUMNS][GROUPS];

  template <bool VEC>
  METAL_FUNC void load(thread const BlockRows<T, VEC>& rows, LanePosition at) {
    ORCHARD_UNROLL
    for (int c = 0; c < COLUMNS; c++) {
      ORCHARD_UNROLL
      for (int g = 0; g < GROUPS; g++) {
        const int col = (8 * g + at.row) * Chunk<T>::kElements;
        first[c][g] = rows.chunk(8 * c + at.col, col);
        second[c][g] = rows.chunk(8 * c + at.col + 1, col);
      }
    }
  }
};

/// Likewise of a block's values: GROUPS chunks of one value of each of COLUMNS fragments. Those of
/// keys that are not of this part are zero: their weights are, but zero times infinity is not.
template <typename T, int COLUMNS, int GROUPS>
struct ValueChunks {
  Chunk<T> of[COLUMNS][GROUPS];

  template <bool VEC>
  METAL_FUNC void load(thread const BlockRows<T, VEC>& rows, LanePosition at) {
    ORCHARD_UNROLL
    for (int c = 0; c < COLUMNS; c++) {
      ORCHARD_UNROLL
      for (int g = 0; g < GROUPS; g++) {
        of[c][g] = rows.chunk(8 * c + at.row, (4 * g + at.col / 2) * Chunk<T>::kElements);
      }
    }
    if (rows.has_all()) {
      return;
    }
    ORCHARD_UNROLL
    for (int c = 0; c < COLUMNS; c++) {
      ORCHARD_UNROLL
      for (int g = 0; g < GROUPS; g++) {
        of[c][g].bits = rows.has(8 * c + at.row) ? of[c][g].bits : uint4(0);
      }
    }
  }
};
