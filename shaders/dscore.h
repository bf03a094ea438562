// dS, the gradient of the scores, on its way from the key's side of the backward to the query's:
// float tiles of 8 keys x 8 queries, contiguous, ordered by (query head, key block, query block).
#pragma once

#include "params.h"
#include "tile.h"

/// The tiles of one query head.
struct DscoreTiles {
  device float* data;
  int query_blocks;  // of 8 rows
  LanePosition at;

  METAL_FUNC device float* tile(int key0, int row0) const {
    return data + ((int64_t)(key0 / 8) * query_blocks + row0 / 8) * 64;
  }

  /// One fragment of dS^T (keys, queries) to a tile, as the key's side holds it.
  METAL_FUNC void store(device float* tile, float2 transposed) const {
    *reinterpret_cast<device float2*>(tile + at.row * 8 + at.col) = transposed;
  }

  /// Fragment (r, c) of dS (queries, keys) from a tile on, as the query's side multiplies it.
  METAL_FUNC float2 load(const device float* tile, int r, int c) const {
    const device float* p = tile + ((int64_t)c * query_blocks + r) * 64 + at.col * 8 + at.row;
    return float2(p[0], p[8]);
  }
};

/// head counts from the first one of the dispatch.
METAL_FUNC DscoreTiles dscore_tiles(
    device float* ds, int head, LanePosition at, constant AttentionParams& params) {
  DscoreTiles tiles;
  tiles.query_blocks = (params.q_len + 7) / 8;
  const int64_t key_blocks = (params.kv_len + 7) / 8;
  tiles.data = ds + head * key_blocks * tiles.query_blocks * 64;
  tiles.at = at;
  return tiles;
}
