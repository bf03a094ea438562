// Dropout: which weights are kept is a function of (seed; batch, head, query, key) alone, the same
// in src/orchard_ops/dropout.py. One Philox block decides 8 weights: of 16 x 16 weights, those in
// rows i and i + 8 and columns j, j + 1, j + 8, j + 9 (j even). A lane owns just such elements.
#pragma once

#include "params.h"
#include "philox.h"
#include "tile.h"

/// The draws of a head. Row and column blocks are counted in fragments of 8.
struct DropoutDraws {
  uint batch;
  uint head;
  uint2 seed;
  uint threshold;
  LanePosition at;

  /// This lane's draws for row blocks 2 * row_pair (+1) and column blocks 2 * col_pair (+1).
  METAL_FUNC uint4 words(uint row_pair, uint col_pair) const {
    return philox_4x32(uint4(col_pair * 4 + at.col / 2, row_pair * 8 + at.row, head, batch), seed);
  }

  /// The word of one fragment: its low half draws for the first element, its high half for the
  /// second.
  METAL_FUNC static uint word(uint4 words, uint row_block, uint col_block) {
    const uint2 row = row_block % 2 == 0 ? words.xy : words.zw;
    return col_block % 2 == 0 ? row.x : row.y;
  }

  METAL_FUNC bool keeps_first(uint word) const { return (word & 0xffffu) >= threshold; }
  METAL_FUNC bool keeps_second(uint word) const { return (word >> 16) >= threshold; }
};

METAL_FUNC DropoutDraws dropout_draws(
    int batch, int head, LanePosition at, constant AttentionParams& params) {
  DropoutDraws draws;
  draws.batch = batch;
  draws.head = head;
  draws.seed = uint2(params.dropout_seed[0], params.dropout_seed[1]);
  draws.threshold = params.dropout_threshold;
  draws.at = at;
  return draws;
}

/// x = 0 where dropped. x is (queries, keys) from (row0, key0), both multiples of 8 times an even
/// tile size.
template <int ROWS, int COLS>
METAL_FUNC void drop(thread Tile<float, ROWS, COLS>& x, int row0, int key0, DropoutDraws draws) {
  const int kRowStep = ROWS % 2 == 0 ? 2 : 1;
  const int kColStep = COLS % 2 == 0 ? 2 : 1;
  const uint row_block = row0 / 8;
  const uint col_block = key0 / 8;
  ORCHARD_UNROLL
  for (int r0 = 0; r0 < ROWS; r0 += kRowStep) {
    ORCHARD_UNROLL
    for (int c0 = 0; c0 < COLS; c0 += kColStep) {
      const uint4 words = draws.words((row_block + r0) / 2, (col_block + c0) / 2);
      ORCHARD_UNROLL
      for (int r = r0; r < r0 + kRowStep; r++) {
        ORCHARD_UNROLL
        for (int c = c0; c < c0 + kColStep; c++) {
          const uint word = DropoutDraws::word(words, row_block + r, col_block + c);
          x.fragments[r][c].x = draws.keeps_first(word) ? x.fragments[r][c].x : 0.0f;
          x.fragments[r][c].y = draws.keeps_second(word) ? x.fragments[r][c].y : 0.0f;
        }
      }
    }
  }
}

/// Multiplier bits of a transposed tile, (8 keys, queries) from (key0, row0): bit c and bit 16 + c
/// say whether this lane's first and second element of fragment c are kept.
template <int COLS>
METAL_FUNC uint kept_transposed(int key0, int row0, DropoutDraws draws, ushort lane) {
  const int kStep = COLS % 2 == 0 ? 2 : 1;
  const uint row_block = row0 / 8;
  const uint col_block = key0 / 8;
  uint bits = 0;
  ORCHARD_UNROLL
  for (int c0 = 0; c0 < COLS; c0 += kStep) {
    const uint4 words = draws.words((row_block + c0) / 2, col_block / 2);
    ORCHARD_UNROLL
    for (int c = c0; c < c0 + kStep; c++) {
      const uint word = DropoutDraws::word(words, row_block + c, col_block);
      bits |= (draws.keeps_first(word) ? 1u << c : 0u);
      bits |= (draws.keeps_second(word) ? 0x10000u << c : 0u);
    }
  }
  return transpose_bits(bits, lane);
}
