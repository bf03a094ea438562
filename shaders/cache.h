// A cache of keys and values: which keys of it belong to a sequence, and where their rows lie.
#pragma once

#include "decode_params.h"
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
