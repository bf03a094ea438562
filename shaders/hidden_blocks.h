// How far a loop goes on where a mask hides blocks of its map (MaskMap): past a run of them at
// once. The lanes look at ORCHARD_SIMD_WIDTH blocks of the map together, all simdgroups of a
// threadgroup at the same ones.
#pragma once

#include "masks.h"
#include "params.h"

/// Steps from a loop's block, of BLOCK keys or queries, to the next one that is not known to be
/// hidden. `passes`: whether the lane-th block of the map, from the one that holds it on, lets any
/// pair through.
template <int BLOCK>
METAL_FUNC int steps_past(int block, bool passes, ushort lane) {
  const int kBlocks = ORCHARD_MAP_BLOCK / BLOCK;  // of one of the map
  const int hidden = ctz(simd_or(passes ? 1u << lane : 0u));
  return max(hidden * kBlocks - block % kBlocks, 1);
}

/// From a block of BK keys, of which ROWS queries from row0 on see none.
template <int ROWS, int BK>
METAL_FUNC int steps_past_keys(int, MaskMap<NoMask>, int, constant AttentionParams&, ushort) {
  return 1;
}

template <int ROWS, int BK, typename E, bool PAIRS>
METAL_FUNC int steps_past_keys(int block, MaskMap<Mask<E, PAIRS>> map, int row0,
    constant AttentionParams& params, ushort lane) {
  const int key0 = (block * BK / ORCHARD_MAP_BLOCK + lane) * ORCHARD_MAP_BLOCK;
  const bool exists = key0 < params.kv_len;
  const bool passes =
      exists && map.template keys<ROWS>(row0, key0).template any<ORCHARD_MAP_BLOCK>();
  return steps_past<BK>(block, passes, lane);
}

/// From a block of BQ queries, which see none of the keys that key0's block of the map has.
template <int BQ>
METAL_FUNC int steps_past_queries(int, MaskMap<NoMask>, int, ushort) {
  return 1;
}

template <int BQ, typename E, bool PAIRS>
METAL_FUNC int steps_past_queries(int block, MaskMap<Mask<E, PAIRS>> map, int key0, ushort lane) {
  const int row0 = (block * BQ / ORCHARD_MAP_BLOCK + lane) * ORCHARD_MAP_BLOCK;
  return steps_past<BQ>(block, map.passes(row0, key0), lane);
}
