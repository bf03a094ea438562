// The buffer for dS that lets a backward form the gradient of the scores once instead of twice.
#pragma once

#include "tiles.h"

namespace orchard {

/// Where dS of a query head lies: rows of tiles of 8 keys x 8 queries (shaders/dscore.h).
struct DscoreRows {
  int64_t keys;    // of the buffer's rows, 8 in each
  int64_t tiles;   // of a row
  int64_t folded;  // AttentionParams::ds_folded

  int64_t elements() const { return keys / 8 * tiles * 64; }
};

/// How a backward that stores dS is divided: so many of the batch * num_heads query heads, and so
/// many keys, share the buffer at once. They are all heads of one or more groups, or, where dS of a
/// whole group does not fit, an equal part of one group's.
struct DsDivision {
  int64_t heads;
  int64_t keys;
  int64_t tile_elements;  // of the buffer, before the sums of dq; 0: dS is not stored
  int64_t sum_elements;   // behind them
  DscoreRows rows;
};

/// Divisions that fit into Problem::scratch_bytes, alone and beside the sums of a divided group
/// (dkv_parts.h); none where storing dS does not pay on any GPU. `bd` is the padded head dim.
std::vector<DsDivision> ds_divisions(const Problem& problem, int bd);

/// The one of them that takes the least time; the undivided whole, with no buffer, where computing
/// dS twice takes less, or none fits.
DsDivision divide_ds(const Problem& problem, const TileRow& row, int bd);

}  // namespace orchard
