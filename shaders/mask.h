// Which keys a query sees: the ends of the sequences and the window (causal is window_right = 0).
#pragma once

#include "params.h"
#include "tile.h"

/// Half-open range of blocks.
struct BlockRange {
  int begin;
  int end;
};

METAL_FUNC BlockRange block_range(int first, int last, int length, int block) {
  const int from = max(first, 0);
  const int to = min(last, length - 1);
  BlockRange range;
  range.begin = from / block;
  range.end = from <= to ? to / block + 1 : range.begin;
  return range;
}

/// Blocks of BK keys that any of the query rows [row0, row1) sees.
METAL_FUNC BlockRange key_blocks(int row0, int row1, int BK, constant AttentionParams& params) {
  return block_range(row0 + params.diagonal - params.window_left,
      row1 - 1 + params.diagonal + params.window_right, params.kv_len, BK);
}

/// Blocks of BQ queries that see any of the keys [key0, key1).
METAL_FUNC BlockRange query_blocks(int key0, int key1, int BQ, constant AttentionParams& params) {
  return block_range(key0 - params.diagonal - params.window_right,
      key1 - 1 - params.diagonal + params.window_left, params.q_len, BQ);
}

/// Those of the blocks of BK that are blocks of this dispatch's keys.
METAL_FUNC BlockRange of_dispatch(BlockRange blocks, int BK, constant AttentionParams& params) {
  blocks.begin = max(blocks.begin, params.key_begin / BK);
  blocks.end = min(blocks.end, (params.key_end + BK - 1) / BK);
  return blocks;
}

METAL_FUNC bool sees(int row, int key, constant AttentionParams& params) {
  return row < params.q_len && key < params.kv_len &&
         key >= row + params.diagonal - params.window_left &&
         key <= row + params.diagonal + params.window_right;
}

/// Where a simdgroup's blocks may begin, on the axis of its loop, for all pairs in them to be seen.
struct Unmasked {
  int first;
  int last;

  METAL_FUNC bool has(int begin) const { return begin >= first && begin <= last; }
};

/// First keys of blocks of BK that every row [row0, row0 + rows) sees whole.
METAL_FUNC Unmasked unmasked_keys(int row0, int rows, int BK, constant AttentionParams& params) {
  Unmasked range;
  range.first = row0 + rows - 1 + params.diagonal - params.window_left;
  range.last = min(params.kv_len, row0 + params.diagonal + params.window_right + 1) - BK;
  range.last = row0 + rows <= params.q_len ? range.last : -1;
  return range;
}

/// First rows of blocks of BQ of which each sees every key [key0, key0 + keys).
METAL_FUNC Unmasked unmasked_rows(int key0, int keys, int BQ, constant AttentionParams& params) {
  Unmasked range;
  range.first = key0 + keys - 1 - params.diagonal - params.window_right;
  range.last = min(params.q_len, key0 - params.diagonal + params.window_left + 1) - BQ;
  range.last = key0 + keys <= params.kv_len ? range.last : -1;
  return range;
}

/// Whether any query row [row0, row0 + rows) sees any key [key0, key0 + keys).
METAL_FUNC bool sees_any(int row0, int rows, int key0, int keys, constant AttentionParams& params) {
  const int row1 = min(row0 + rows, params.q_len) - 1;
  const int key1 = min(key0 + keys, params.kv_len) - 1;
  return row0 <= row1 && key0 <= key1 && key1 >= row0 + params.diagonal - params.window_left &&
         key0 <= row1 + params.diagonal + params.window_right;
}

/// Sets what a query does not see to `hidden`. s is (queries, keys) from (row0, key0).
template <int ROWS, int COLS>
METAL_FUNC void mask_tile(thread Tile<float, ROWS, COLS>& s, int row0, int key0, float hidden,
    LanePosition at, constant AttentionParams& params) {
  ORCHARD_UNROLL
  for (int r = 0; r < ROWS; r++) {
    const int row = row0 + 8 * r + at.row;
    ORCHARD_UNROLL
    for (int c = 0; c < COLS; c++) {
      const int key = key0 + 8 * c + at.col;
      s.fragments[r][c].x = sees(row, key, params) ? s.fragments[r][c].x : hidden;
      s.fragments[r][c].y = sees(row, key + 1, params) ? s.fragments[r][c].y : hidden;
    }
  }
}

/// Zeroes the weights of what a query does not see. p is (8 keys, queries) from (key0, row0).
template <int COLS>
METAL_FUNC void mask_transposed(thread Tile<float, 1, COLS>& p, int key0, int row0, LanePosition at,
    constant AttentionParams& params) {
  const int key = key0 + at.row;
  ORCHARD_UNROLL
  for (int c = 0; c < COLS; c++) {
    const int row = row0 + 8 * c + at.col;
    p.fragments[0][c].x = sees(row, key, params) ? p.fragments[0][c].x : 0.0f;
    p.fragments[0][c].y = sees(row + 1, key, params) ? p.fragments[0][c].y : 0.0f;
  }
}
