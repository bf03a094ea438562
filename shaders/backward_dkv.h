// Attention backward, the key's side: dk and dv. Transposed throughout, so that P^T and dS^T are
// left operands as they are.
//
//   for each query head of the group, each block of BQ queries:
//     P^T  = exp(scale * K Q^T - lse)     dP^T = drop(V dO^T)
//     dS^T = P^T (dP^T - delta)
//     dV = dV + drop(P^T) dO
//     dK = dK + dS^T Q
//   dv = dV,  dk = scale * dK
//
// A threadgroup takes 8 SIMDGROUPS keys of one key/value head, each simdgroup 8 of them; Q and dO
// are staged once for all. Summing the group's heads here, in order, keeps the result
// deterministic.
#pragma once

#include "dropout.h"
#include "loader.h"
#include "mask.h"
#include "score.h"
#include "softmax.h"

template <typename T, typename F, int BD, int BQ, int SIMDGROUPS, bool VEC, bool DROPOUT>
[[kernel, max_total_threads_per_threadgroup(SIMDGROUPS* ORCHARD_SIMD_WIDTH)]] void
attention_backward_dkv(const device T* query [[buffer(kBufferQuery)]],  // (B, Hq, L, D)
    const device T* key [[buffer(kBufferKey)]],                         // (B, Hkv, S, D)
    const device T* value [[buffer(kBufferValue)]],                     // (B, Hkv, S, D)
    const device float* lse [[buffer(kBufferLse)]],                     // (B, Hq, L)
    const device T* dout [[buffer(kBufferDout)]],                       // (B, Hq, L, D)
    const device float* delta [[buffer(kBufferDelta)]],  // (B, Hq, L), from attention_backward_dq
    device T* dk [[buffer(kBufferDk)]],                  // (B, Hkv, S, D)
    device T* dv [[buffer(kBufferDv)]],                  // (B, Hkv, S, D)
    constant AttentionParams& params [[buffer(kBufferParams)]],
    uint3 group [[threadgroup_position_in_grid]], uint thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  const int kThreads = SIMDGROUPS * ORCHARD_SIMD_WIDTH;
  const int kDepth = BD / 8;
  const int kBlocks = BQ / 8;
  const int LD = StagedRow<T, BD>::kLength;
  threadgroup uint4 q_storage[BQ * LD * sizeof(T) / 16];
  threadgroup uint4 grad_storage[BQ * LD * sizeof(T) / 16];
  threadgroup T* q_block = reinterpret_cast<threadgroup T*>(q_storage);        // (BQ, BD)
  threadgroup T* grad_block = reinterpret_cast<threadgroup T*>(grad_storage);  // (BQ, BD)

  const int batch = group.x / params.num_kv_heads;
  const int kv_head = group.x % params.num_kv_heads;
  const int heads = params.num_heads / params.num_kv_heads;  // of the group
  const int group_key0 = group.y * 8 * SIMDGROUPS;  // early keys first: causally the heaviest
  const int key0 = group_key0 + simdgroup * 8;
  const LanePosition at = lane_position(lane);

  LeftOperand<T, F, 1, kDepth, VEC, BD <= 64> k;
  k.load(head_rows(key, params.k, batch, kv_head, params.kv_len, params.head_dim), key0, at);
  LeftOperand<T, F, 1, kDepth, VEC, BD <= 64> v;
  v.load(head_rows(value, params.v, batch, kv_head, params.kv_len, params.head_dim), key0, at);
  Tile<float, 1, kDepth> dk_sum;
  zero(dk_sum);
  Tile<float, 1, kDepth> dv_sum;
  zero(dv_sum);
  SharedBlock<T, F, LD> q_shared;
  q_shared.rows = q_block;
  q_shared.at = at;
  SharedBlock<T, F, LD> grad_shared;
  grad_shared.rows = grad_block;
  grad_shared.at = at;

  const BlockRange blocks =
      query_blocks(group_key0, min(group_key0 + 8 * SIMDGROUPS, params.kv_len), BQ, params);
  for (int member = 0; member < heads; member++) {
    const int head = kv_head * heads + member;
    const int64_t stats0 = ((int64_t)batch * params.num_heads + head) * params.q_len;
    const HeadRows<T> q_rows =
        head_rows(query, params.q, batch, head, params.q_len, params.head_dim);
    const HeadRows<T> grad_rows =
        head_rows(dout, params.dout, batch, head, params.q_len, params.head_dim);
    const DropoutDraws draws = dropout_draws(batch, head, at, params);
    for (int block = blocks.begin; block < blocks.end; block++) {
      const int row0 = block * BQ;
      threadgroup_barrier(mem_flags::mem_threadgroup);  // the previous block has been read
      load_block<BQ, BD, kThreads, VEC>(q_block, q_rows, row0, thread_index);
      load_block<BQ, BD, kThreads, VEC>(grad_block, grad_rows, row0, thread_index);
      threadgroup_barrier(mem_flags::mem_threadgroup);

      Tile<float, 1, kBlocks> p;  // (8 keys, BQ queries)
      zero(p);
      mma_ABt<kDepth>(p, k, q_shared);
      score(p, params.scale);
      Tile<float, 1, kBlocks> ds;
      zero(ds);
      mma_ABt<kDepth>(ds, v, grad_shared);  // dP^T
      uint kept = 0;
      if (DROPOUT) {
        kept = kept_transposed<kBlocks>(key0, row0, draws, lane);
      }
      Tile<float, 1, kBlocks> dropped;  // drop(P^T)
      const bool all_seen = sees_all(row0, BQ, key0, 8, params);
      ORCHARD_UNROLL
      for (int c = 0; c < kBlocks; c++) {
        ORCHARD_UNROLL
        for (int e = 0; e < 2; e++) {
          const int row = row0 + 8 * c + at.col + e;
          const int64_t stats = stats0 + min(row, params.q_len - 1);
          float w = weight(p.fragments[0][c][e], finite_lse(lse[stats]));
          w = all_seen || sees(row, key0 + at.row, params) ? w : 0.0f;
          float keep = 1.0f;
          if (DROPOUT) {
            keep = (kept >> (16 * e + c)) & 1 ? params.dropout_rescale : 0.0f;
          }
          dropped.fragments[0][c][e] = w * keep;
          ds.fragments[0][c][e] = w * (ds.fragments[0][c][e] * keep - delta[stats]);
        }
      }
      const Tile<F, 1, kBlocks> p_operand = as_operand<F>(dropped);
      mma_AB(dv_sum, p_operand, grad_shared);
      const Tile<F, 1, kBlocks> ds_operand = as_operand<F>(ds);
      mma_AB(dk_sum, ds_operand, q_shared);
    }
  }

  const float dk_factor[1] = {score_derivative(params)};
  const float dv_factor[1] = {1.0f};
  store_rows<VEC>(
      dk, params.dk, batch, kv_head, key0, params.kv_len, params.head_dim, dk_sum, dk_factor, at);
  store_rows<VEC>(
      dv, params.dv, batch, kv_head, key0, params.kv_len, params.head_dim, dv_sum, dv_factor, at);
}
