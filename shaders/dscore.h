// dS, the gradient of the scores, on its way from the key's side of the backward to the query's:
// float tiles of 8 keys x 8 queries, each contiguous. A query head has rows of tiles, a row for 8
// keys and in it a tile for each 8 queries: as many rows as params.ds_keys has room for. Where the
// head has more keys, their rows lie where others leave room (dscore_row), in one of two ways.
//
// A ring: a row has the place of the one so many rows ahead. That one is never missed. Either no 8
// queries whose dS is stored see keys of both, as a window and key_ranges have it
// (RangeHull::fits), or dispatches take turns, and dq is summed in between.
//
// Folded: under a causal mask late keys are seen by few queries, and by none of the early ones. So
// the last row lies before the first one, the one ahead of it before the second one, and so on:
//
//   row of keys    tiles of queries         row of the buffer
//        0             0 1 2 3                     0            3 0 1 2 3
//        1               1 2 3                     1            2 3 1 2 3
//        2                 2 3
//        3                   3
#pragma once

#include "keys.h"
#include "params.h"
#include "softmax.h"
#include "tile.h"

/// The row of 8 keys, in tiles of their query head.
struct DscoreRow {
  int64_t first;  // the tile of the first 8 queries, though these may not see the keys
  int64_t next;   // from a tile to that of the next 8 keys
  int left;       // rows from this one on of which that is so
};

/// The row of 8 keys from key0 on.
METAL_FUNC DscoreRow dscore_row(int key0, constant AttentionParams& params) {
  const int rows = params.ds_keys / 8;
  const int index = key0 / 8;
  DscoreRow row;
  if (index >= rows && params.ds_folded > 0) {
    row.next = -params.ds_row - 1;
    row.first = params.ds_folded + index * row.next;
    row.left = ORCHARD_MAX_LENGTH;
  } else {
    row.next = params.ds_row;
    row.first = index % rows * row.next + params.ds_row - (params.q_len + 7) / 8;
    row.left = rows - index % rows;
  }
  return row;
}

/// The tiles of one query head.
struct DscoreTiles {
  device float* data;
  LanePosition at;

  METAL_FUNC device float* tile(int64_t first, int row0) const {
    return data + (first + row0 / 8) * 64;
  }

  /// One fragment of dS^T (keys, queries) to a tile, as the key's side holds it.
  METAL_FUNC void store(device float* tile, float2 transposed) const {
    *reinterpret_cast<device float2*>(tile + at.row * 8 + at.col) = transposed;
  }

  /// Fragment (r, c) of dS (queries, keys) from a tile on, as the query's side multiplies it.
  /// `next`: elements from it to that of the next 8 keys.
  METAL_FUNC float2 load(const device float* tile, int64_t next, int r, int c) const {
    const device float* p = tile + c * next + r * 64 + at.col * 8 + at.row;
    return float2(p[0], p[8]);
  }
};

/// head counts from the first one of the dispatch.
METAL_FUNC DscoreTiles dscore_tiles(
    device float* ds, int head, LanePosition at, constant AttentionParams& params) {
  DscoreTiles tiles;
  tiles.data = ds + head * (int64_t)(params.ds_keys / 8) * params.ds_row * 64;
  tiles.at = at;
  return tiles;
}

/// The tiles of queries from row0 on, by blocks of BK keys.
template <int BK>
struct DscoreBlocks {
  DscoreTiles tiles;
  int row0;
  const device float* tile;  // the block's first one
  int64_t next;              // elements from it to that of the next 8 keys

  /// Goes to a block. Returns the end of the blocks whose tiles lie as far from each other.
  METAL_FUNC int start_lap(int block, int end, constant AttentionParams& params) {
    const DscoreRow row = dscore_row(block * BK, params);
    tile = tiles.tile(row.first, row0);
    next = row.next * 64;
    return min(end, block + (row.left + BK / 8 - 1) / (BK / 8));
  }

  /// So many blocks on, in this lap or beyond it.
  METAL_FUNC void advance(int steps) { tile += next * (steps * (BK / 8)); }

  METAL_FUNC float2 load(int r, int c) const { return tiles.load(tile, next, r, c); }
};

/// Stores tiles of the row that begins with the tile `first`: dS^T of 8 keys and the queries from
/// row0 on. Where the window hides all pairs of a tile, other keys' may lie there, and nothing is
/// stored: tiles of `rows` alone are.
template <int COLS, typename Ranges>
METAL_FUNC void store_dscore(DscoreTiles tiles, int64_t first, Starts rows,
    thread const Ranges& ranges, int key0, int row0, thread const Tile<float, 1, COLS>& ds,
    constant AttentionParams& params) {
  device float* tile = tiles.tile(first, row0);
  ORCHARD_UNROLL
  for (int c = 0; c < COLS; c++) {
    const int row = row0 + 8 * c;
    if (rows.has(row) && ranges.stores(row, key0, params)) {
      tiles.store(tile + 64 * c, ds.fragments[0][c]);
    }
  }
}

/// A weight, or what is left of it, times x. Where a mask HIDES pairs, their x may be NaN.
template <bool HIDES>
METAL_FUNC float2 weighted(float2 p, float2 x) {
  const float2 product = p * x;
  if (HIDES) {
    return float2(p.x == 0.0f ? 0.0f : product.x, p.y == 0.0f ? 0.0f : product.y);
  }
  return product;
}

/// P *= the derivative of softcap.
template <bool HIDES, int ROWS, int COLS>
METAL_FUNC void times_derivative(
    thread Tile<float, ROWS, COLS>& p, thread const Tile<float, ROWS, COLS>& derivatives) {
  ORCHARD_UNROLL
  for (int r = 0; r < ROWS; r++) {
    ORCHARD_UNROLL
    for (int c = 0; c < COLS; c++) {
      p.fragments[r][c] = weighted<HIDES>(p.fragments[r][c], derivatives.fragments[r][c]);
    }
  }
}

/// dS = P (dP - delta) with a row-wise delta.
template <bool HIDES, int ROWS, int COLS>
METAL_FUNC void dscore(thread Tile<float, ROWS, COLS>& ds, thread const Tile<float, ROWS, COLS>& p,
    thread const Tile<float, ROWS, COLS>& dp, thread const float* delta) {
  ORCHARD_UNROLL
  for (int r = 0; r < ROWS; r++) {
    ORCHARD_UNROLL
    for (int c = 0; c < COLS; c++) {
      ds.fragments[r][c] = weighted<HIDES>(p.fragments[r][c], dp.fragments[r][c] - delta[r]);
    }
  }
}

/// dS^T = P^T (dP^T - delta); ds holds dP^T before.
template <bool HIDES, int COLS>
METAL_FUNC void dscore_transposed(thread Tile<float, 1, COLS>& ds,
    thread const Tile<float, 1, COLS>& p, thread const ColumnValues<COLS>& delta) {
  ORCHARD_UNROLL
  for (int c = 0; c < COLS; c++) {
    ds.fragments[0][c] = weighted<HIDES>(p.fragments[0][c], ds.fragments[0][c] - delta.pairs[c]);
  }
}
