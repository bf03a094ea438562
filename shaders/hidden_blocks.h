// How far a loop goes on where a mask hides blocks of its map (MaskMap): past a run of them at
// once. The lanes look at ORCHARD_LOOK blocks of the map together, all simdgroups of a threadgroup
// at the same ones.
#pragma once

#include "masks.h"
#include "params.h"

/// Blocks of the map that a lane looks at in one turn. Their loads do not wait for each other,
/// while those of the next turn wait for what this one finds.
#define ORCHARD_LANE_LOOK 4
#define ORCHARD_LOOK ((ORCHARD_LANE_LOOK) * (ORCHARD_SIMD_WIDTH))

/// Steps from a loop's block, of BLOCK keys or queries, to the next one that is not known to be
/// hidden. Each lane has looked at some blocks of the map. `passing` is the first of them that lets
/// a pair through, counted from the one that holds the loop's block.
template <int BLOCK>
METAL_FUNC int steps_past(int block, int passing) {
  const int kBlocks = ORCHARD_MAP_BLOCK / BLOCK;  // of one of the map
  return max(simd_min(passing) * kBlocks - block % kBlocks, 1);
}

/// From a block of BK keys, of which ROWS queries from row0 on see none.
template <int ROWS, int BK>
METAL_FUNC int steps_past_keys(int, MaskMap<NoMask>, int, constant AttentionParams&, ushort) {
  return 1;
}

template <int ROWS, int BK, typename E, bool PAIRS>
METAL_FUNC int steps_past_keys(int block, MaskMap<Mask<E, PAIRS>> map, int row0,
    constant AttentionParams& params, ushort lane) {
  const int first = block * BK / ORCHARD_MAP_BLOCK;
  const int last = (params.kv_len - 1) / ORCHARD_MAP_BLOCK;
  int passing = ORCHARD_LOOK;
  ORCHARD_UNROLL
  for (int i = ORCHARD_LANE_LOOK - 1; i >= 0; i--) {
    const int ahead = i * ORCHARD_SIMD_WIDTH + lane;
    // Where the last block passes, the lane that has it in its place is before those beyond it.
    const int key0 = min(first + ahead, last) * ORCHARD_MAP_BLOCK;
    const bool passes = map.template keys<ROWS>(row0, key0).template any<ORCHARD_MAP_BLOCK>();
    passing = passes ? ahead : passing;
  }
  return steps_past<BK>(block, passing);
}

/// From a block of BQ queries, which see none of the keys that key0's block of the map has.
template <int BQ>
METAL_FUNC int steps_past_queries(int, MaskMap<NoMask>, int, ushort) {
  return 1;
}

template <int BQ, typename E, bool PAIRS>
METAL_FUNC int steps_past_queries(int block, MaskMap<Mask<E, PAIRS>> map, int key0, ushort lane) {
  const int first = block * BQ / ORCHARD_MAP_BLOCK;
  int passing = ORCHARD_LOOK;
  ORCHARD_UNROLL
  for (int i = ORCHARD_LANE_LOOK - 1; i >= 0; i--) {
    const int ahead = i * ORCHARD_SIMD_WIDTH + lane;
    passing = map.passes((first + ahead) * ORCHARD_MAP_BLOCK, key0) ? ahead : passing;
  }
  return steps_past<BQ>(block, passing);
}
