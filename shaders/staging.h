// Pairs of right operands on their way through a kernel's loop, with the barriers that staging
// needs: K and V where the loop runs over keys, Q and dO where it runs over queries.
#pragma once

#include "loader.h"

/// Makes both operands take a block without a guard, or both with one: the two widths may differ,
/// and kernels shall ask once.
template <typename First, typename Second>
METAL_FUNC void guard_alike(thread First& a, thread Second& b) {
  const uint whole = min(a.loader.whole, b.loader.whole);
  a.loader.whole = whole;
  b.loader.whole = whole;
}

/// K and V of a head, BK keys at a time, of padded head dims BD and VALUE_BD <= BD. BUFFERS: 2,
/// staged side by side; 1, staged one after the other in the same threadgroup memory; 0, read from
/// device memory by each simdgroup.
template <typename T, typename F, int BK, int BD, int THREADS, bool VEC, int BUFFERS,
    int VALUE_BD = BD>
struct KeyValueBlocks {
  static constant constexpr const int kChunks = BK * StagedRow<F, BD>::kLength * sizeof(F) / 16;
  static constant constexpr const int kOfValues =
      BK * StagedRow<F, VALUE_BD>::kLength * sizeof(F) / 16;
  static constant constexpr const int kStorage = BUFFERS == 2   ? kChunks + kOfValues
                                                 : BUFFERS == 1 ? kChunks
                                                                : 1;  // of 16 bytes

  RightOperand<T, F, BK, BD, THREADS, VEC, (BUFFERS > 0)> k;
  RightOperand<T, F, BK, VALUE_BD, THREADS, VEC, (BUFFERS > 0)> v;

  METAL_FUNC void start(HeadRows<T> keys, HeadRows<T> values, int key0, threadgroup uint4* storage,
      uint thread_index, LanePosition at) {
    threadgroup uint4* value_storage = storage + (BUFFERS == 2 ? kChunks : 0);
    k.start(keys, key0, reinterpret_cast<threadgroup F*>(storage), thread_index, at);
    v.start(values, key0, reinterpret_cast<threadgroup F*>(value_storage), thread_index, at);
    guard_alike(k, v);
  }

  /// Behind it K can be read; with two buffers V as well. Keys that are not `seen` are zero.
  template <typename Seen>
  METAL_FUNC void stage_keys(Seen seen) {
    k.fetch(seen);
    if (BUFFERS == 2) {
      v.fetch(seen);
    }
    barrier_if<(BUFFERS > 0)>();  // the previous block has been read
    k.store(seen);
    if (BUFFERS == 2) {
      v.store(seen);
    }
    barrier_if<(BUFFERS > 0)>();
  }

  /// K is read no more; V is on its way.
  template <typename Seen>
  METAL_FUNC void stage_values(Seen seen) {
    if (BUFFERS == 1) {
      v.fetch(seen);
    }
    barrier_if<BUFFERS == 1>();  // K has been read
    if (BUFFERS == 1) {
      v.store(seen);
    }
  }

  /// Behind it V can be read.
  METAL_FUNC void wait_for_values() const { barrier_if<BUFFERS == 1>(); }

  /// To the keys so many blocks on.
  METAL_FUNC void advance(int blocks) {
    k.advance(blocks);
    v.advance(blocks);
  }
};

/// Q and dO of a head, BQ queries at a time, of padded head dims BD and VALUE_BD <= BD, staged side
/// by side in rows of one length.
template <typename T, typename F, int BQ, int BD, int THREADS, bool VEC, int VALUE_BD = BD>
struct QueryBlocks {
  static constant constexpr const int kChunks = BQ * StagedRow<F, BD>::kLength * sizeof(F) / 16;
  static constant constexpr const int kStorage = 2 * kChunks;  // of 16 bytes

  RightOperand<T, F, BQ, BD, THREADS, VEC, true> q;
  RightOperand<T, F, BQ, VALUE_BD, THREADS, VEC, true, BD> dout;

  METAL_FUNC void start(HeadRows<T> queries, HeadRows<T> gradients, int row0,
      threadgroup uint4* storage, uint thread_index, LanePosition at) {
    q.start(queries, row0, reinterpret_cast<threadgroup F*>(storage), thread_index, at);
    dout.start(
        gradients, row0, reinterpret_cast<threadgroup F*>(storage + kChunks), thread_index, at);
    guard_alike(q, dout);
  }

  /// Behind it both can be read. Rows that are not `seen` are zero.
  template <typename Seen>
  METAL_FUNC void stage(Seen seen) {
    q.fetch(seen);
    dout.fetch(seen);
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the previous block has been read
    q.store(seen);
    dout.store(seen);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  /// To the queries so many blocks on.
  METAL_FUNC void advance(int blocks) {
    q.advance(blocks);
    dout.advance(blocks);
  }
};
