// Attention backward, the query's side: dq, with dS computed again. Where the key's side has stored
// it: backward_dq_from_ds.h.
//
//   for each block of BK keys:
//     P  = exp(scale * Q K^T - lse)       dP = drop(dO V^T)
//     dS = P (dP - delta)
//     dQ = dQ + dS K
//   dq = scale * dQ
//
// A threadgroup takes BQ = 8 R SIMDGROUPS query rows of one head, each simdgroup 8 R of them; K and
// V are staged once for all. T: tensors, F: operands of S and dP. dS is multiplied as float: over
// long sequences it leaves half's range.
#pragma once

#include "dropout.h"
#include "loader.h"
#include "mask.h"
#include "score.h"
#include "softmax.h"

/// dS = P (dP - delta) with a row-wise delta.
template <int ROWS, int COLS>
METAL_FUNC void dscore(thread Tile<float, ROWS, COLS>& ds, thread const Tile<float, ROWS, COLS>& p,
    thread const Tile<float, ROWS, COLS>& dp, thread const float* delta) {
  ORCHARD_UNROLL
  for (int r = 0; r < ROWS; r++) {
    ORCHARD_UNROLL
    for (int c = 0; c < COLS; c++) {
      ds.fragments[r][c] = p.fragments[r][c] * (dp.fragments[r][c] - delta[r]);
    }
  }
}

template <typename T, typename F, int BD, int R, int BK, int SIMDGROUPS, bool VEC, bool DROPOUT>
[[kernel, max_total_threads_per_threadgroup(SIMDGROUPS* ORCHARD_SIMD_WIDTH)]] void
attention_backward_dq(const device T* query [[buffer(kBufferQuery)]],  // (B, Hq, L, D)
    const device T* key [[buffer(kBufferKey)]],                        // (B, Hkv, S, D)
    const device T* value [[buffer(kBufferValue)]],                    // (B, Hkv, S, D)
    const device float* lse [[buffer(kBufferLse)]],                    // (B, Hq, L)
    const device T* dout [[buffer(kBufferDout)]],                      // (B, Hq, L, D)
    const device float* delta [[buffer(kBufferDelta)]],                // (B, Hq, L)
    device T* dq [[buffer(kBufferDq)]],                                // (B, Hq, L, D)
    constant AttentionParams& params [[buffer(kBufferParams)]],
    uint3 group [[threadgroup_position_in_grid]], uint3 grid [[threadgroups_per_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  const int kThreads = SIMDGROUPS * ORCHARD_SIMD_WIDTH;
  const int kDepth = BD / 8;
  const int BQ = 8 * R * SIMDGROUPS;
  const bool kKeep = R * BD * (4 + 2 * sizeof(F)) / 16 <= ORCHARD_OPERAND_REGISTERS;  // dQ, Q, dO
  const int kChunks = BK * StagedRow<F, BD>::kLength * sizeof(F) / 16;  // of a staged block
  threadgroup uint4 k_storage[kChunks];
  threadgroup uint4 v_storage[kChunks];
  threadgroup F* k_block = reinterpret_cast<threadgroup F*>(k_storage);  // (BK, BD)
  threadgroup F* v_block = reinterpret_cast<threadgroup F*>(v_storage);  // (BK, BD)

  const int batch = group.x / params.num_heads;
  const int head = group.x % params.num_heads;
  const int kv_head = head / (params.num_heads / params.num_kv_heads);
  const int group_row0 = (grid.y - 1 - group.y) * BQ;  // heaviest first, as in the forward
  const int row0 = group_row0 + simdgroup * 8 * R;
  const LanePosition at = lane_position(lane);
  const HeadRows<T> q_rows = head_rows(query, params.q, batch, head, params.q_len, params.head_dim);
  const HeadRows<T> grad_rows =
      head_rows(dout, params.dout, batch, head, params.q_len, params.head_dim);
  const HeadRows<T> k_rows =
      head_rows(key, params.k, batch, kv_head, params.kv_len, params.head_dim);
  const HeadRows<T> v_rows =
      head_rows(value, params.v, batch, kv_head, params.kv_len, params.head_dim);
  const BlockRange blocks = key_blocks(group_row0, min(group_row0 + BQ, params.q_len), BK, params);

  LeftOperand<T, F, R, kDepth, VEC, kKeep> q;
  q.load(device_rows<VEC>(q_rows, row0, at));
  LeftOperand<T, F, R, kDepth, VEC, kKeep> grad;
  grad.load(device_rows<VEC>(grad_rows, row0, at));
  RightOperand<T, F, BK, BD, kThreads, VEC, true> k;
  k.start(k_rows, blocks.begin * BK, k_block, thread_index, at);
  RightOperand<T, F, BK, BD, kThreads, VEC, true> v;
  v.start(v_rows, blocks.begin * BK, v_block, thread_index, at);
  float row_lse[R];
  float row_delta[R];
  ORCHARD_UNROLL
  for (int r = 0; r < R; r++) {
    const int row = min(row0 + 8 * r + at.row, params.q_len - 1);
    const int64_t stats = (int64_t)group.x * params.q_len + row;
    row_lse[r] = finite_lse(lse[stats]);
    row_delta[r] = delta[stats];
  }
  Tile<float, R, kDepth> sum;
  zero(sum);
  const DropoutDraws draws = dropout_draws(batch, head, at, params);
  const Unmasked unmasked = unmasked_keys(row0, 8 * R, BK, params);

  for (int block = blocks.begin; block < blocks.end; block++) {
    const int key0 = block * BK;
    k.fetch();
    v.fetch();
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the previous block has been read
    k.store();
    v.store();
    threadgroup_barrier(mem_flags::mem_threadgroup);

    Tile<float, R, BK / 8> p;
    zero(p);
    mma_ABt<F, kDepth, Chains<T>::kCount>(p, q, k);
    score(p, params.scale);
    weights(p, row_lse);
    if (!unmasked.has(key0)) {
      mask_tile(p, row0, key0, 0.0f, at, params);
    }
    Tile<float, R, BK / 8> dp;
    zero(dp);
    mma_ABt<F, kDepth, Chains<T>::kCount>(dp, grad, v);
    if (DROPOUT) {
      drop(dp, row0, key0, draws);
      float rescale[R];
      ORCHARD_UNROLL
      for (int r = 0; r < R; r++) {
        rescale[r] = params.dropout_rescale;
      }
      mul_row(dp, rescale);
    }
    Tile<float, R, BK / 8> ds;
    dscore(ds, p, dp, row_delta);
    mma_AB(sum, ds, k);
    k.advance();
    v.advance();
  }

  float factor[R];
  ORCHARD_UNROLL
  for (int r = 0; r < R; r++) {
    factor[r] = score_derivative(params);
  }
  store_rows<VEC>(dq, params.dq, batch, head, row0, params.q_len, params.head_dim, sum, factor, at);
}
