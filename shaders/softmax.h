// The online softmax of FlashAttention: per row a running origin and a running sum.
#pragma once

#include "tile.h"

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

  /// What the backward needs of a row: the origin of its exponentials, and the logarithm of their
  /// sum. They stay apart, since one number would lose the logarithm beside a large origin. A row
  /// without a key has the lowest origin and log2(0), which is -inf.
  METAL_FUNC float2 row_stats(int r, float total) const { return float2(origin[r], log2(total)); }
};

/// Scores of -inf alone leave a sum of zero, whose logarithm is -inf. Their weights shall be
/// exp2(-inf), not NaN.
METAL_FUNC float finite_log_sum(float log_sum) {
  return max(log_sum, numeric_limits<float>::lowest());
}

/// Two weights from their scores and their rows' statistics. The first difference is the number
/// that the forward has exponentiated.
METAL_FUNC float2 weights(float2 scores, float2 origin, float2 log_sum) {
  const float2 exponents = (scores - origin) - log_sum;
  return float2(exp2_score(exponents.x), exp2_score(exponents.y));
}

/// Makes weights of scores: statistics of this lane's row of each row of fragments.
template <int ROWS>
struct RowStats {
  float origin[ROWS];
  float log_sum[ROWS];

  METAL_FUNC void set(int r, float2 stats) {
    origin[r] = stats.x;
    log_sum[r] = finite_log_sum(stats.y);
  }

  METAL_FUNC float2 operator()(float2 s, int r, int) const {
    return weights(s, float2(origin[r]), float2(log_sum[r]));
  }
};

/// One number for each of the queries in a transposed tile's columns, from row0 on. Columns beyond
/// the rows take the last row's.
template <int COLS>
struct ColumnValues {
  float2 pairs[COLS];

  METAL_FUNC void load(const device float* values, int row0, int length, LanePosition at) {
    ORCHARD_UNROLL
    for (int c = 0; c < COLS; c++) {
      const int row = row0 + 8 * c + at.col;
      pairs[c] = float2(values[min(row, length - 1)], values[min(row + 1, length - 1)]);
    }
  }
};

/// Makes weights of scores in a transposed tile: statistics of its queries, as ColumnValues. load()
/// computes nothing of them, so that it need not wait for device memory.
template <int COLS>
struct ColumnStats {
  float2 origin[COLS];
  float2 log_sum[COLS];

  METAL_FUNC void load(const device float2* stats, int row0, int length, LanePosition at) {
    ORCHARD_UNROLL
    for (int c = 0; c < COLS; c++) {
      const int row = row0 + 8 * c + at.col;
      const float2 first = stats[min(row, length - 1)];
      const float2 second = stats[min(row + 1, length - 1)];
      origin[c] = float2(first.x, second.x);
      log_sum[c] = float2(first.y, second.y);
    }
  }

  METAL_FUNC float2 operator()(float2 s, int, int c) const {
    const float2 finite = float2(finite_log_sum(log_sum[c].x), finite_log_sum(log_sum[c].y));
    return weights(s, origin[c], finite);
  }
};
