// Scores that are given as functions, score_mod and mask_mod of FlexAttention: for the kernels what
// Score and Mask are (scores.h, masks.h). The functions themselves come behind this text, as
//
//   struct ScoreMod {
//     static constant constexpr const bool kUnitSlope = ...;  // whether the derivative is 1
//     FlexCaptures captures;
//     METAL_FUNC float score(
//         float s, int b, int h, int q, int kv, thread float& derivative) const;
//   };
//   struct MaskMod {
//     FlexCaptures captures;
//     METAL_FUNC bool sees(int b, int h, int q, int kv) const;
//   };
//
// Indices may lie beyond the ends, by less than a block of a kernel: what the functions say of
// pairs that there are not is dropped. The embedder gives ScoreBuffers its captures, and the
// kernels the buffers for them (native/embed_shaders.py).
#pragma once

#include "flex_arithmetic.h"
#include "flex_captures.h"
#include "scores.h"

/// No score_mod: exponentials are powers of two.
struct NoScoreMod {
  static constant constexpr const bool kUnitSlope = true;
  FlexCaptures captures;

  METAL_FUNC float score(float s, int, int, int, int, thread float& derivative) const {
    derivative = 1.0f;
    return s;
  }
};

/// No mask_mod. Beside block_states it is one that lets every pair through.
struct NoMaskMod {
  FlexCaptures captures;

  METAL_FUNC bool sees(int, int, int, int) const { return true; }
};

/// The tanh of the functions, which is that of a softcap.
METAL_FUNC float flex_tanh(float x) { return tanh_log2(tanh_unit() * x); }

template <typename MOD>
struct IsGiven {
  static constant constexpr const bool kValue = true;
};

template <>
struct IsGiven<NoScoreMod> {
  static constant constexpr const bool kValue = false;
};

/// s = score_mod(scale * (q k^T)), and -inf where mask_mod or block_states hide the pair. MAP says
/// whether any do, and is NoMask or a boolean Mask: the map of what is seen (flex_map.h) is read as
/// that of one.
template <typename SCORE_MOD, typename MASK_MOD, typename MAP>
struct FlexScore {
  static constant constexpr const bool kNatural = IsGiven<SCORE_MOD>::kValue;
  static constant constexpr const bool kCapped = !SCORE_MOD::kUnitSlope;
  using Mask = MAP;
};

/// The functions of one head, and what block_states say of its tiles.
template <typename SCORE_MOD, typename MASK_MOD>
struct HeadMods {
  static constant constexpr const int kEachPair = -1;  // has a state of its own

  SCORE_MOD score_mod;
  MASK_MOD mask_mod;
  BlockStates states;
  float factor;  // of a product
  int batch;
  int head;

  METAL_FUNC void start(Head of, ScoreBuffers buffers, constant AttentionParams& params) {
    score_mod.captures = buffers.captures;
    mask_mod.captures = buffers.captures;
    states.start(of.batch, of.head, buffers.mask, *buffers.captures.params);
    factor = IsGiven<SCORE_MOD>::kValue ? params.scale : params.scale_log2;
    batch = of.batch;
    head = of.head;
  }

  /// Of a tile whose pairs are `masked` or all seen. It lies in one block of the map. Where that
  /// has several states, each pair has its own.
  METAL_FUNC int state(int row0, int key0, bool masked) const {
    if (!masked) {
      return kStateEverything;
    }
    return states.whole() ? states.of(row0, key0) : kEachPair;
  }

  METAL_FUNC float2 scores(float2 products, int2 rows, int2 keys, thread float2& slopes) const {
    float first;
    float second;
    const float2 s = products * factor;
    const float2 scores = float2(score_mod.score(s.x, batch, head, rows.x, keys.x, first),
        score_mod.score(s.y, batch, head, rows.y, keys.y, second));
    slopes = float2(first, second);
    return scores;
  }

  METAL_FUNC bool sees(int row, int key, int state) const {
    return state == kStateAsk ? mask_mod.sees(batch, head, row, key) : state != kStateNothing;
  }

  /// `state` is the tile's. Where each pair has its own, block_states is given.
  METAL_FUNC float2 hide(float2 s, int2 rows, int2 keys, int state) const {
    int2 own = int2(state);
    if (state == kEachPair) {
      own = int2(states.listed(rows.x, keys.x), states.listed(rows.y, keys.y));
    }
    return float2(sees(rows.x, keys.x, own.x) ? s.x : -INFINITY,
        sees(rows.y, keys.y, own.y) ? s.y : -INFINITY);
  }
};

template <typename SCORE_MOD, typename MASK_MOD, typename MAP, int ROWS, int COLS>
struct Scores<FlexScore<SCORE_MOD, MASK_MOD, MAP>, ROWS, COLS> {
  HeadMods<SCORE_MOD, MASK_MOD> mods;
  int first_row;  // of the tile
  int row0;       // this lane's
  int col;

  template <typename Ranges>
  METAL_FUNC void start(Head head, ScoreBuffers buffers, thread const Ranges&, int first,
      LanePosition at, constant AttentionParams& params) {
    mods.start(head, buffers, params);
    first_row = first;
    row0 = first + at.row;
    col = at.col;
  }

  METAL_FUNC void fetch(int, bool) {}

  METAL_FUNC int2 rows(int r) const { return int2(row0 + 8 * r); }

  METAL_FUNC int2 keys(int key0, int c) const {
    const int key = key0 + col;
    return int2(key + 8 * c, key + (8 * c + 1));
  }

  METAL_FUNC void apply(thread Tile<float, ROWS, COLS>& s, int key0, bool masked,
      constant AttentionParams& params) const {
    Tile<float, ROWS, COLS> derivatives;  // not used
    apply(s, derivatives, key0, masked, params);
  }

  METAL_FUNC void apply(thread Tile<float, ROWS, COLS>& s,
      thread Tile<float, ROWS, COLS>& derivatives, int key0, bool masked,
      constant AttentionParams&) const {
    ORCHARD_UNROLL
    for (int r = 0; r < ROWS; r++) {
      ORCHARD_UNROLL
      for (int c = 0; c < COLS; c++) {
        s.fragments[r][c] =
            mods.scores(s.fragments[r][c], rows(r), keys(key0, c), derivatives.fragments[r][c]);
      }
    }
    const int state = MAP::kAny ? mods.state(first_row, key0, masked) : int(kStateEverything);
    if (state != kStateEverything) {
      ORCHARD_UNROLL
      for (int r = 0; r < ROWS; r++) {
        ORCHARD_UNROLL
        for (int c = 0; c < COLS; c++) {
          s.fragments[r][c] = mods.hide(s.fragments[r][c], rows(r), keys(key0, c), state);
        }
      }
    }
  }
};

template <typename SCORE_MOD, typename MASK_MOD, typename MAP, int COLS>
struct ScoresTransposed<FlexScore<SCORE_MOD, MASK_MOD, MAP>, COLS> {
  HeadMods<SCORE_MOD, MASK_MOD> mods;
  int first_key;  // of the tile
  int key;        // this lane's
  int row;

  METAL_FUNC void start(Head head, ScoreBuffers buffers, int first, LanePosition at,
      constant AttentionParams& params) {
    mods.start(head, buffers, params);
    first_key = first;
    key = first + at.row;
    row = at.col;
  }

  METAL_FUNC void fetch(int, bool) {}

  METAL_FUNC int2 rows(int row0, int c) const {
    const int first = row0 + row;
    return int2(first + 8 * c, first + (8 * c + 1));
  }

  template <typename Ranges>
  METAL_FUNC void apply(thread Tile<float, 1, COLS>& s, thread Tile<float, 1, COLS>& derivatives,
      thread const Ranges&, int row0, bool masked, constant AttentionParams&) const {
    const int2 keys = int2(key);
    ORCHARD_UNROLL
    for (int c = 0; c < COLS; c++) {
      s.fragments[0][c] =
          mods.scores(s.fragments[0][c], rows(row0, c), keys, derivatives.fragments[0][c]);
    }
    const int state = MAP::kAny ? mods.state(row0, first_key, masked) : int(kStateEverything);
    if (state != kStateEverything) {
      ORCHARD_UNROLL
      for (int c = 0; c < COLS; c++) {
        s.fragments[0][c] = mods.hide(s.fragments[0][c], rows(row0, c), keys, state);
      }
    }
  }
};
