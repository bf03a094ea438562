// Which keys a query sees: the ends of the sequences and the window (causal is window_right = 0).
#pragma once

#include "params.h"
#include "tile.h"

/// Half-open range of rows, keys or blocks.
struct Range {
  int begin;
  int end;

  METAL_FUNC bool has(int index) const { return index >= begin && index < end; }
};

/// First rows, or first keys, of blocks for which some condition holds: `count` numbers from
/// `first` on. A block that begins elsewhere does not meet it.
struct Starts {
  int first;
  uint count;

  METAL_FUNC bool has(int begin) const { return uint(begin - first) < count; }

  METAL_FUNC static Starts between(int first, int last) {
    Starts starts;
    starts.first = first;
    starts.count = max(last - first + 1, 0);
    return starts;
  }
};

/// Row i sees key j if both exist and i + diagonal - left <= j <= i + diagonal + right.
struct Window {
  int q_len;
  int kv_len;
  int diagonal;
  int left;
  int right;

  METAL_FUNC bool sees(int row, int key) const {
    return row < q_len && key < kv_len && key >= row + diagonal - left &&
           key <= row + diagonal + right;
  }

  /// Whether any query row [row0, row0 + rows) sees any key [key0, key0 + keys).
  METAL_FUNC bool sees_any(int row0, int rows, int key0, int keys) const {
    const int row1 = min(row0 + rows, q_len) - 1;
    const int key1 = min(key0 + keys, kv_len) - 1;
    return row0 <= row1 && key0 <= key1 && key1 >= row0 + diagonal - left &&
           key0 <= row1 + diagonal + right;
  }

  /// The keys that some row sees. Consecutive rows leave no gap, so they are a range.
  METAL_FUNC Range seen_keys() const {
    return clipped(diagonal - left, q_len + diagonal + right, kv_len);
  }

  /// The rows that see a key.
  METAL_FUNC Range seeing_rows() const {
    return clipped(-diagonal - right, kv_len - diagonal + left, q_len);
  }

  /// Blocks of BK keys that any of the query rows [row0, row1) sees.
  METAL_FUNC Range key_blocks(int row0, int row1, int BK) const {
    return blocks(clipped(row0 + diagonal - left, row1 + diagonal + right, kv_len), BK);
  }

  /// Blocks of BQ queries that see any of the keys [key0, key1).
  METAL_FUNC Range query_blocks(int key0, int key1, int BQ) const {
    return blocks(clipped(key0 - diagonal - right, key1 - diagonal + left, q_len), BQ);
  }

  /// First keys of blocks of BK that every row [row0, row0 + rows) sees whole.
  METAL_FUNC Starts unmasked_keys(int row0, int rows, int BK) const {
    const int last = min(kv_len, row0 + diagonal + right + 1) - BK;
    return Starts::between(row0 + rows - 1 + diagonal - left, row0 + rows <= q_len ? last : -1);
  }

  /// First rows of blocks of BQ of which each sees every key [key0, key0 + keys).
  METAL_FUNC Starts unmasked_rows(int key0, int keys, int BQ) const {
    const int last = min(q_len, key0 - diagonal + left + 1) - BQ;
    return Starts::between(key0 + keys - 1 - diagonal - right, key0 + keys <= kv_len ? last : -1);
  }

  /// First rows of blocks of 8 of which any sees any of 8 keys from key0 on.
  METAL_FUNC Starts rows_of_tiles(int key0) const {
    const int first = key0 - diagonal - right;  // row that sees key0
    const int last = min(min(key0 + 7, kv_len - 1) - diagonal + left, q_len - 1);
    return Starts::between(max(first - 7, 0), key0 < kv_len && first < q_len ? last : -1);
  }

  METAL_FUNC static Range clipped(int begin, int end, int length) {
    Range range;
    range.begin = max(begin, 0);
    range.end = min(end, length);
    return range;
  }

  /// Blocks of so many that hold any of the range.
  METAL_FUNC static Range blocks(Range range, int block) {
    Range result;
    result.begin = range.begin / block;
    result.end = range.begin < range.end ? (range.end - 1) / block + 1 : result.begin;
    return result;
  }
};

METAL_FUNC Window window_of(constant AttentionParams& params) {
  Window window;
  window.q_len = params.q_len;
  window.kv_len = params.kv_len;
  window.diagonal = params.diagonal;
  window.left = params.window_left;
  window.right = params.window_right;
  return window;
}

/// Of blocks of BK keys, the ones that this dispatch takes.
METAL_FUNC Range of_dispatch(Range blocks, int BK, constant AttentionParams& params) {
  blocks.begin = max(blocks.begin, params.key_begin / BK);
  blocks.end = min(blocks.end, (params.key_end + BK - 1) / BK);
  return blocks;
}

/// What a query does not see becomes `hidden` in a tile of (queries, keys) from (row0, key0).
template <typename Keys>
struct Hide {
  Keys keys;
  int row0;
  int key0;
  float hidden;

  METAL_FUNC float2 operator()(float2 s, int r, int c) const {
    const int row = row0 + 8 * r;
    const int key = key0 + 8 * c;
    return float2(keys.sees(row, key) ? s.x : hidden, keys.sees(row, key + 1) ? s.y : hidden);
  }
};

template <typename Keys, int ROWS, int COLS>
METAL_FUNC void mask(thread Tile<float, ROWS, COLS>& s, Keys keys, int row0, int key0, float hidden,
    LanePosition at) {
  Hide<Keys> hide;
  hide.keys = keys;
  hide.row0 = row0 + at.row;
  hide.key0 = key0 + at.col;
  hide.hidden = hidden;
  map(s, hide);
}

/// Weights of what a query does not see become zero in a tile of (8 keys, queries) from
/// (key0, row0).
template <typename Keys>
struct HideTransposed {
  Keys keys;
  int key;
  int row0;

  METAL_FUNC float2 operator()(float2 p, int, int c) const {
    const int row = row0 + 8 * c;
    return float2(keys.sees(row, key) ? p.x : 0.0f, keys.sees(row + 1, key) ? p.y : 0.0f);
  }
};

template <typename Keys, int COLS>
METAL_FUNC void mask_transposed(
    thread Tile<float, 1, COLS>& p, Keys keys, int key0, int row0, LanePosition at) {
  HideTransposed<Keys> hide;
  hide.keys = keys;
  hide.key = key0 + at.row;
  hide.row0 = row0 + at.col;
  map(p, hide);
}
