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

/// The place of 8 keys from key0 on, in blocks of 8 keys.
METAL_FUNC int dscore_place(int key0, constant AttentionParams& params) {
  return key0 / 8 % (params.ds_keys / 8);
}

/// The tiles of one query head.
struct DscoreTiles {
  device float* data;
  int query_blocks;  // of 8 rows
  LanePosition at;

  /// Elements between tiles of consecutive key blocks.
  METAL_FUNC int64_t row_of_tiles() const { return (int64_t)query_blocks * 64; }

  METAL_FUNC device float* tile(int place, int row0) const {
    return data + ((int64_t)place * query_blocks + row0 / 8) * 64;
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

/// head counts from the first one of the dispatch.
METAL_FUNC DscoreTiles dscore_tiles(
    device float* ds, int head, LanePosition at, constant AttentionParams& params) {
  DscoreTiles tiles;
  tiles.query_blocks = (params.q_len + 7) / 8;
  tiles.data = ds + head * (int64_t)(params.ds_keys / 8) * tiles.row_of_tiles();
  tiles.at = at;
  return tiles;
}

/// The tiles of queries from row0 on, by blocks of BK keys.
template <int BK>
struct DscoreBlocks {
  DscoreTiles tiles;
  int row0;
  const device float* tile;  // the block's first one

  /// Goes to a block. Returns the one behind it that has the first place, or the end before it.
  METAL_FUNC int start_lap(int block, int end, constant AttentionParams& params) {
    const int place = dscore_place(block * BK, params);
    tile = tiles.tile(place, row0);
    return min(end, block + (params.ds_keys / 8 - place + BK / 8 - 1) / (BK / 8));
  }

  /// So many blocks on, in this lap or beyond it.
  METAL_FUNC void advance(int steps) { tile += tiles.row_of_tiles() * (steps * (BK / 8)); }

  METAL_FUNC float2 load(int r, int c) const { return tiles.load(tile, r, c); }
};

/// Stores a row of tiles, dS^T of 8 keys. A tile without a pair that the window lets through has no
/// place, since its own may be that of other keys: `rows` are those where tiles may begin.
template <int COLS, typename Ranges>
METAL_FUNC void store_dscore(DscoreTiles tiles, int place, Starts rows, thread const Ranges& ranges,
    int key0, int row0, thread const Tile<float, 1, COLS>& ds, constant AttentionParams& params) {
  device float* tile = tiles.tile(place, row0);
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
