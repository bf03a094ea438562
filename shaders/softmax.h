// The online softmax of FlashAttention: per row a running origin and a running sum.
#pragma once

#include "loader.h"
#include "tile.h"

/// Exponentials of scores in powers of two, or natural ones. exp2's fast variant has an error far
/// below that of the operands' rounding.
template <bool NATURAL>
struct Exponential {
  static constant constexpr const float kUnit = NATURAL ? 0.693147181f : 1.0f;  // of 2, as a score
  static constant constexpr const float kPower = NATURAL ? 1.44269504f : 1.0f;  // of a score of 1

  METAL_FUNC static float of(float x) { return fast::exp2(NATURAL ? x * kPower : x); }

  METAL_FUNC static float logarithm(float x) { return NATURAL ? log(x) : log2(x); }
};

/// A sum of exponentials whose origin a sink is about to move. A sink of +inf would leave 0 of it,
/// where inf - inf shall make it NaN. The sum of no key stays 0.
METAL_FUNC float sum_beside(float sum, float sink) {
  return sink == INFINITY && sum != 0.0f ? NAN : sum;
}

/// The exponential of a sink, counted from an origin that is not below it: 1 at the origin, though
/// that be +inf.
METAL_FUNC float exponential_of_sink(float sink, float origin) {
  return sink == origin ? 1.0f : Exponential<true>::of(sink - origin);
}

/// Exponentials count from an origin of each row. It follows the row's largest score only when that
/// is more than a slack of 2^8 above it, which is rare after the first keys: weights reach 2^8, and
/// what was accumulated is seldom brought to a new origin.
template <int ROWS, bool NATURAL>
struct OnlineSoftmax {
  using Exp = Exponential<NATURAL>;
  static constant constexpr const float kFar = 8.0f * Exp::kUnit;  // the slack, as a score

  float origin[ROWS];  // before the first key below all scores
  float sum[ROWS];     // this lane's part of the row's sum of exp(s - origin)

  METAL_FUNC void init() {
    ORCHARD_UNROLL
    for (int r = 0; r < ROWS; r++) {
      origin[r] = numeric_limits<float>::lowest();
      sum[r] = 0.0f;
    }
  }

  /// Takes a tile of scores in and leaves exp(s - origin) in it; o is what such weights were
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
      above = above || top[r] - origin[r] > kFar;
    }
    if (simd_any(above)) {
      raise(top, kFar, o);
    }
    ORCHARD_UNROLL
    for (int r = 0; r < ROWS; r++) {
      float part = 0.0f;
      ORCHARD_UNROLL
      for (int c = 0; c < COLS; c++) {
        s.fragments[r][c].x = Exp::of(s.fragments[r][c].x - origin[r]);
        s.fragments[r][c].y = Exp::of(s.fragments[r][c].y - origin[r]);
        part += s.fragments[r][c].x + s.fragments[r][c].y;
      }
      sum[r] += part;
    }
  }

  /// Moves origins that are more than `slack` below a row's scores to the largest of these.
  template <int DEPTH>
  METAL_FUNC void raise(thread const float* top, float slack, thread Tile<float, ROWS, DEPTH>& o) {
    float rescale[ROWS];
    ORCHARD_UNROLL
    for (int r = 0; r < ROWS; r++) {
      const float largest = row_max(top[r]);
      const bool moves = largest - origin[r] > slack;
      rescale[r] = moves ? Exp::of(origin[r] - largest) : 1.0f;
      origin[r] = moves ? largest : origin[r];
      sum[r] *= rescale[r];
    }
    mul_row(o, rescale);
  }

  /// Counts from an origin that is not below one more score, the same for all rows. A sink is taken
  /// once, so this needs no slack, which would only make the logarithm of the sum coarser.
  template <int DEPTH>
  METAL_FUNC void make_room_for(float score, thread Tile<float, ROWS, DEPTH>& o) {
    float top[ROWS];
    ORCHARD_UNROLL
    for (int r = 0; r < ROWS; r++) {
      top[r] = score;
      sum[r] = sum_beside(sum[r], score);
    }
    raise(top, 0.0f, o);
  }

  /// Sum over the whole row.
  METAL_FUNC float total(int r) const { return row_sum(sum[r]); }

  /// What the backward needs of a row: the origin of its exponentials, and the logarithm of their
  /// sum, `total`, of which keys have `of_keys`. They stay apart, since one number would lose the
  /// logarithm beside a large origin. A row without a key has a logarithm of -inf, and an origin
  /// that is the lowest number; where it has a sink, its logarithm is -0 (sees_no_key). Where the
  /// sum of another row is NaN, its origin is, and makes all weights NaN: in_powers() loses a
  /// logarithm that is NaN, and the sign of a NaN says nothing.
  METAL_FUNC float2 row_stats(int r, float of_keys, float total) const {
    const float log_sum = Exp::logarithm(total);
    if (of_keys == 0.0f) {
      return float2(origin[r], -abs(log_sum));
    }
    return isnan(log_sum) ? float2(NAN, 0.0f) : float2(origin[r], log_sum);
  }
};

/// Whether a row with these statistics sees no key. Other sums have an exponential of 1 in them, so
/// that their logarithm has no sign; where they are NaN, 0 stands for it.
METAL_FUNC bool sees_no_key(float2 stats) { return as_type<int>(stats.y) < 0; }

/// Which of a block's rows see a key: row i of it is bit i.
struct SeeingRows {
  uint bits;

  template <int ROWS>
  METAL_FUNC bool every() const {
    return (~bits & low_bits<ROWS>()) == 0;
  }

  METAL_FUNC bool has(int i) const { return (bits >> i) & 1; }
};

/// The rows of a block from row0 on that see a key, at most 32, by their statistics. Where nothing
/// HIDES keys from single rows, it is all of them.
template <bool HIDES>
struct RowSight {
  using Rows = EverySeen;

  METAL_FUNC static Rows of(const device float2*, int, int, ushort) {
    Rows rows;
    return rows;
  }
};

template <>
struct RowSight<true> {
  using Rows = SeeingRows;

  METAL_FUNC static Rows of(const device float2* row_stats, int row0, int q_len, ushort lane) {
    const bool sees = !sees_no_key(row_stats[min(row0 + lane, q_len - 1)]);
    Rows rows;
    rows.bits = simd_sum(sees ? 1u << lane : 0u);
    return rows;
  }
};

/// Makes weights of scores, from the statistics of their rows.
template <bool NATURAL>
struct Weights {
  using Exp = Exponential<NATURAL>;

  /// The logarithm of a row's sum in powers of two. Scores of -inf alone leave a sum of zero, whose
  /// logarithm is -inf: their weights shall be exp(-inf), not NaN.
  METAL_FUNC static float in_powers(float log_sum) {
    return max(NATURAL ? log_sum * Exp::kPower : log_sum, numeric_limits<float>::lowest());
  }

  /// The first difference is the number that the forward has exponentiated. `log_sum` is in powers.
  METAL_FUNC static float2 of(float2 scores, float2 origin, float2 log_sum) {
    const float2 difference = scores - origin;
    const float2 exponents =
        NATURAL ? fma(difference, float2(Exp::kPower), -log_sum) : difference - log_sum;
    return float2(fast::exp2(exponents.x), fast::exp2(exponents.y));
  }
};

/// The weight of a sink in a row with these statistics. Where the sink is the origin, its
/// exponential is 1, though both be +inf.
METAL_FUNC float weight_of_sink(float sink, float2 stats) {
  const float difference = sink == stats.x ? 0.0f : sink - stats.x;
  const float log_sum = Weights<true>::in_powers(stats.y);
  return Weights<true>::of(float2(difference), float2(0.0f), float2(log_sum)).x;
}

/// Makes weights of scores: statistics of this lane's row of each row of fragments.
template <int ROWS, bool NATURAL>
struct RowStats {
  float origin[ROWS];
  float log_sum[ROWS];  // in powers of two

  METAL_FUNC void set(int r, float2 stats) {
    origin[r] = stats.x;
    log_sum[r] = Weights<NATURAL>::in_powers(stats.y);
  }

  METAL_FUNC float2 operator()(float2 s, int r, int) const {
    return Weights<NATURAL>::of(s, float2(origin[r]), float2(log_sum[r]));
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
template <int COLS, bool NATURAL>
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
    const float2 powers = float2(
        Weights<NATURAL>::in_powers(log_sum[c].x), Weights<NATURAL>::in_powers(log_sum[c].y));
    return Weights<NATURAL>::of(s, origin[c], powers);
  }
};
