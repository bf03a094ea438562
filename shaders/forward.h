// Attention forward: out and lse.
//
//   for each block of BK keys:
//     S = scale * Q K^T            rows of the simdgroup x BK
//     where S exceeds m by more than 8, m moves to the row's maximum, and O and l are rescaled
//     P = exp2(S - m)
//     O = O + drop(P) V;  l = l + rowsum(P)
//   out = O / l,  lse = log(l) + m
//
// A threadgroup takes BQ = 8 R SIMDGROUPS query rows of one head, each simdgroup 8 R of them with
// Q, S, P and O in registers. T: tensors, F: operands of the matrix unit. K and V reach it by
// BUFFERS: 2, staged side by side for all simdgroups; 1, staged one after the other in the same
// threadgroup memory; 0, read from device memory by each simdgroup.
#pragma once

#include "dropout.h"
#include "loader.h"
#include "mask.h"
#include "score.h"
#include "softmax.h"

template <typename T, typename F, int BD, int R, int BK, int BUFFERS, int SIMDGROUPS, bool VEC,
    bool DROPOUT>
[[kernel, max_total_threads_per_threadgroup(SIMDGROUPS* ORCHARD_SIMD_WIDTH)]] void
attention_forward(const device T* query [[buffer(kBufferQuery)]],  // (B, Hq, L, D)
    const device T* key [[buffer(kBufferKey)]],                    // (B, Hkv, S, D)
    const device T* value [[buffer(kBufferValue)]],                // (B, Hkv, S, D)
    device T* out [[buffer(kBufferOut)]],                          // (B, Hq, L, D)
    device float* lse [[buffer(kBufferLse)]],                      // (B, Hq, L)
    constant AttentionParams& params [[buffer(kBufferParams)]],
    uint3 group [[threadgroup_position_in_grid]], uint3 grid [[threadgroups_per_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  const int kThreads = SIMDGROUPS * ORCHARD_SIMD_WIDTH;
  const int kDepth = BD / 8;
  const int BQ = 8 * R * SIMDGROUPS;
  const bool kKeepQ = R * BD * (4 + sizeof(F)) / 16 <= ORCHARD_OPERAND_REGISTERS;
  const int kChunks = BK * StagedRow<F, BD>::kLength * sizeof(F) / 16;  // of a staged block
  threadgroup uint4 storage[BUFFERS > 0 ? BUFFERS * kChunks : 1];
  threadgroup F* k_block = reinterpret_cast<threadgroup F*>(storage);  // (BK, BD)
  threadgroup F* v_block =                                             // (BK, BD)
      reinterpret_cast<threadgroup F*>(storage + (BUFFERS == 2 ? kChunks : 0));

  // Heads run fastest and late rows first: under a causal mask the heaviest blocks start first.
  const int batch = group.x / params.num_heads;
  const int head = group.x % params.num_heads;
  const int kv_head = head / (params.num_heads / params.num_kv_heads);
  const int group_row0 = (grid.y - 1 - group.y) * BQ;
  const int row0 = group_row0 + simdgroup * 8 * R;
  const LanePosition at = lane_position(lane);
  const HeadRows<T> q_rows = head_rows(query, params.q, batch, head, params.q_len, params.head_dim);
  const HeadRows<T> k_rows =
      head_rows(key, params.k, batch, kv_head, params.kv_len, params.head_dim);
  const HeadRows<T> v_rows =
      head_rows(value, params.v, batch, kv_head, params.kv_len, params.head_dim);
  const BlockRange blocks = key_blocks(group_row0, min(group_row0 + BQ, params.q_len), BK, params);

  LeftOperand<T, F, R, kDepth, VEC, kKeepQ> q;
  q.load(device_rows<VEC>(q_rows, row0, at));
  RightOperand<T, F, BK, BD, kThreads, VEC, (BUFFERS > 0)> k;
  k.start(k_rows, blocks.begin * BK, k_block, thread_index, at);
  RightOperand<T, F, BK, BD, kThreads, VEC, (BUFFERS > 0)> v;
  v.start(v_rows, blocks.begin * BK, v_block, thread_index, at);
  Tile<float, R, kDepth> o;
  zero(o);
  OnlineSoftmax<R> softmax;
  softmax.init();
  const DropoutDraws draws = dropout_draws(batch, head, at, params);
  const Unmasked unmasked = unmasked_keys(row0, 8 * R, BK, params);

  for (int block = blocks.begin; block < blocks.end; block++) {
    const int key0 = block * BK;
    k.fetch();
    if (BUFFERS == 2) {
      v.fetch();
    }
    barrier_if<(BUFFERS > 0)>();  // the previous block has been read
    k.store();
    if (BUFFERS == 2) {
      v.store();
    }
    barrier_if<(BUFFERS > 0)>();

    Tile<float, R, BK / 8> s;
    zero(s);
    mma_ABt<F, kDepth, Chains<T>::kCount>(s, q, k);
    if (BUFFERS == 1) {
      v.fetch();
    }
    barrier_if<BUFFERS == 1>();  // K has been read
    if (BUFFERS == 1) {
      v.store();
    }
    score(s, params.scale_log2);
    if (!unmasked.has(key0)) {
      mask_tile(s, row0, key0, -INFINITY, at, params);
    }
    softmax.update(s, o);  // s is P now
    if (DROPOUT) {
      drop(s, row0, key0, draws);
    }
    const Tile<F, R, BK / 8> p = as_operand<F>(s);
    barrier_if<BUFFERS == 1>();
    mma_AB(o, p, v);
    k.advance();
    v.advance();
  }

  float factor[R];
  ORCHARD_UNROLL
  for (int r = 0; r < R; r++) {
    const float total = softmax.total(r);
    factor[r] = total == 0.0f ? 0.0f : (DROPOUT ? params.dropout_rescale : 1.0f) / total;
    const int row = row0 + 8 * r + at.row;
    if (row < params.q_len && at.col == 0) {
      lse[(int64_t)group.x * params.q_len + row] = softmax.lse(r, total);
    }
  }
  store_rows<VEC>(out, params.out, batch, head, row0, params.q_len, params.head_dim, o, factor, at);
}
