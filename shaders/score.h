// What changes a score: forward on a tile, and its derivative.
#pragma once

#include "params.h"
#include "tile.h"

/// s = scale * log2(e) * (q k^T): from here on exponentials are powers of two.
template <int ROWS, int COLS>
METAL_FUNC void score(thread Tile<float, ROWS, COLS>& s, constant AttentionParams& params) {
  ORCHARD_UNROLL
  for (int r = 0; r < ROWS; r++) {
    ORCHARD_UNROLL
    for (int c = 0; c < COLS; c++) {
      s.fragments[r][c] *= params.scale_log2;
    }
  }
}

/// d(score) / d(q k^T): a common factor, so it goes onto dq and dk when they are stored.
METAL_FUNC float score_derivative(constant AttentionParams& params) { return params.scale; }
