// What changes a score: forward on a tile, and its derivative.
#pragma once

#include "params.h"
#include "tile.h"

/// s = scale * (q k^T), or scale * log2(e) * (q k^T) where exponentials are powers of two.
template <int ROWS, int COLS>
METAL_FUNC void score(thread Tile<float, ROWS, COLS>& s, float scale) {
  ORCHARD_UNROLL
  for (int r = 0; r < ROWS; r++) {
    ORCHARD_UNROLL
    for (int c = 0; c < COLS; c++) {
      s.fragments[r][c] *= scale;
    }
  }
}

/// d(score) / d(q k^T): a common factor, so it goes onto dq and dk when they are stored.
METAL_FUNC float score_derivative(constant AttentionParams& params) { return params.scale; }
