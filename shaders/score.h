// What makes a score of a product q k^T, and its derivative.
#pragma once

#include "params.h"
#include "tile.h"

/// s = scale * log2(e) * (q k^T): exponentials are powers of two. The forward and the backward
/// take the very same scores.
template <int ROWS, int COLS>
METAL_FUNC void score(thread Tile<float, ROWS, COLS>& s, constant AttentionParams& params) {
  scale(s, params.scale_log2);
}

/// d(score) / d(q k^T), in the units of natural exponentials: a common factor, so it goes onto dq
/// and dk when they are stored.
METAL_FUNC float score_derivative(constant AttentionParams& params) { return params.scale; }
