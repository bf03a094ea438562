// How far a loop goes on where a mask hides blocks of its map (MaskMap): past all of a run at once.
// The lanes read ORCHARD_SIMD_WIDTH blocks of the map together, all simdgroups of a threadgroup the
// same ones.
#pragma once

#include "masks.h"
#include "params.h"

/// The first of the lanes whose block of the map lets any pair through, or their number.
METAL_FUNC int first_passing(bool passes, ushort lane) {
  return ctz(simd_or(passes ? 1u << lane : 0u));
}

/// From a block of BK keys that ROWS queries from row0 on do not see to the next one that is to be
/// looked at.
template <int ROWS, int BK>
METAL_FUNC int steps_past_keys(MaskMap<NoMask>, int, int, ushort, constant AttentionParams&) {
  return 1;
}

template <int ROWS, int BK, typename E, bool PAIRS>
METAL_FUNC int steps_past_keys(MaskMap<Mask<E, PAIRS>> map, int row0, int block, ushort lane,
    constant AttentionParams& params) {
  const int index = block * BK / ORCHARD_MAP_BLOCK;
  const int key0 = (index + lane) * ORCHARD_MAP_BLOCK;
  const bool passes = key0 < params.kv_len &&
                      map.template keys<ROWS>(row0, key0).template any<ORCHARD_MAP_BLOCK>();
  return max((index + first_passing(passes, lane)) * ORCHARD_MAP_BLOCK / BK - block, 1);
}

/// The same, from a block of BQ queries that do not see the keys of the map's block with key0.
template <int BQ>
METAL_FUNC int steps_past_queries(MaskMap<NoMask>, int, int, ushort) {
  return 1;
}

template <int BQ, typename E, bool PAIRS>
METAL_FUNC int steps_past_queries(
    MaskMap<Mask<E, PAIRS>> map, int key0, int block, ushort lane) {
  const int index = block * BQ / ORCHARD_MAP_BLOCK;
  const bool passes = map.passes((index + lane) * ORCHARD_MAP_BLOCK, key0);
  return max((index + first_passing(passes, lane)) * ORCHARD_MAP_BLOCK / BQ - block, 1);
}
