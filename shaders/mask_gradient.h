// Where the sums of an additive mask's gradient go, and how threadgroups share them.
#pragma once

#include "keys.h"
#include "params.h"
#include "tile.h"

/// The gradient of one (batch, head) of the mask, or one threadgroup's part of it.
template <typename O>
struct MaskGradient {
  device O* data;
  int rows;
  int keys;

  METAL_FUNC void store(int row, int key, float x) const {
    if (row < rows && key < keys) {
      data[(int64_t)row * keys + key] = O(x);
    }
  }

  template <int ROWS, int COLS>
  METAL_FUNC void store(
      thread const Tile<float, ROWS, COLS>& x, int row0, int key0, LanePosition at) const {
    ORCHARD_UNROLL
    for (int r = 0; r < ROWS; r++) {
      ORCHARD_UNROLL
      for (int c = 0; c < COLS; c++) {
        const int row = row0 + 8 * r + at.row;
        const int key = key0 + 8 * c + at.col;
        store(row, key, x.fragments[r][c].x);
        store(row, key + 1, x.fragments[r][c].y);
      }
    }
  }

  /// Stores what the columns of all simdgroups' tiles sum up to. `sums` is (SIMDGROUPS, 8 COLS).
  template <int SIMDGROUPS, int ROWS, int COLS>
  METAL_FUNC void store_columns(thread const Tile<float, ROWS, COLS>& x, int key0,
      threadgroup float* sums, uint thread_index, ushort simdgroup, LanePosition at) const {
    const int kKeys = 8 * COLS;
    ORCHARD_UNROLL
    for (int c = 0; c < COLS; c++) {
      float2 column = x.fragments[0][c];
      ORCHARD_UNROLL
      for (int r = 1; r < ROWS; r++) {
        column += x.fragments[r][c];
      }
      column = column_sum(column);
      if (at.row == 0) {
        sums[simdgroup * kKeys + 8 * c + at.col] = column.x;
        sums[simdgroup * kKeys + 8 * c + at.col + 1] = column.y;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = thread_index; i < kKeys; i += ORCHARD_THREADS(SIMDGROUPS)) {
      float total = 0.0f;
      for (int j = 0; j < SIMDGROUPS; j++) {
        total += sums[j * kKeys + i];
      }
      store(0, key0 + i, total);
    }
  }
};

/// Of `count` terms, those that a threadgroup sums up which is the index-th of `parts`.
METAL_FUNC Range terms_of_part(int count, int part, int parts) {
  const int terms = (count + parts - 1) / parts;
  Range range;
  range.begin = min(part * terms, count);
  range.end = min(range.begin + terms, count);
  return range;
}
