// Device memory in and out: blocks to threadgroup memory, rows as operand fragments, tiles to rows.
// Everything beyond the tensor is read as zero and never written.
#pragma once

#include "params.h"
#include "tile.h"

/// Row length of a staged block: 16 bytes of padding keep rows aligned and off the same banks.
template <typename T, int BD>
struct StagedRow {
  static constant constexpr const int kChunk = 16 / sizeof(T);  // elements of a 16-byte access
  static constant constexpr const int kLength = BD + kChunk;
};

/// One head of a (B, H, length, head_dim) tensor.
template <typename T>
struct HeadRows {
  const device T* data;
  int64_t row_stride;
  int64_t col_stride;
  int length;
  int head_dim;

  METAL_FUNC T at(int row, int col) const {
    return row < length && col < head_dim ? data[row * row_stride + col * col_stride] : T(0);
  }
};

template <typename T>
METAL_FUNC HeadRows<T> head_rows(const device T* tensor, constant TensorStrides& strides, int batch,
    int head, int length, int head_dim) {
  HeadRows<T> rows;
  rows.data = tensor + batch * strides.batch + head * strides.head;
  rows.row_stride = strides.row;
  rows.col_stride = strides.col;
  rows.length = length;
  rows.head_dim = head_dim;
  return rows;
}

/// Rows [row0, row0 + ROWS) to threadgroup memory, by all THREADS threads. VEC: in 16-byte chunks
/// (rows 16-byte aligned, columns adjacent, head_dim whole chunks); else element by element.
template <int ROWS, int BD, int THREADS, bool VEC, typename T>
METAL_FUNC void load_block(threadgroup T* block, HeadRows<T> from, int row0, uint thread_index) {
  const int LD = StagedRow<T, BD>::kLength;
  if (VEC) {
    const int kChunk = StagedRow<T, BD>::kChunk;
    const int kChunks = BD / kChunk;  // of a row
    for (int i = thread_index; i < ROWS * kChunks; i += THREADS) {
      const int row = i / kChunks;
      const int col = i % kChunks * kChunk;
      const bool inside = row0 + row < from.length && col < from.head_dim;
      const device T* p = from.data + (row0 + row) * from.row_stride + col;
      *reinterpret_cast<threadgroup uint4*>(block + row * LD + col) =
          inside ? *reinterpret_cast<const device uint4*>(p) : uint4(0);
    }
  } else {
    for (int i = thread_index; i < ROWS * BD; i += THREADS) {
      block[i / BD * LD + i % BD] = from.at(row0 + i / BD, i % BD);
    }
  }
}

/// Rows [row0, ...) of a head as operand fragments straight from device memory.
template <typename T, typename F, bool VEC>
struct DeviceRows {
  HeadRows<T> rows;
  int row0;
  LanePosition at;

  METAL_FUNC vec<F, 2> pair(int r, int c) const {
    const int row = row0 + 8 * r + at.row;
    const int col = 8 * c + at.col;
    if (VEC) {
      if (row < rows.length && col < rows.head_dim) {
        const device T* p = rows.data + row * rows.row_stride + col;
        const vec<T, 2> elements = *reinterpret_cast<const device vec<T, 2>*>(p);
        return vec<F, 2>(F(elements.x), F(elements.y));
      }
      return vec<F, 2>(F(0), F(0));
    }
    return vec<F, 2>(F(rows.at(row, col)), F(rows.at(row, col + 1)));
  }
};

/// A left operand of ROWS x DEPTH fragments: held in registers where KEEP, else re-read when used
/// (wide heads would spill).
template <typename T, typename F, int ROWS, int DEPTH, bool VEC, bool KEEP>
struct LeftOperand {
  Tile<F, KEEP ? ROWS : 1, KEEP ? DEPTH : 1> kept;
  DeviceRows<T, F, VEC> source;

  METAL_FUNC void load(HeadRows<T> rows, int row0, LanePosition at) {
    source.rows = rows;
    source.row0 = row0;
    source.at = at;
    if (KEEP) {
      ORCHARD_UNROLL
      for (int r = 0; r < ROWS; r++) {
        ORCHARD_UNROLL
        for (int d = 0; d < DEPTH; d++) {
          kept.fragments[KEEP ? r : 0][KEEP ? d : 0] = source.pair(r, d);
        }
      }
    }
  }

  METAL_FUNC vec<F, 2> pair(int r, int d) const {
    return KEEP ? kept.fragments[KEEP ? r : 0][KEEP ? d : 0] : source.pair(r, d);
  }
};

/// Writes x * factor[row] to rows [row0, ...) of one head of an output (columns adjacent).
template <bool VEC, typename T, int ROWS, int COLS>
METAL_FUNC void store_rows(device T* tensor, constant TensorStrides& strides, int batch, int head,
    int row0, int length, int head_dim, thread const Tile<float, ROWS, COLS>& x,
    thread const float* factor, LanePosition at) {
  device T* rows = tensor + batch * strides.batch + head * strides.head;
  ORCHARD_UNROLL
  for (int r = 0; r < ROWS; r++) {
    const int row = row0 + 8 * r + at.row;
    if (row >= length) {
      continue;
    }
    ORCHARD_UNROLL
    for (int c = 0; c < COLS; c++) {
      const int col = 8 * c + at.col;
      const float2 elements = x.fragments[r][c] * factor[r];
      device T* p = rows + row * strides.row + col;
      if (VEC) {
        if (col < head_dim) {
          *reinterpret_cast<device vec<T, 2>*>(p) = vec<T, 2>(T(elements.x), T(elements.y));
        }
      } else {
        if (col < head_dim) {
          p[0] = T(elements.x);
        }
        if (col + 1 < head_dim) {
          p[1] = T(elements.y);
        }
      }
    }
  }
}
