// attn_mask: its elements on tiles of scores, and the map of what it lets through.
#pragma once

#include "loader.h"
#include "params.h"
#include "tile.h"

/// What scores read besides q and k. What a variant does not read is not bound.
struct ScoreBuffers {
  const device uchar* mask;  // as MASK has it
  const device float* alibi_slopes;
};

METAL_FUNC ScoreBuffers score_buffers(const device uchar* mask, const device float* alibi_slopes) {
  ScoreBuffers buffers;
  buffers.mask = mask;
  buffers.alibi_slopes = alibi_slopes;
  return buffers;
}

/// No mask.
struct NoMask {
  static constant constexpr const bool kAny = false;
  static constant constexpr const bool kAdds = false;
};

/// A mask of elements E: uchar for a boolean one, else the type of what is added. PAIRS: a key of
/// an even number and the next one lie side by side, aligned to both, and the number of keys is
/// even.
template <typename E, bool PAIRS>
struct Mask {
  static constant constexpr const bool kAny = true;
  static constant constexpr const bool kAdds = sizeof(E) > 1;  // not boolean
};

/// A score with its element of the mask. What a mask hides is -inf even where the score is NaN.
/// What is added may come with a `factor` of the score.
METAL_FUNC float masked(float s, uchar element, float) { return element ? s : -INFINITY; }

template <typename E>
METAL_FUNC float masked(float s, E element, float factor) {
  const float addend = float(element);
  return addend == -INFINITY ? -INFINITY : fma(s, factor, addend);
}

/// Where the elements of a batch entry's head begin.
METAL_FUNC int64_t mask_offset(Head head, constant MaskStrides& strides) {
  const int outer = head.batch / int(strides.inner_size);
  const int inner = head.batch % int(strides.inner_size);
  return outer * strides.outer + inner * strides.inner + head.head * strides.head;
}

/// The mask of tiles (queries, keys). Rows and keys beyond the ends have the last one's elements.
template <typename MASK, int ROWS, int COLS>
struct MaskTile {
  METAL_FUNC void start(Head, const device uchar*, int, LanePosition, constant AttentionParams&) {}
  METAL_FUNC void fetch(int) {}
  METAL_FUNC void add_to(thread Tile<float, ROWS, COLS>&, float) const {}
};

template <typename E, bool PAIRS, int ROWS, int COLS>
struct MaskTile<Mask<E, PAIRS>, ROWS, COLS> {
  const device E* rows[ROWS];  // this lane's
  int64_t col_stride;
  int col;  // this lane's
  int last;
  Tile<E, ROWS, COLS> elements;

  METAL_FUNC void start(Head head, const device uchar* mask, int row0, LanePosition at,
      constant AttentionParams& params) {
    const device E* data = reinterpret_cast<const device E*>(mask) + mask_offset(head, params.mask);
    ORCHARD_UNROLL
    for (int r = 0; r < ROWS; r++) {
      rows[r] = data + min(row0 + 8 * r + at.row, params.q_len - 1) * params.mask.row;
    }
    col_stride = params.mask.col;
    col = at.col;
    last = params.kv_len - (PAIRS ? 2 : 1);
  }

  /// Asks for the elements of the tile from key0 on.
  METAL_FUNC void fetch(int key0) {
    ORCHARD_UNROLL
    for (int c = 0; c < COLS; c++) {
      const int first = min(key0 + 8 * c + col, last);
      const int second = min(key0 + 8 * c + col + 1, last);
      ORCHARD_UNROLL
      for (int r = 0; r < ROWS; r++) {
        if (PAIRS) {
          elements.fragments[r][c] = *reinterpret_cast<const device vec<E, 2>*>(rows[r] + first);
        } else {
          elements.fragments[r][c] =
              vec<E, 2>(rows[r][first * col_stride], rows[r][second * col_stride]);
        }
      }
    }
  }

  METAL_FUNC void add_to(thread Tile<float, ROWS, COLS>& s, float factor) const {
    ORCHARD_UNROLL
    for (int r = 0; r < ROWS; r++) {
      ORCHARD_UNROLL
      for (int c = 0; c < COLS; c++) {
        const vec<E, 2> pair = elements.fragments[r][c];
        s.fragments[r][c] = float2(masked(s.fragments[r][c].x, pair.x, factor),
            masked(s.fragments[r][c].y, pair.y, factor));
      }
    }
  }
};

/// The mask of transposed tiles (8 keys, queries), the same way.
template <typename MASK, int COLS>
struct MaskTileTransposed {
  METAL_FUNC void start(Head, const device uchar*, int, LanePosition, constant AttentionParams&) {}
  METAL_FUNC void fetch(int) {}
  METAL_FUNC void add_to(thread Tile<float, 1, COLS>&, float) const {}
};

template <typename E, bool PAIRS, int COLS>
struct MaskTileTransposed<Mask<E, PAIRS>, COLS> {
  const device E* column;  // this lane's key
  int64_t row_stride;
  int row;  // this lane's first
  int last;
  Tile<E, 1, COLS> elements;

  METAL_FUNC void start(Head head, const device uchar* mask, int key0, LanePosition at,
      constant AttentionParams& params) {
    const int64_t key = min(key0 + at.row, params.kv_len - 1);
    column = reinterpret_cast<const device E*>(mask) + mask_offset(head, params.mask) +
             key * params.mask.col;
    row_stride = params.mask.row;
    row = at.col;
    last = params.q_len - 1;
  }

  /// Asks for the elements of the tile from row0 on.
  METAL_FUNC void fetch(int row0) {
    if (row0 + 8 * COLS <= last + 1) {  // all queries are there
      const device E* first = column + (row0 + row) * row_stride;
      ORCHARD_UNROLL
      for (int c = 0; c < COLS; c++) {
        elements.fragments[0][c] =
            vec<E, 2>(first[8 * c * row_stride], first[(8 * c + 1) * row_stride]);
      }
      return;
    }
    ORCHARD_UNROLL
    for (int c = 0; c < COLS; c++) {
      const int first = min(row0 + 8 * c + row, last);
      const int second = min(row0 + 8 * c + row + 1, last);
      elements.fragments[0][c] = vec<E, 2>(column[first * row_stride], column[second * row_stride]);
    }
  }

  METAL_FUNC void add_to(thread Tile<float, 1, COLS>& s, float factor) const {
    ORCHARD_UNROLL
    for (int c = 0; c < COLS; c++) {
      const vec<E, 2> pair = elements.fragments[0][c];
      s.fragments[0][c] = float2(
          masked(s.fragments[0][c].x, pair.x, factor), masked(s.fragments[0][c].y, pair.y, factor));
    }
  }
};

/// Which keys of a block some row of a block of queries sees: key i from its first on is bit i.
struct SeenKeys {
  uint bits;
  bool masked_pairs;  // some pair's score is not what it is without the mask

  template <int KEYS>
  METAL_FUNC bool every() const {
    return (~bits & low_bits<KEYS>()) == 0;
  }

  template <int KEYS>
  METAL_FUNC bool any() const {
    return (bits & low_bits<KEYS>()) != 0;
  }

  METAL_FUNC bool has(int i) const { return (bits >> i) & 1; }
  METAL_FUNC bool masked() const { return masked_pairs; }
  METAL_FUNC uint all_bits() const { return bits; }
};

/// What a mask lets through in blocks of ORCHARD_MAP_BLOCK queries and keys, as attention_mask_map
/// writes it: the keys that any of the queries sees, and whether every query sees every key. Blocks
/// of the kernels lie within one, or are made of whole ones.
template <typename MASK>
struct MaskMap {
  using Seen = EverySeen;

  METAL_FUNC void start(Head, const device uint2*, constant AttentionParams&) {}

  template <int ROWS>
  METAL_FUNC Seen keys(int, int) const {
    Seen seen;
    return seen;
  }

  METAL_FUNC bool passes(int, int) const { return true; }
};

template <typename E, bool PAIRS>
struct MaskMap<Mask<E, PAIRS>> {
  using Seen = SeenKeys;
  const device uint2* blocks;
  int64_t row_stride;
  int col_bits;  // all where keys have blocks of their own, else none
  int last_row;

  METAL_FUNC void start(Head head, const device uint2* map, constant AttentionParams& params) {
    blocks = map + mask_offset(head, params.mask_map);
    row_stride = params.mask_map.row;
    col_bits = -int(params.mask_map.col);
    last_row = (params.q_len - 1) / ORCHARD_MAP_BLOCK;
  }

  METAL_FUNC uint2 block(int row, int col) const {
    return blocks[min(row, last_row) * row_stride + (col & col_bits)];
  }

  /// The keys from key0 on that any of ROWS queries from row0 on sees.
  template <int ROWS>
  METAL_FUNC Seen keys(int row0, int key0) const {
    const int row = row0 / ORCHARD_MAP_BLOCK;
    const int col = key0 / ORCHARD_MAP_BLOCK;
    uint2 together = block(row, col);
    ORCHARD_UNROLL
    for (int i = 1; i < ROWS / ORCHARD_MAP_BLOCK; i++) {
      const uint2 next = block(row + i, col);
      together = uint2(together.x | next.x, together.y & next.y);
    }
    Seen seen;
    seen.bits = together.x >> (key0 % ORCHARD_MAP_BLOCK);
    seen.masked_pairs = Mask<E, PAIRS>::kAdds || together.y == 0;
    return seen;
  }

  /// Whether the block of the map that holds (row, key) lets any pair through.
  METAL_FUNC bool passes(int row, int key) const {
    return block(row / ORCHARD_MAP_BLOCK, key / ORCHARD_MAP_BLOCK).x != 0;
  }
};
