// dk and dv are sums over all queries of a group's heads. Where T is float, one long sum would lose
// more than unfused math does, which sums in blocks. So it is made in parts: behind each of them
// the sum in registers is added to the output's rows in device memory, and begins again from zero.
// A half type's rounding hides the loss, and its sums stay whole.
#pragma once

#include "loader.h"

constant int kPartQueries = 1024;

/// Counts blocks of BQ queries, of all heads of the group.
template <typename T, int BQ, bool VEC>
struct SumParts {
  static constant constexpr const bool kDivided = sizeof(T) == 4;
  static_assert(kPartQueries % BQ == 0, "a part ends with a block");

  int queries;  // of this part, up to now
  bool stored;  // an earlier part

  METAL_FUNC void start() {
    queries = 0;
    stored = false;
  }

  /// Counts one block; says whether it is the last one of a part, whose sums are stored then.
  METAL_FUNC bool ends_part() {
    queries += BQ;
    return kDivided && queries == kPartQueries;
  }

  METAL_FUNC void start_next() {
    queries = 0;
    stored = true;
  }

  /// Adds the earlier parts to x. The output is read only where this thread has stored to it.
  template <int COLS>
  METAL_FUNC void add_earlier(
      thread Tile<float, 1, COLS>& x, OutputRows<T> from, int row0, LanePosition at) const {
    if (kDivided && stored) {
      add_stored_rows<VEC>(x, from, row0, at);
    }
  }

  /// Moves x, the sum of this part, to the output.
  template <int COLS>
  METAL_FUNC void put_aside(
      thread Tile<float, 1, COLS>& x, OutputRows<T> to, int row0, LanePosition at) const {
    add_earlier(x, to, row0, at);
    store_rows<VEC>(to, x, row0, at);
    zero(x);
  }
};
