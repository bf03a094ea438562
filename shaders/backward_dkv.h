// Attention backward, the key's side: dk and dv, and dS for the query's side. Transposed
// throughout, so that P^T and dS^T are left operands as they are.
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
// deterministic. T: tensors, F: operands. dS is multiplied as float: over long sequences it leaves
// half's range. P is at most 1, and scaled up. K, V, dK and dV stay in registers; wide heads, where
// they would not fit: backward_dkv_pairs.h.
#pragma once

#include "dropout.h"
#include "dscore.h"
#include "loader.h"
#include "mask.h"
#include "score.h"
#include "softmax.h"

template <typename T, typename F, int BD, int BQ, bool STORE_DS, int SIMDGROUPS, bool VEC,
    bool DROPOUT>
[[kernel, max_total_threads_per_threadgroup(SIMDGROUPS* ORCHARD_SIMD_WIDTH)]] void
attention_backward_dkv(const device T* query [[buffer(kBufferQuery)]],  // (B, Hq, L, D)
    const device T* key [[buffer(kBufferKey)]],                         // (B, Hkv, S, D)
    const device T* value [[buffer(kBufferValue)]],                     // (B, Hkv, S, D)
    const device float* lse [[buffer(kBufferLse)]],                     // (B, Hq, L)
    const device T* dout [[buffer(kBufferDout)]],                       // (B, Hq, L, D)
    const device float* delta [[buffer(kBufferDelta)]],                 // (B, Hq, L)
    device T* dk [[buffer(kBufferDk)]],                                 // (B, Hkv, S, D)
    device T* dv [[buffer(kBufferDv)]],                                 // (B, Hkv, S, D)
    device float* ds [[buffer(kBufferDs)]],  // DscoreTiles, written if STORE_DS
    constant AttentionParams& params [[buffer(kBufferParams)]],
    uint3 group [[threadgroup_position_in_grid]], uint thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  const int kThreads = SIMDGROUPS * ORCHARD_SIMD_WIDTH;
  const int kKeys = 8 * SIMDGROUPS;
  const int kDepth = BD / 8;
  const int kBlocks = BQ / 8;
  const float kPScale = sizeof(F) == 2 ? 32768.0f : 1.0f;  // half's normal numbers from 2^-29 on
  const int kChunks = BQ * StagedRow<F, BD>::kLength * sizeof(F) / 16;  // of a staged block
  threadgroup uint4 storage[2 * kChunks];
  threadgroup F* q_block = reinterpret_cast<threadgroup F*>(storage);               // (BQ, BD)
  threadgroup F* grad_block = reinterpret_cast<threadgroup F*>(storage + kChunks);  // (BQ, BD)

  const int kv_index = group.x + params.first_kv_head;
  const int batch = kv_index / params.num_kv_heads;
  const int kv_head = kv_index % params.num_kv_heads;
  const int heads = params.num_heads / params.num_kv_heads;   // of the group
  const int group_key0 = params.key_begin + group.y * kKeys;  // early keys first: the heaviest
  const int key0 = group_key0 + simdgroup * 8;
  const LanePosition at = lane_position(lane);
  const HeadRows<T> k_rows =
      head_rows(key, params.k, batch, kv_head, params.kv_len, params.head_dim);
  const HeadRows<T> v_rows =
      head_rows(value, params.v, batch, kv_head, params.kv_len, params.head_dim);
  const BlockRange blocks =
      query_blocks(group_key0, min(group_key0 + kKeys, params.kv_len), BQ, params);

  LeftOperand<T, F, 1, kDepth, VEC, true> k;
  k.load(device_rows<VEC>(k_rows, key0, at));
  LeftOperand<T, F, 1, kDepth, VEC, true> v;
  v.load(device_rows<VEC>(v_rows, key0, at));
  Tile<float, 1, kDepth> dk_sum;
  zero(dk_sum);
  Tile<float, 1, kDepth> dv_sum;
  zero(dv_sum);
  const Unmasked unmasked = unmasked_rows(key0, 8, BQ, params);

  for (int member = 0; member < heads; member++) {
    const int head = kv_head * heads + member;
    const int64_t stats0 = ((int64_t)batch * params.num_heads + head) * params.q_len;
    const DropoutDraws draws = dropout_draws(batch, head, at, params);
    const DscoreTiles ds_tiles = dscore_tiles(ds, group.x * heads + member, at, params);
    RightOperand<T, F, BQ, BD, kThreads, VEC, true> q;
    q.start(head_rows(query, params.q, batch, head, params.q_len, params.head_dim),
        blocks.begin * BQ, q_block, thread_index, at);
    RightOperand<T, F, BQ, BD, kThreads, VEC, true> grad;
    grad.start(head_rows(dout, params.dout, batch, head, params.q_len, params.head_dim),
        blocks.begin * BQ, grad_block, thread_index, at);
    for (int block = blocks.begin; block < blocks.end; block++) {
      const int row0 = block * BQ;
      ColumnStats<kBlocks> row_lse;  // asked for early: they come from device memory
      row_lse.load(lse + stats0, row0, params.q_len, at);
      ColumnStats<kBlocks> row_delta;
      row_delta.load(delta + stats0, row0, params.q_len, at);
      q.fetch();
      grad.fetch();
      threadgroup_barrier(mem_flags::mem_threadgroup);  // the previous block has been read
      q.store();
      grad.store();
      threadgroup_barrier(mem_flags::mem_threadgroup);

      Tile<float, 1, kBlocks> p;  // (8 keys, BQ queries)
      zero(p);
      mma_ABt<F, kDepth, Chains<T>::kCount>(p, k, q);
      score(p, params.scale);
      weights_transposed(p, row_lse);
      if (!unmasked.has(row0)) {
        mask_transposed(p, key0, row0, at, params);
      }
      Tile<float, 1, kBlocks> ds_block;
      zero(ds_block);
      mma_ABt<F, kDepth, Chains<T>::kCount>(ds_block, v, grad);  // dP^T
      uint kept = 0;
      if (DROPOUT) {
        kept = kept_transposed<kBlocks>(key0, row0, draws, lane);
        drop_transposed(ds_block, kept, params.dropout_rescale);
      }
      dscore_transposed(ds_block, p, row_delta);
      if (STORE_DS) {
        store_dscore(ds_tiles, key0, row0, ds_block, params);
      }
      if (DROPOUT) {
        drop_transposed(p, kept, kPScale);
      } else {
        score(p, kPScale);
      }
      const Tile<F, 1, kBlocks> p_operand = as_operand<F>(p);
      mma_AB(dv_sum, p_operand, grad);
      mma_AB(dk_sum, ds_block, q);
      q.advance();
      grad.advance();
    }
  }

  const float dk_factor[1] = {score_derivative(params)};
  const float dv_factor[1] = {(DROPOUT ? params.dropout_rescale : 1.0f) / kPScale};
  store_rows<VEC>(
      dk, params.dk, batch, kv_head, key0, params.kv_len, params.head_dim, dk_sum, dk_factor, at);
  store_rows<VEC>(
      dv, params.dv, batch, kv_head, key0, params.kv_len, params.head_dim, dv_sum, dv_factor, at);
}
