// The online softmax of FlashAttention: per row a running origin and a running sum.
#pragma once

#include "tile.h"

constant float kLn2Low = -1.904654e-9f;  // ln(2) - M_LN2_F

/// exp2 of scores; the fast variant's error is far below that of the operands' rounding.
METAL_FUNC float exp2_score(float x) { return fast::exp2(x); }

constant float kSlack = 8.0f;  // powers of two

/// Exponentials count from an origin of each row. It follows the row's largest score only when that
/// is more than kSlack above it, which is rare after the first keys: weights reach 2^kSlack, and
/// what was accumulated is seldom brought to a new origin.
template <int ROWS>
struct OnlineSoftmax {
  float origin[ROWS];  // in powers of two; before the first key below all scores
  float sum[ROWS];     // this lane's part of the row's sum of exp2(s - origin)

  METAL_FUNC void init() {
    ORCHARD_UNROLL
    for (int r = 0; r < ROWS; r++) {
      origin[r] = numeric_limits<float>::lowest();
      sum[r] = 0.0f;
    }
  }

  /// Takes a tile of scores in and leaves exp2(s - origin) in it; o is what such weights were
  /// multiplied into before.
  template <int COLS, int DEPTH>
  METAL_FUNC void update(thread Tile<float, ROWS, COLS>& s, thread Tile<float, ROWS, DEPTH>& o) {
    float top[ROWS];  // of this lane's scores
    bool above = false;
    ORCHARD_UNROLL
    for (int r = 0; r < ROWS; r++) {
      top[r] = max(s.fragments[r][0].x, s.fragments[r][0].y);
      ORCHARD_UNROLL
      for (int c = 1; c < COLS; c++) {
        top[r] = max(top[r], max(s.fragments[r][c].x, s.fragments[r][c].y));
      }
      above = above || top[r] - origin[r] > kSlack;
    }
    if (simd_any(above)) {
      raise(top, o);
    }
    ORCHARD_UNROLL
    for (int r = 0; r < ROWS; r++) {
      float part = 0.0f;
      ORCHARD_UNROLL
      for (int c = 0; c < COLS; c++) {
        s.fragments[r][c].x = exp2_score(s.fragments[r][c].x - origin[r]);
        s.fragments[r][c].y = exp2_score(s.fragments[r][c].y - origin[r]);
        part += s.fragments[r][c].x + s.fragments[r][c].y;
      }
      sum[r] += part;
    }
  }

  /// Moves origins that are more than kSlack below a row's scores to the largest of these.
  template <int DEPTH>
  METAL_FUNC void raise(thread const float* top, thread Tile<float, ROWS, DEPTH>& o) {
    float rescale[ROWS];
    ORCHARD_UNROLL
    for (int r = 0; r < ROWS; r++) {
      const float largest = row_max(top[r]);
      const bool moves = largest - origin[r] > kSlack;
      rescale[r] = moves ? exp2_score(origin[r] - largest) : 1.0f;
      origin[r] = moves ? largest : origin[r];
      sum[r] *= rescale[r];
    }
    mul_row(o, rescale);
  }

  /// Sum over the whole row.
  METAL_FUNC float total(int r) const { return row_sum(sum[r]); }

  /// Natural logarithm of the row's denominator; -inf for a row without a key.
  METAL_FUNC float lse(int r, float total) const {
    // ln(2) in two parts: the backward needs every bit of lse, whose error is the weights' relative
    // one.
    const float small = fma(origin[r], kLn2Low, log(total));
    return total == 0.0f ? -INFINITY : fma(origin[r], M_LN2_F, small);
  }
};

/// lse as the backward uses it: 0 for a row without a key, whose weights are all masked (or
/// exp(-inf)), so that 0 is what they stay.
METAL_FUNC float finite_lse(float lse) { return lse == -INFINITY ? 0.0f : lse; }

/// A weight from its score and its row's lse. The difference is taken before the change to powers
/// of two: near the largest scores it is exact.
METAL_FUNC float weight(float score, float lse) { return exp2_score((score - lse) * M_LOG2E_F); }

/// p = exp(s - lse) with a row-wise lse.
template <int ROWS, int COLS>
METAL_FUNC void weights(thread Tile<float, ROWS, COLS>& s, thread const float* lse) {
  ORCHARD_UNROLL
  for (int r = 0; r < ROWS; r++) {
    ORCHARD_UNROLL
    for (int c = 0; c < COLS; c++) {
      s.fragments[r][c].x = weight(s.fragments[r][c].x, lse[r]);
      s.fragments[r][c].y = weight(s.fragments[r][c].y, lse[r]);
    }
  }
}

/// lse or delta of the queries in a transposed tile's columns, from row0 on; beyond the rows the
/// last one's.
template <int COLS>
struct ColumnStats {
  float2 pairs[COLS];

  METAL_FUNC void load(const device float* stats, int row0, int length, LanePosition at) {
    ORCHARD_UNROLL
    for (int c = 0; c < COLS; c++) {
      const int row = row0 + 8 * c + at.col;
      pairs[c] = float2(stats[min(row, length - 1)], stats[min(row + 1, length - 1)]);
    }
  }
};

/// p = exp(s - lse) of a transposed tile, (keys, queries).
template <int COLS>
METAL_FUNC void weights_transposed(
    thread Tile<float, 1, COLS>& s, thread const ColumnStats<COLS>& lse) {
  ORCHARD_UNROLL
  for (int c = 0; c < COLS; c++) {
    s.fragments[0][c].x = weight(s.fragments[0][c].x, finite_lse(lse.pairs[c].x));
    s.fragments[0][c].y = weight(s.fragments[0][c].y, finite_lse(lse.pairs[c].y));
  }
}
