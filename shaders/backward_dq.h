// Attention backward, the query's side: delta and dq.
//
//   delta = rowsum(dO * O) - dlse
//   for each block of BK keys:
//     P  = exp(scale * Q K^T - lse)       dP = drop(dO V^T)
//     dS = P (dP - delta)
//     dQ = dQ + dS K
//   dq = scale * dQ
//
// A threadgroup takes BQ = 8 R SIMDGROUPS query rows of one head, each simdgroup 8 R of them; K and
// V are staged once for all.
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
    const device T* out [[buffer(kBufferOut)]],                        // (B, Hq, L, D)
    const device float* lse [[buffer(kBufferLse)]],                    // (B, Hq, L)
    const device T* dout [[buffer(kBufferDout)]],                      // (B, Hq, L, D)
    const device float* dlse [[buffer(kBufferDlse)]],  // (B, Hq, L), read if params.has_dlse
    device float* delta [[buffer(kBufferDelta)]],      // (B, Hq, L)
    device T* dq [[buffer(kBufferDq)]],                // (B, Hq, L, D)
    constant AttentionParams& params [[buffer(kBufferParams)]],
    uint3 group [[threadgroup_position_in_grid]], uint3 grid [[threadgroups_per_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  const int kThreads = SIMDGROUPS * ORCHARD_SIMD_WIDTH;
  const int kDepth = BD / 8;
  const int BQ = 8 * R * SIMDGROUPS;
  const int LD = StagedRow<T, BD>::kLength;
  threadgroup uint4 k_storage[BK * LD * sizeof(T) / 16];
  threadgroup uint4 v_storage[BK * LD * sizeof(T) / 16];
  threadgroup T* k_block = reinterpret_cast<threadgroup T*>(k_storage);  // (BK, BD)
  threadgroup T* v_block = reinterpret_cast<threadgroup T*>(v_storage);  // (BK, BD)

  const int batch = group.x / params.num_heads;
  const int head = group.x % params.num_heads;
  const int kv_head = head / (params.num_heads / params.num_kv_heads);
  const int group_row0 = (grid.y - 1 - group.y) * BQ;  // heaviest first, as in the forward
  const int row0 = group_row0 + simdgroup * 8 * R;
  const int64_t stats0 = (int64_t)group.x * params.q_len;  // this head's rows of lse and delta
  const LanePosition at = lane_position(lane);
  const HeadRows<T> k_rows =
      head_rows(key, params.k, batch, kv_head, params.kv_len, params.head_dim);
  const HeadRows<T> v_rows =
      head_rows(value, params.v, batch, kv_head, params.kv_len, params.head_dim);

  LeftOperand<T, F, R, kDepth, VEC, BD <= 64> q;
  q.load(head_rows(query, params.q, batch, head, params.q_len, params.head_dim), row0, at);
  LeftOperand<T, F, R, kDepth, VEC, BD <= 64> grad;
  grad.load(head_rows(dout, params.dout, batch, head, params.q_len, params.head_dim), row0, at);
  DeviceRows<T, float, VEC> grad_rows;
  grad_rows.rows = head_rows(dout, params.dout, batch, head, params.q_len, params.head_dim);
  grad_rows.row0 = row0;
  grad_rows.at = at;
  DeviceRows<T, float, VEC> out_rows;
  out_rows.rows = head_rows(out, params.out, batch, head, params.q_len, params.head_dim);
  out_rows.row0 = row0;
  out_rows.at = at;

  float row_lse[R];
  float row_delta[R];
  ORCHARD_UNROLL
  for (int r = 0; r < R; r++) {
    const int row = row0 + 8 * r + at.row;
    const bool inside = row < params.q_len;
    float part = 0.0f;
    ORCHARD_UNROLL
    for (int d = 0; d < kDepth; d++) {
      const float2 product = grad_rows.pair(r, d) * out_rows.pair(r, d);
      part += product.x + product.y;
    }
    row_delta[r] = row_sum(part);
    if (inside && params.has_dlse) {
      row_delta[r] -= dlse[stats0 + row];
    }
    row_lse[r] = inside ? finite_lse(lse[stats0 + row]) : 0.0f;
    if (inside && at.col == 0) {
      delta[stats0 + row] = row_delta[r];
    }
  }

  Tile<float, R, kDepth> sum;
  zero(sum);
  const DropoutDraws draws = dropout_draws(batch, head, at, params);
  SharedBlock<T, F, LD> k_shared;
  k_shared.rows = k_block;
  k_shared.at = at;
  SharedBlock<T, F, LD> v_shared;
  v_shared.rows = v_block;
  v_shared.at = at;

  const BlockRange blocks = key_blocks(group_row0, min(group_row0 + BQ, params.q_len), BK, params);
  for (int block = blocks.begin; block < blocks.end; block++) {
    const int key0 = block * BK;
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the previous block has been read
    load_block<BK, BD, kThreads, VEC>(k_block, k_rows, key0, thread_index);
    load_block<BK, BD, kThreads, VEC>(v_block, v_rows, key0, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);

    Tile<float, R, BK / 8> p;
    zero(p);
    mma_ABt<kDepth>(p, q, k_shared);
    score(p, params.scale);
    weights(p, row_lse);
    if (!sees_all(row0, 8 * R, key0, BK, params)) {
      mask_tile(p, row0, key0, 0.0f, at, params);
    }
    Tile<float, R, BK / 8> dp;
    zero(dp);
    mma_ABt<kDepth>(dp, grad, v_shared);
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
    const Tile<F, R, BK / 8> ds_operand = as_operand<F>(ds);
    mma_AB(sum, ds_operand, k_shared);
  }

  float factor[R];
  ORCHARD_UNROLL
  for (int r = 0; r < R; r++) {
    factor[r] = score_derivative(params);
  }
  store_rows<VEC>(dq, params.dq, batch, head, row0, params.q_len, params.head_dim, sum, factor, at);
}
