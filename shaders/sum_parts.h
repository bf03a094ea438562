// dk and dv are sums over all queries of a group's heads. Where T is float, one long sum would lose
// more than unfused math does, which sums in blocks. So it is made in parts: behind each of them
// the sum in registers is added to the output's rows in device memory, and begins again from zero.
// A half type's rounding hides the loss, and its sums stay whole. Where a group's heads take turns
// (dkv_parts.h), the rows have the sums of earlier turns from the start.
#pragma once

#include "loader.h"

constant int kPartQueries = 1024;

/// Blocks of BQ queries, of all heads of the group, in parts.
template <typename T, int BQ, bool VEC>
struct SumParts {
  static constant constexpr const bool kDivided = sizeof(T) == 4;
  static_assert(kPartQueries % BQ == 0, "a part ends with a block");

  int left;     // blocks of this part that are not yet taken
  bool stored;  // an earlier part

  METAL_FUNC void start(bool had_turns) {
    left = kPartQueries / BQ;
    stored = had_turns;
  }

  /// Takes the blocks from `block` on that belong to this part; says where they end.
  METAL_FUNC int take(int block, int end) {
    const int last = kDivided ? min(block + left, end) : end;
    left -= last - block;
    return last;
  }

  /// Whether all of this part's blocks have been taken, so that its sums are to be stored.
  METAL_FUNC bool ended() const { return kDivided && left == 0; }

  METAL_FUNC void start_next() {
    left = kPartQueries / BQ;
    stored = true;
  }

  /// Stores x, the sum of this part, with what the earlier ones have left there. The output is read
  /// only where this thread, or an earlier dispatch, has stored to it.
  template <typename O, int COLS>
  METAL_FUNC void store(
      thread Tile<float, 1, COLS>& x, OutputRows<O> to, int row0, LanePosition at) const {
    if (stored) {
      add_stored_rows<VEC>(x, to, row0, at);
    }
    store_rows<VEC>(to, x, row0, at);
  }

  /// The same, for x to begin again.
  template <typename O, int COLS>
  METAL_FUNC void put_aside(
      thread Tile<float, 1, COLS>& x, OutputRows<O> to, int row0, LanePosition at) const {
    store(x, to, row0, at);
    zero(x);
  }
};
