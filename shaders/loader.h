// Device memory in and out: blocks to threadgroup memory, rows as operand fragments, tiles to rows.
// Everything beyond the tensor is read as zero and never written.
#pragma once

#include "params.h"
#include "tile.h"

/// Rows staged as operands of type F: 16 bytes of padding keep them aligned and off the same banks.
template <typename F, int BD>
struct StagedRow {
  static constant constexpr const int kLength = BD + 16 / sizeof(F);
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

/// Rows [row0, ...) of a head, read as fragments from device memory.
template <typename T, bool VEC>
struct DeviceRows {
  HeadRows<T> rows;
  int row0;
  LanePosition at;

  /// Fragment (r, c) as it lies.
  METAL_FUNC vec<T, 2> pair(int r, int c) const {
    const int row = row0 + 8 * r + at.row;
    const int col = 8 * c + at.col;
    if (VEC) {
      const bool inside = row < rows.length && col < rows.head_dim;
      const device T* p = rows.data + row * rows.row_stride + col;
      return inside ? *reinterpret_cast<const device vec<T, 2>*>(p) : vec<T, 2>(T(0), T(0));
    }
    return vec<T, 2>(rows.at(row, col), rows.at(row, col + 1));
  }

  /// Fragment (c, r) of the transposed rows.
  METAL_FUNC vec<T, 2> transposed(int r, int c) const {
    const int row = row0 + 8 * r + at.col;
    const int col = 8 * c + at.row;
    return vec<T, 2>(rows.at(row, col), rows.at(row + 1, col));
  }
};

template <bool VEC, typename T>
METAL_FUNC DeviceRows<T, VEC> device_rows(HeadRows<T> rows, int row0, LanePosition at) {
  DeviceRows<T, VEC> x;
  x.rows = rows;
  x.row0 = row0;
  x.at = at;
  return x;
}

/// A left operand of ROWS x DEPTH fragments: held in registers where KEEP, else read again when
/// used (wide heads would spill).
template <typename T, typename F, int ROWS, int DEPTH, bool VEC, bool KEEP>
struct LeftOperand {
  Tile<F, KEEP ? ROWS : 1, KEEP ? DEPTH : 1> kept;
  DeviceRows<T, VEC> source;

  METAL_FUNC void load(DeviceRows<T, VEC> rows) {
    source = rows;
    if (KEEP) {
      ORCHARD_UNROLL
      for (int r = 0; r < ROWS; r++) {
        ORCHARD_UNROLL
        for (int d = 0; d < DEPTH; d++) {
          kept.fragments[KEEP ? r : 0][KEEP ? d : 0] = operand<F>(source.pair(r, d));
        }
      }
    }
  }

  METAL_FUNC vec<F, 2> pair(int r, int d) const {
    return KEEP ? kept.fragments[KEEP ? r : 0][KEEP ? d : 0] : operand<F>(source.pair(r, d));
  }
};

/// Stores 16 bytes of T's as as many F's: eight of 16 bits widened, or what was loaded.
template <typename T, typename F>
struct ChunkStore {
  METAL_FUNC vec<F, 2> widened(uint word) const {
    return operand<F>(reinterpret_cast<thread vec<T, 2>&>(word));
  }

  METAL_FUNC void store(threadgroup F* p, uint4 chunk) const {
    *reinterpret_cast<threadgroup vec<F, 4>*>(p) = vec<F, 4>(widened(chunk.x), widened(chunk.y));
    *reinterpret_cast<threadgroup vec<F, 4>*>(p + 4) =
        vec<F, 4>(widened(chunk.z), widened(chunk.w));
  }
};

template <typename T>
struct ChunkStore<T, T> {
  METAL_FUNC void store(threadgroup T* p, uint4 chunk) const {
    *reinterpret_cast<threadgroup uint4*>(p) = chunk;
  }
};

/// Moves blocks of ROWS consecutive rows to threadgroup memory as operands of type F, by all
/// THREADS threads: fetch() may run while the previous block is still read, store() may not. VEC:
/// in 16-byte chunks (rows 16-byte aligned, columns adjacent, head_dim whole chunks); else element
/// by element.
template <typename T, typename F, int ROWS, int BD, int THREADS, bool VEC>
struct BlockLoader {
  static constant constexpr const int kLength = StagedRow<F, BD>::kLength;
  static constant constexpr const int kChunk = 16 / sizeof(T);  // elements of a chunk
  static constant constexpr const int kChunks = BD / kChunk;    // of a row
  static constant constexpr const int kRowsAtOnce = THREADS / kChunks;
  static constant constexpr const int kPasses = (ROWS + kRowsAtOnce - 1) / kRowsAtOnce;

  HeadRows<T> from;
  int thread_index;
  int row0;               // of the block
  int row;                // this thread's, in the first pass
  int col;                // this thread's
  const device T* chunk;  // this thread's, in the first pass
  uint4 fetched[kPasses];

  METAL_FUNC void start(HeadRows<T> rows, int first_row, int index) {
    from = rows;
    thread_index = index;
    row0 = first_row;
    row = index / kChunks;
    col = index % kChunks * kChunk;
    chunk = from.data + (row0 + row) * from.row_stride + col;
  }

  METAL_FUNC void advance() {
    row0 += ROWS;
    chunk += ROWS * from.row_stride;
  }

  /// Whether this thread moves a chunk in this pass.
  METAL_FUNC bool takes_part(int pass) const {
    return (THREADS % kChunks == 0 || row < kRowsAtOnce) &&
           (ROWS % kRowsAtOnce == 0 || row + pass * kRowsAtOnce < ROWS);
  }

  METAL_FUNC void fetch() {
    if (VEC) {
      // Whole blocks of unpadded rows, the most, need no guard.
      const bool whole = row0 + ROWS <= from.length && from.head_dim == BD;
      ORCHARD_UNROLL
      for (int pass = 0; pass < kPasses; pass++) {
        const int ahead = pass * kRowsAtOnce;
        const bool inside = takes_part(pass) &&
                            (whole || (row0 + row + ahead < from.length && col < from.head_dim));
        const device T* p = chunk + ahead * from.row_stride;
        fetched[pass] = inside ? *reinterpret_cast<const device uint4*>(p) : uint4(0);
      }
    }
  }

  /// block is (ROWS, kLength).
  METAL_FUNC void store(threadgroup F* block) const {
    if (VEC) {
      ChunkStore<T, F> to;
      ORCHARD_UNROLL
      for (int pass = 0; pass < kPasses; pass++) {
        if (takes_part(pass)) {
          to.store(block + (row + pass * kRowsAtOnce) * kLength + col, fetched[pass]);
        }
      }
    } else {
      for (int i = thread_index; i < ROWS * BD; i += THREADS) {
        block[i / BD * kLength + i % BD] = F(from.at(row0 + i / BD, i % BD));
      }
    }
  }
};

/// The rows of a head as right operand of type F, ROWS at a time: STAGED in threadgroup memory for
/// all simdgroups, or read from device memory by each.
template <typename T, typename F, int ROWS, int BD, int THREADS, bool VEC, bool STAGED>
struct RightOperand {
  BlockLoader<T, F, ROWS, BD, THREADS, VEC> loader;
  threadgroup F* block;
  SharedBlock<F, StagedRow<F, BD>::kLength> staged;
  DeviceRows<T, VEC> direct;

  METAL_FUNC void start(
      HeadRows<T> rows, int row0, threadgroup F* storage, uint thread_index, LanePosition at) {
    loader.start(rows, row0, thread_index);
    block = storage;
    staged = shared_block<StagedRow<F, BD>::kLength>(storage, at);
    direct = device_rows<VEC>(rows, row0, at);
  }

  METAL_FUNC void fetch() {
    if (STAGED) {
      loader.fetch();
    }
  }

  METAL_FUNC void store() const {
    if (STAGED) {
      loader.store(block);
    }
  }

  /// To the next rows.
  METAL_FUNC void advance() {
    loader.advance();
    direct.row0 += ROWS;
  }

  METAL_FUNC vec<F, 2> pair(int r, int c) const {
    return STAGED ? staged.pair(r, c) : operand<F>(direct.pair(r, c));
  }

  METAL_FUNC vec<F, 2> transposed(int r, int c) const {
    return STAGED ? staged.transposed(r, c) : operand<F>(direct.transposed(r, c));
  }
};

/// Left operands stay in registers while they and the sums take at most so many of a thread's 128.
#define ORCHARD_OPERAND_REGISTERS 96

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
