// Register tiles of 8 x 8 fragments and the few verbs the kernels are written in. The only file
// that knows simdgroup matrices.
#pragma once

#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
#include <metal_stdlib>
using namespace metal;

#define ORCHARD_UNROLL _Pragma("clang loop unroll(full)")

/// A lane's two elements of every 8 x 8 fragment: (row, col) and (row, col + 1).
struct LanePosition {
  short row;
  short col;  // even
};

METAL_FUNC LanePosition lane_position(ushort lane) {
  const short quad = lane / 4;
  LanePosition at;
  at.row = (quad & 4) + (lane / 2) % 4;
  at.col = (quad & 2) * 2 + (lane % 2) * 2;
  return at;
}

/// ROWS x COLS fragments held by one simdgroup, T per element.
template <typename T, int ROWS, int COLS>
struct Tile {
  vec<T, 2> fragments[ROWS][COLS];

  METAL_FUNC vec<T, 2> pair(int r, int c) const { return fragments[r][c]; }
};

template <typename T, int ROWS, int COLS>
METAL_FUNC void zero(thread Tile<T, ROWS, COLS>& x) {
  ORCHARD_UNROLL
  for (int r = 0; r < ROWS; r++) {
    ORCHARD_UNROLL
    for (int c = 0; c < COLS; c++) {
      x.fragments[r][c] = vec<T, 2>(T(0), T(0));
    }
  }
}

/// x += y
template <int ROWS, int COLS>
METAL_FUNC void add(thread Tile<float, ROWS, COLS>& x, thread const Tile<float, ROWS, COLS>& y) {
  ORCHARD_UNROLL
  for (int r = 0; r < ROWS; r++) {
    ORCHARD_UNROLL
    for (int c = 0; c < COLS; c++) {
      x.fragments[r][c] += y.fragments[r][c];
    }
  }
}

/// d += a * b on one fragment; accumulates in float whatever the operands are.
template <typename F>
METAL_FUNC void mma(thread float2& d, vec<F, 2> a, vec<F, 2> b) {
  simdgroup_matrix<F, 8, 8> left;
  simdgroup_matrix<F, 8, 8> right;
  simdgroup_matrix<float, 8, 8> sum;
  reinterpret_cast<thread vec<F, 2>&>(left.thread_elements()) = a;
  reinterpret_cast<thread vec<F, 2>&>(right.thread_elements()) = b;
  reinterpret_cast<thread float2&>(sum.thread_elements()) = d;
  simdgroup_multiply_accumulate(sum, left, right, sum);
  d = reinterpret_cast<thread float2&>(sum.thread_elements());
}

/// A block of rows in threadgroup memory, LD elements apart, read as operand fragments of type F.
template <typename T, typename F, int LD>
struct SharedBlock {
  const threadgroup T* rows;
  LanePosition at;

  /// Fragment (r, c) as it lies.
  METAL_FUNC vec<F, 2> pair(int r, int c) const {
    const threadgroup T* p = rows + (8 * r + at.row) * LD + 8 * c + at.col;
    const vec<T, 2> elements = *reinterpret_cast<const threadgroup vec<T, 2>*>(p);
    return vec<F, 2>(F(elements.x), F(elements.y));
  }

  /// Fragment (c, r) of the transposed block.
  METAL_FUNC vec<F, 2> transposed(int r, int c) const {
    const threadgroup T* p = rows + (8 * r + at.col) * LD + 8 * c + at.row;
    return vec<F, 2>(F(p[0]), F(p[LD]));
  }
};

/// s += a b^T over fragments first, first + STEP, ... of the depth.
template <int DEPTH, int STEP, int ROWS, int COLS, typename Left, typename T, typename F, int LD>
METAL_FUNC void mma_ABt_part(
    thread Tile<float, ROWS, COLS>& s, thread const Left& a, SharedBlock<T, F, LD> b, int first) {
  ORCHARD_UNROLL
  for (int d = first; d < DEPTH; d += STEP) {
    vec<F, 2> left[ROWS];
    ORCHARD_UNROLL
    for (int r = 0; r < ROWS; r++) {
      left[r] = a.pair(r, d);
    }
    ORCHARD_UNROLL
    for (int c = 0; c < COLS; c++) {
      const vec<F, 2> right = b.transposed(c, d);
      ORCHARD_UNROLL
      for (int r = 0; r < ROWS; r++) {
        mma(s.fragments[r][c], left[r], right);
      }
    }
  }
}

/// s += a b^T; a is ROWS x DEPTH fragments, b is COLS x DEPTH fragments of shared rows. float32
/// sums the depth in four chains: one chain of D products would lose more than unfused math does.
template <int DEPTH, int ROWS, int COLS, typename Left, typename T, typename F, int LD>
METAL_FUNC void mma_ABt(
    thread Tile<float, ROWS, COLS>& s, thread const Left& a, SharedBlock<T, F, LD> b) {
  const int kChains = sizeof(T) == 4 ? 4 : 1;
  mma_ABt_part<DEPTH, kChains>(s, a, b, 0);
  ORCHARD_UNROLL
  for (int chain = 1; chain < kChains; chain++) {
    Tile<float, ROWS, COLS> part;
    zero(part);
    mma_ABt_part<DEPTH, kChains>(part, a, b, chain);
    add(s, part);
  }
}

/// o += p b; p is ROWS x DEPTH fragments, b is DEPTH x COLS fragments of shared rows.
template <int ROWS, int COLS, int DEPTH, typename T, typename F, int LD>
METAL_FUNC void mma_AB(thread Tile<float, ROWS, COLS>& o, thread const Tile<F, ROWS, DEPTH>& p,
    SharedBlock<T, F, LD> b) {
  ORCHARD_UNROLL
  for (int k = 0; k < DEPTH; k++) {
    ORCHARD_UNROLL
    for (int c = 0; c < COLS; c++) {
      const vec<F, 2> right = b.pair(k, c);
      ORCHARD_UNROLL
      for (int r = 0; r < ROWS; r++) {
        mma(o.fragments[r][c], p.fragments[r][k], right);
      }
    }
  }
}

/// Rounds a float tile to operand type F.
template <typename F, int ROWS, int COLS>
METAL_FUNC Tile<F, ROWS, COLS> as_operand(thread const Tile<float, ROWS, COLS>& x) {
  Tile<F, ROWS, COLS> y;
  ORCHARD_UNROLL
  for (int r = 0; r < ROWS; r++) {
    ORCHARD_UNROLL
    for (int c = 0; c < COLS; c++) {
      y.fragments[r][c] = vec<F, 2>(F(x.fragments[r][c].x), F(x.fragments[r][c].y));
    }
  }
  return y;
}

/// Maximum / sum over the four lanes that share a row of a fragment.
METAL_FUNC float row_max(float x) {
  x = max(x, simd_shuffle_xor(x, ushort(1)));
  return max(x, simd_shuffle_xor(x, ushort(8)));
}

METAL_FUNC float row_sum(float x) {
  x += simd_shuffle_xor(x, ushort(1));
  return x + simd_shuffle_xor(x, ushort(8));
}

/// x[row] *= factor[row]
template <int ROWS, int COLS>
METAL_FUNC void mul_row(thread Tile<float, ROWS, COLS>& x, thread const float* factor) {
  ORCHARD_UNROLL
  for (int r = 0; r < ROWS; r++) {
    ORCHARD_UNROLL
    for (int c = 0; c < COLS; c++) {
      x.fragments[r][c] *= factor[r];
    }
  }
}

/// Transposes 8 x 8 fragments of bits: in, bit c of the low half belongs to this lane's first
/// element of fragment c, bit c of the high half to its second; out, the same for the transposed
/// fragments.
METAL_FUNC uint transpose_bits(uint bits, ushort lane) {
  // A row index is lane bits (4, 2, 1), a column index lane bits (3, 0) and the element: swap them.
  const uint by_24 = simd_shuffle_xor(bits, ushort(24));
  bits = ((lane >> 4) & 1) != ((lane >> 3) & 1) ? by_24 : bits;
  const uint by_5 = simd_shuffle_xor(bits, ushort(5));
  bits = ((lane >> 2) & 1) != (lane & 1) ? by_5 : bits;
  const uint by_2 = simd_shuffle_xor(bits, ushort(2));
  return ((lane >> 1) & 1) == 0 ? (bits & 0xffffu) | (by_2 << 16)
                                : (by_2 >> 16) | (bits & 0xffff0000u);
}
