// Sums of very many float32 terms, made in parts of kPartTerms that are added up: one long sum
// would lose more than unfused math does, which sums in blocks.
#pragma once

#include "tile.h"

constant int kPartTerms = 64;

/// A sum of numbers.
struct LongSum {
  float part;
  float earlier;
  int left;  // terms of this part that are not yet taken

  METAL_FUNC void start() {
    part = 0.0f;
    earlier = 0.0f;
    left = kPartTerms;
  }

  METAL_FUNC void take(float x) {
    part += x;
    left--;
    if (left == 0) {
      earlier += part;
      part = 0.0f;
      left = kPartTerms;
    }
  }

  METAL_FUNC float total() const { return earlier + part; }
};

/// A sum of tiles.
template <int ROWS, int COLS>
struct LongTileSum {
  Tile<float, ROWS, COLS> part;
  Tile<float, ROWS, COLS> earlier;
  int left;

  METAL_FUNC void start() {
    zero(part);
    zero(earlier);
    left = kPartTerms;
  }

  METAL_FUNC void take(thread const Tile<float, ROWS, COLS>& x) {
    add(part, x);
    left--;
    if (left == 0) {
      put_aside();
    }
  }

  METAL_FUNC void put_aside() {
    add(earlier, part);
    zero(part);
    left = kPartTerms;
  }
};
