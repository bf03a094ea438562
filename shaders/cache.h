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

/// Where a block of ORCHARD_CACHE_BLOCK keys lies in every tensor of the cache: without pages, from
/// where the sequence begins.
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

  /// Where it begins in a tensor of the cache, which pages have no single place for.
  template <bool PAGED>
  METAL_FUNC int64_t first(constant TensorStrides& strides) const {
    return PAGED ? 0 : entry * strides.batch;
  }

  /// The block that key0 begins.
  template <bool PAGED>
  METAL_FUNC CachedBlock block(int key0) const {
    CachedBlock block;
    block.entry = 0;
    block.row = key0;
    if (PAGED) {
      const int page = key0 / page_size;
      block.entry = clamp(pages[page], 0, last_entry);
      block.row = key0 - page * page_size;
    }
    return block;
  }
};

/// Up to 16 bytes of a row, of elements of 16 bits.
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

/// Which columns of a row a lane has, of LANES lanes that share it: COUNT elements, in words of 4
/// bytes. The lanes' chunks of 16 bytes lie side by side, and their next ones behind those. What is
/// no whole chunk in the end is divided in the same way, by half a chunk and by a quarter of one.
template <typename T, int LANES, int COUNT>
struct LaneColumns {
  static constant constexpr const int kOfWord = 4 / sizeof(T);
  static constant constexpr const int kWords = COUNT / kOfWord;
  static constant constexpr const int kChunks = (kWords + 3) / 4;

  short lane;

  /// Words of chunk g.
  METAL_FUNC int words(int g) const { return min(kWords - 4 * g, 4); }

  /// Of element e of this lane.
  METAL_FUNC int column(int e) const {
    const int word = e / kOfWord;
    const int left = words(word / 4);
    // Words that lie side by side: 4, 2 and then 1 of 3, 2, or 1.
    const int together = left == 4 ? 4 : left >= 2 && word % 4 < 2 ? 2 : 1;
    const int within = word & (together - 1);
    return (LANES * (word - within) + lane * together + within) * kOfWord + e % kOfWord;
  }
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

  /// As many elements from column `col` on as BITS has, zero beyond the row's last one. WIDE: the
  /// row has all columns that the lanes share.
  template <bool WIDE, typename BITS>
  METAL_FUNC BITS bits(const device T* row, int col) const {
    return WIDE || col < width ? *reinterpret_cast<const device BITS*>(row + col) : BITS(0);
  }

  /// Chunk g of what a lane has. Where it has fewer words than a chunk, the rest is anything.
  template <bool WIDE, int LANES, int COUNT>
  METAL_FUNC Chunk<T> chunk(
      const device T* row, LaneColumns<T, LANES, COUNT> columns, int g) const {
    const int kElements = Chunk<T>::kElements;
    const int words = columns.words(g);
    Chunk<T> chunk;
    if (!VEC) {
      ORCHARD_UNROLL
      for (int e = 0; e < kElements; e += 2) {
        const int col = columns.column(g * kElements + e);
        const bool has = e < words * columns.kOfWord;  // so many are even
        const bool has_first = has && (WIDE || col < width);
        const bool has_second = has && (WIDE || col + 1 < width);
        chunk.set_pair(e / 2, vec<T, 2>(has_first ? row[col * col_stride] : T(0),
                                  has_second ? row[(col + 1) * col_stride] : T(0)));
      }
    } else if (words == 4) {
      chunk.bits = bits<WIDE, uint4>(row, columns.column(g * kElements));
    } else {
      if (words >= 2) {
        chunk.bits.xy = bits<WIDE, uint2>(row, columns.column(g * kElements));
      }
      if (words != 2) {
        const int last = words - 1;
        chunk.bits[last] =
            bits<WIDE, uint>(row, columns.column(g * kElements + last * columns.kOfWord));
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
  const device T* row0;

  METAL_FUNC void move_to(int first, CachedBlock block, constant TensorStrides& strides) {
    key0 = first;
    row0 = all.head + block.offset(strides);
  }

  /// Whether key i of the block is of this part.
  METAL_FUNC bool has(int i) const { return keys.has(key0 + i); }

  /// Of key 8 c + i of the block. WHOLE: all keys are of this part, and have all columns that the
  /// lanes share. Else those that are not of it have the row of one that is: no other numbers are
  /// looked at, and what comes of them is hidden later.
  template <bool WHOLE, typename COLUMNS>
  METAL_FUNC Chunk<T> chunk(int c, int i, COLUMNS columns, int g) const {
    if (WHOLE) {
      const device T* rows = row0 + 8 * c * all.row_stride;
      return all.template chunk<true>(rows + i * all.row_stride, columns, g);
    }
    const int row = clamp(8 * c + i, keys.begin - key0, keys.end - 1 - key0);
    return all.template chunk<false>(row0 + row * all.row_stride, columns, g);
  }
};

/// What a lane multiplies of a block's keys: its columns, `Columns`, of two keys of each of
/// FRAGMENTS fragments.
template <typename T, int FRAGMENTS, typename Columns>
struct KeyChunks {
  Chunk<T> first[FRAGMENTS][Columns::kChunks];
  Chunk<T> second[FRAGMENTS][Columns::kChunks];

  template <bool WHOLE, bool VEC>
  METAL_FUNC void load_rows(
      thread const BlockRows<T, VEC>& rows, Columns columns, LanePosition at) {
    ORCHARD_UNROLL
    for (int c = 0; c < FRAGMENTS; c++) {
      ORCHARD_UNROLL
      for (int g = 0; g < Columns::kChunks; g++) {
        first[c][g] = rows.template chunk<WHOLE>(c, at.col, columns, g);
        second[c][g] = rows.template chunk<WHOLE>(c, at.col + 1, columns, g);
      }
    }
  }
};

/// Likewise of a block's values, of one value of each fragment. Those of keys that are not of this
/// part are zero: their weights are, but zero times infinity is not.
template <typename T, int FRAGMENTS, typename Columns>
struct ValueChunks {
  Chunk<T> of[FRAGMENTS][Columns::kChunks];

  template <bool WHOLE, bool VEC>
  METAL_FUNC void load_rows(
      thread const BlockRows<T, VEC>& rows, Columns columns, LanePosition at) {
    ORCHARD_UNROLL
    for (int c = 0; c < FRAGMENTS; c++) {
      ORCHARD_UNROLL
      for (int g = 0; g < Columns::kChunks; g++) {
        of[c][g] = rows.template chunk<WHOLE>(c, at.row, columns, g);
        if (!WHOLE) {
          of[c][g].bits = rows.has(8 * c + at.row) ? of[c][g].bits : uint4(0);
        }
      }
    }
  }
};

/// Of most blocks, which are whole, no row needs a clamp: it is as far from the block's first one
/// as in any other block.
template <typename Chunks, typename Rows, typename Columns>
METAL_FUNC void load_block(
    thread Chunks& chunks, thread const Rows& rows, bool whole, Columns columns, LanePosition at) {
  if (whole) {
    chunks.template load_rows<true>(rows, columns, at);
  } else {
    chunks.template load_rows<false>(rows, columns, at);
  }
}
