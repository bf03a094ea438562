// dS, the gradient of the scores, on its way from the key's side of the backward to the query's:
// float tiles of 8 keys x 8 queries, contiguous, ordered by (query head, key block, query block).
// The buffer has params.ds_keys keys for each 8 queries. A key has the place of the one so many
// keys ahead, which is never missed: either no 8 queries whose dS is stored see both, as a window
// and key_ranges have it (RangeHull::fits), or dispatches take turns, and dq is summed in between.
#pragma once

#include "keys.h"
#include "params.h"
#include "softmax.h"
#include "tile.h"

/// The tiles of one query head.
struct DscoreTiles {
  device float* data;
  int query_blocks;  // of 8 rows
  int key_blocks;    // of 8 keys, after which places repeat
  LanePosition at;

  /// Elements between tiles of consecutive key blocks.
  METAL_FUNC int64_t row_of_tiles() const { return (int64_t)query_blocks * 64; }

  METAL_FUNC device float* tile(int key0, int row0) const {
    const int key_block = key0 / 8 % key_blocks;
    return data + ((int64_t)key_block * query_blocks + row0 / 8) * 64;
  }

  /// From the tile of a key that begins a block of BK, of queries from row0 on, to the next
  /// block's.
  template <int BK>
  METAL_FUNC const device float* next(const device float* tile_of_key, int row0) const {
    const int64_t all = key_blocks * row_of_tiles();
    const device float* behind = tile_of_key + BK / 8 * row_of_tiles();
    return behind < data + all ? behind : behind - all;
  }

  /// One fragment of dS^T (keys, queries) to a tile, as the key's side holds it.
  METAL_FUNC void store(device float* tile, float2 transposed) const {
    *reinterpret_cast<device float2*>(tile + at.row * 8 + at.col) = transposed;
  }

  /// Fragment (r, c) of dS (queries, keys) from a tile on, as the query's side multiplies it.
  METAL_FUNC float2 load(const device float* tile, int r, int c) const {
    const device float* p = tile + c * row_of_tiles() + r * 64 + at.col * 8 + at.row;
    return float2(p[0], p[8]);
  }
};

/// Stores a row of tiles, dS^T of 8 keys. Tiles without a pair that the window lets through have no
/// place: theirs may be that of other keys. `whole`: whether it lets all pairs through.
template <int COLS, typename Ranges>
METAL_FUNC void store_dscore(DscoreTiles tiles, Window window, thread const Ranges& ranges,
    int key0, int row0, bool whole, thread const Tile<float, 1, COLS>& ds,
    constant AttentionParams& params) {
  device float* tile = tiles.tile(key0, row0);
  ORCHARD_UNROLL
  for (int c = 0; c < COLS; c++) {
    const int row = row0 + 8 * c;
    if ((whole || window.sees_any(row, 8, key0, 8)) && ranges.stores(row, key0, params)) {
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

/// head counts from the first one of the dispatch.
METAL_FUNC DscoreTiles dscore_tiles(
    device float* ds, int head, LanePosition at, constant AttentionParams& params) {
  DscoreTiles tiles;
  tiles.query_blocks = (params.q_len + 7) / 8;
  tiles.key_blocks = params.ds_keys / 8;
  tiles.data = ds + head * (int64_t)tiles.key_blocks * tiles.row_of_tiles();
  tiles.at = at;
  return tiles;
}
