// What makes a score of a product q k^T, and its derivative: PlainScore, or Score with what the
// call adds. A variant names its own (loader.h), and kernels use it through Scores and
// ScoresTransposed.
#pragma once

#include "loader.h"
#include "masks.h"
#include "params.h"
#include "ranges.h"
#include "tile.h"

/// s = scale * (q k^T) and nothing else: exponentials are powers of two.
struct PlainScore {
  static constant constexpr const bool kNatural = false;
  static constant constexpr const bool kCapped = false;
  using Mask = NoMask;
};

/// s = softcap * tanh(scale * (q k^T) / softcap) - slope * |position - key| + mask, as far as it
/// has these parts. Exponentials are natural: a finite mask times log2(e) could overflow.
template <bool SOFTCAP, bool ALIBI, typename MASK>
struct Score {
  static constant constexpr const bool kNatural = true;
  static constant constexpr const bool kCapped = SOFTCAP;
  using Mask = MASK;
};

/// d(score) / d(q k^T) but for softcap's part, in the units of natural exponentials: a common
/// factor, so it goes onto dq and dk when they are stored.
METAL_FUNC float score_derivative(constant AttentionParams& params) { return params.scale; }

/// What tanh_log2 takes x by: 2 log2(e).
METAL_FUNC float tanh_unit() { return 2.88539008f; }

/// tanh(x) of y = x tanh_unit(), which is (2^y - 1) / (2^y + 1). softcap multiplies its error: over
/// all floats x at most 2.9 units in the last place, the rounding of y among them, where exp2 is
/// right to half a unit. Where 2^y is near 1 the difference would cancel, so that below 1 y is
/// multiplied by a polynomial in y^2, fitted to tanh(x) / y. NaN is not above.
METAL_FUNC float tanh_log2(float y) {
  const float size = abs(y);
  const float e = fast::exp2(-size);  // which cannot overflow
  const float above = copysign((1.0f - e) / (1.0f + e), y);
  const float square = y * y;
  float p = fma(square, -2.9458022e-05f, 0.00066487055f);
  p = fma(square, p, -0.013875669f);
  const float below = y * fma(square, p, 0.3465736f);
  return size >= 1.0f ? above : below;
}

METAL_FUNC float2 tanh_log2(float2 y) { return float2(tanh_log2(y.x), tanh_log2(y.y)); }

/// Whether a product becomes a score by its factor alone, so that the mask is added in the same
/// rounding.
template <bool SOFTCAP, bool ALIBI, typename MASK>
METAL_FUNC bool adds_to_product() {
  return MASK::kAdds && !SOFTCAP && !ALIBI;
}

/// The parts of a head's scores that do not depend on the mask.
template <bool SOFTCAP, bool ALIBI>
struct HeadScore {
  float factor;  // of a product, which is what tanh_log2 takes, or a score
  float cap;
  float slope;

  METAL_FUNC void start(
      Head head, const device float* alibi_slopes, constant AttentionParams& params) {
    factor = SOFTCAP ? tanh_unit() * params.scale / params.softcap : params.scale;
    cap = params.softcap;
    slope = 0.0f;
    if (ALIBI) {
      slope = alibi_slopes[head.batch * params.alibi_batch + head.head * params.alibi_head];
    }
  }

  /// Scores of two products. `distance` is from their queries' positions to their keys. The caps'
  /// derivatives go to `derivative`.
  METAL_FUNC float2 of(float2 product, float2 distance, thread float2& derivative) const {
    float2 s = product * factor;
    derivative = float2(1.0f);
    if (SOFTCAP) {
      const float2 t = tanh_log2(s);
      derivative = 1.0f - t * t;
      s = cap * t;
    }
    if (ALIBI) {
      s = fma(float2(-slope), abs(distance), s);
    }
    return s;
  }
};

/// The scores of tiles (queries, keys) of one head, the queries from row0 on. Rounded the same way
/// in every kernel, so that the backward has the forward's numbers.
template <typename SCORE, int ROWS, int COLS>
struct Scores {
  template <typename Ranges>
  METAL_FUNC void start(
      Head, ScoreBuffers, thread const Ranges&, int, LanePosition, constant AttentionParams&) {}

  /// Asks for what apply() adds to the tile from key0 on.
  METAL_FUNC void fetch(int, bool) {}

  METAL_FUNC void apply(
      thread Tile<float, ROWS, COLS>& s, int, bool, constant AttentionParams& params) const {
    scale(s, params.scale_log2);
  }

  METAL_FUNC void apply(thread Tile<float, ROWS, COLS>& s, thread Tile<float, ROWS, COLS>&, int,
      bool, constant AttentionParams& params) const {
    scale(s, params.scale_log2);
  }
};

template <bool SOFTCAP, bool ALIBI, typename MASK, int ROWS, int COLS>
struct Scores<Score<SOFTCAP, ALIBI, MASK>, ROWS, COLS> {
  HeadScore<SOFTCAP, ALIBI> head_score;
  MaskTile<MASK, ROWS, COLS> mask;
  int position[ROWS];  // of this lane's rows, less its first column

  template <typename Ranges>
  METAL_FUNC void start(Head head, ScoreBuffers buffers, thread const Ranges& ranges, int row0,
      LanePosition at, constant AttentionParams& params) {
    mask.start(head, buffers.mask, row0, at, params);
    move(head, buffers, ranges, row0, at, params);
  }

  /// To rows from row0 on, and a head, that have the same elements of the mask.
  template <typename Ranges>
  METAL_FUNC void move(Head head, ScoreBuffers buffers, thread const Ranges& ranges, int row0,
      LanePosition at, constant AttentionParams& params) {
    head_score.start(head, buffers.alibi_slopes, params);
    ORCHARD_UNROLL
    for (int r = 0; r < ROWS; r++) {
      position[r] = ranges.position(row0 + 8 * r + at.row, r, params) - at.col;
    }
  }

  /// Asks for the mask of the tile from key0 on, unless it lets all pairs through.
  METAL_FUNC void fetch(int key0, bool masked) {
    if (masked) {
      mask.fetch(key0);
    }
  }

  METAL_FUNC void apply(thread Tile<float, ROWS, COLS>& s, int key0, bool masked,
      constant AttentionParams& params) const {
    Tile<float, ROWS, COLS> derivatives;  // not used
    apply(s, derivatives, key0, masked, params);
  }

  /// Makes scores of products, and in `derivatives` what softcap multiplies their gradients by.
  METAL_FUNC void apply(thread Tile<float, ROWS, COLS>& s,
      thread Tile<float, ROWS, COLS>& derivatives, int key0, bool masked,
      constant AttentionParams&) const {
    if (adds_to_product<SOFTCAP, ALIBI, MASK>()) {
      mask.add_to(s, head_score.factor);
      return;
    }
    ORCHARD_UNROLL
    for (int r = 0; r < ROWS; r++) {
      const float distance = float(position[r] - key0);
      ORCHARD_UNROLL
      for (int c = 0; c < COLS; c++) {
        const float2 distances = distance - float2(8 * c, 8 * c + 1);
        s.fragments[r][c] =
            head_score.of(s.fragments[r][c], distances, derivatives.fragments[r][c]);
      }
    }
    if (masked) {
      mask.add_to(s, 1.0f);
    }
  }
};

/// The scores of transposed tiles (8 keys, queries) of one head, the keys from key0 on.
template <typename SCORE, int COLS>
struct ScoresTransposed {
  METAL_FUNC void start(Head, ScoreBuffers, int, LanePosition, constant AttentionParams&) {}

  METAL_FUNC void fetch(int, bool) {}

  template <typename Ranges>
  METAL_FUNC void apply(thread Tile<float, 1, COLS>& s, thread Tile<float, 1, COLS>&,
      thread const Ranges&, int, bool, constant AttentionParams& params) const {
    scale(s, params.scale_log2);
  }
};

template <bool SOFTCAP, bool ALIBI, typename MASK, int COLS>
struct ScoresTransposed<Score<SOFTCAP, ALIBI, MASK>, COLS> {
  HeadScore<SOFTCAP, ALIBI> head_score;
  MaskTileTransposed<MASK, COLS> mask;
  LanePosition at;
  int key;  // this lane's

  METAL_FUNC void start(Head head, ScoreBuffers buffers, int key0, LanePosition place,
      constant AttentionParams& params) {
    head_score.start(head, buffers.alibi_slopes, params);
    mask.start(head, buffers.mask, key0, place, params);
    at = place;
    key = key0 + at.row;
  }

  /// Asks for the mask of the tile from row0 on, unless it lets all pairs through.
  METAL_FUNC void fetch(int row0, bool masked) {
    if (masked) {
      mask.fetch(row0);
    }
  }

  template <typename Ranges>
  METAL_FUNC void apply(thread Tile<float, 1, COLS>& s, thread Tile<float, 1, COLS>& derivatives,
      thread const Ranges& ranges, int row0, bool masked, constant AttentionParams& params) const {
    if (adds_to_product<SOFTCAP, ALIBI, MASK>()) {
      mask.add_to(s, head_score.factor);
      return;
    }
    ORCHARD_UNROLL
    for (int c = 0; c < COLS; c++) {
      const float2 distances = ALIBI ? ranges.distances(row0, c, key, at, params) : float2(0.0f);
      s.fragments[0][c] = head_score.of(s.fragments[0][c], distances, derivatives.fragments[0][c]);
    }
    if (masked) {
      mask.add_to(s, 1.0f);
    }
  }
};
