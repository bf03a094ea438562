// Register tiles of 8 x 8 fragments and the few verbs the kernels are written in. The only file
// that knows simdgroup matrices.
#pragma once

#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
#include <metal_stdlib>
using namespace metal;

#define ORCHARD_UNROLL _Pragma("clang loop unroll(full)")

/// All threads of the threadgroup have come here, and see what any of them has stored.
template <bool NEEDED>
METAL_FUNC void barrier_if() {
  if (NEEDED) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

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

/// A pair of elements as the matrix unit's operand type F.
template <typename F, typename T>
METAL_FUNC vec<F, 2> operand(vec<T, 2> x) {
  return vec<F, 2>(F(x.x), F(x.y));
}

/// A block of rows in threadgroup memory, LD elements apart, read as fragments.
template <typename F, int LD>
struct SharedBlock {
  const threadgroup F* rows;
  LanePosition at;

  /// Fragment (r, c) as it lies.
  METAL_FUNC vec<F, 2> pair(int r, int c) const {
    const threadgroup F* p = rows + (8 * r + at.row) * LD + 8 * c + at.col;
    return *reinterpret_cast<const threadgroup vec<F, 2>*>(p);
  }

  /// Fragment (c, r) of the transposed block.
  METAL_FUNC vec<F, 2> transposed(int r, int c) const {
    const threadgroup F* p = rows + (8 * r + at.col) * LD + 8 * c + at.row;
    return vec<F, 2>(p[0], p[LD]);
  }
};

/// In how many chains products of T are summed along the depth: one chain of D float32 products
/// would lose more than unfused math does.
template <typename T>
struct Chains {
  static constant constexpr const int kCount = sizeof(T) == 4 ? 4 : 1;
};

/// s += a b^T over fragments first, first + STEP, ... of the depth.
template <typename F, int DEPTH, int STEP, int ROWS, int COLS, typename Left, typename Right>
METAL_FUNC void mma_ABt_part(
    thread Tile<float, ROWS, COLS>& s, thread const Left& a, thread const Right& b, int first) {
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

/// s += a b^T; a is ROWS x DEPTH fragments, b COLS x DEPTH, both of type F. The depth is summed in
/// CHAINS chains.
template <typename F, int DEPTH, int CHAINS, int ROWS, int COLS, typename Left, typename Right>
METAL_FUNC void mma_ABt(
    thread Tile<float, ROWS, COLS>& s, thread const Left& a, thread const Right& b) {
  mma_ABt_part<F, DEPTH, CHAINS>(s, a, b, 0);
  ORCHARD_UNROLL
  for (int chain = 1; chain < CHAINS; chain++) {
    Tile<float, ROWS, COLS> part;
    zero(part);
    mma_ABt_part<F, DEPTH, CHAINS>(part, a, b, chain);
    add(s, part);
  }
}

/// o += p b; p is ROWS x DEPTH fragments, b is DEPTH x COLS fragments, converted to p's type.
template <int ROWS, int COLS, int DEPTH, typename P, typename Right>
METAL_FUNC void mma_AB(thread Tile<float, ROWS, COLS>& o, thread const Tile<P, ROWS, DEPTH>& p,
    thread const Right& b) {
  ORCHARD_UNROLL
  for (int k = 0; k < DEPTH; k++) {
    ORCHARD_UNROLL
    for (int c = 0; c < COLS; c++) {
      const vec<P, 2> right = operand<P>(b.pair(k, c));
      ORCHARD_UNROLL
      for (int r = 0; r < ROWS; r++) {
        mma(o.fragments[r][c], p.fragments[r][k], right);
      }
    }
  }
}

/// Where PARTS neighbouring simdgroups, each with a part of the depth, add their products up.
template <int PARTS, int COLS>
struct PartialTiles {
  threadgroup float2* storage;  // (simdgroup, column, lane)
  ushort simdgroup;
  ushort lane;

  METAL_FUNC threadgroup float2* of(int part, int c) const {
    const int first = simdgroup / PARTS * PARTS;
    return storage + ((first + part) * COLS + c) * 32 + lane;
  }

  METAL_FUNC void put(thread const Tile<float, 1, COLS>& x) const {
    ORCHARD_UNROLL
    for (int c = 0; c < COLS; c++) {
      *of(simdgroup % PARTS, c) = x.fragments[0][c];
    }
  }

  /// All parts get the same bits: two whichever is added to which, more in the order of the parts.
  METAL_FUNC void sum(thread Tile<float, 1, COLS>& x) const {
    ORCHARD_UNROLL
    for (int c = 0; c < COLS; c++) {
      if (PARTS == 2) {
        x.fragments[0][c] += *of(1 - simdgroup % PARTS, c);
      } else {
        x.fragments[0][c] = *of(0, c);
        ORCHARD_UNROLL
        for (int part = 1; part < PARTS; part++) {
          x.fragments[0][c] += *of(part, c);
        }
      }
    }
  }
};

template <int PARTS, int COLS>
METAL_FUNC PartialTiles<PARTS, COLS> partial_tiles(
    threadgroup float2* storage, ushort simdgroup, ushort lane) {
  PartialTiles<PARTS, COLS> tiles;
  tiles.storage = storage;
  tiles.simdgroup = simdgroup;
  tiles.lane = lane;
  return tiles;
}

/// Rounds a float tile to operand type F.
template <typename F, int ROWS, int COLS>
METAL_FUNC Tile<F, ROWS, COLS> as_operand(thread const Tile<float, ROWS, COLS>& x) {
  Tile<F, ROWS, COLS> y;
  ORCHARD_UNROLL
  for (int r = 0; r < ROWS; r++) {
    ORCHARD_UNROLL
    for (int c = 0; c < COLS; c++) {
      y.fragments[r][c] = operand<F>(x.fragments[r][c]);
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
