// Attention backward, the key's side, for wide heads: as backward_dkv.h, by pairs of simdgroups. K,
// V, dK and dV of 8 keys fill more registers than a simdgroup has, so that
//
//   the first of a pair:   P^T = exp(scale * K Q^T - lse)       dV = dV + drop(P^T) dO
//   the second:            dS^T = P^T (drop(V dO^T) - delta)    dK = dK + dS^T Q
//
// with P^T handed over in threadgroup memory. Both do the same two products, of other matrices. A
// threadgroup takes 4 SIMDGROUPS keys. P and dS are multiplied as float.
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
attention_backward_dkv_pairs(const device T* query [[buffer(kBufferQuery)]],  // (B, Hq, L, D)
    const device T* key [[buffer(kBufferKey)]],                               // (B, Hkv, S, D)
    const device T* value [[buffer(kBufferValue)]],                           // (B, Hkv, S, D)
    const device float* lse [[buffer(kBufferLse)]],                           // (B, Hq, L)
    const device T* dout [[buffer(kBufferDout)]],                             // (B, Hq, L, D)
    const device float* delta [[buffer(kBufferDelta)]],                       // (B, Hq, L)
    device T* dk [[buffer(kBufferDk)]],                                       // (B, Hkv, S, D)
    device T* dv [[buffer(kBufferDv)]],                                       // (B, Hkv, S, D)
    device float* ds [[buffer(kBufferDs)]],  // DscoreTiles, written if STORE_DS
    constant AttentionParams& params [[buffer(kBufferParams)]],
    uint3 group [[threadgroup_position_in_grid]], uint thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  const int kThreads = SIMDGROUPS * ORCHARD_SIMD_WIDTH;
  const int kKeys = 8 * SIMDGROUPS / 2;
  const int kDepth = BD / 8;
  const int kBlocks = BQ / 8;
  const bool kKeep = BD * (4 + sizeof(F)) / 16 <= ORCHARD_OPERAND_REGISTERS;  // dK or dV, K or V
  const int kChunks = BQ * StagedRow<F, BD>::kLength * sizeof(F) / 16;        // of a staged block
  const int kHandedOver = SIMDGROUPS / 2 * kBlocks * ORCHARD_SIMD_WIDTH / 2;  // chunks of P^T
  threadgroup uint4 storage[2 * kChunks + kHandedOver];
  threadgroup F* q_block = reinterpret_cast<threadgroup F*>(storage);               // (BQ, BD)
  threadgroup F* grad_block = reinterpret_cast<threadgroup F*>(storage + kChunks);  // (BQ, BD)

  const int kv_index = group.x + params.first_kv_head;
  const int batch = kv_index / params.num_kv_heads;
  const int kv_head = kv_index % params.num_kv_heads;
  const int heads = params.num_heads / params.num_kv_heads;   // of the group
  const int group_key0 = params.key_begin + group.y * kKeys;  // early keys first: the heaviest
  const int pair = simdgroup / 2;
  const bool second = simdgroup % 2 == 1;
  const int key0 = group_key0 + pair * 8;
  const LanePosition at = lane_position(lane);
  const HeadRows<T> k_rows =
      head_rows(key, params.k, batch, kv_head, params.kv_len, params.head_dim);
  const HeadRows<T> v_rows =
      head_rows(value, params.v, batch, kv_head, params.kv_len, params.head_dim);
  const BlockRange blocks =
      query_blocks(group_key0, min(group_key0 + kKeys, params.kv_len), BQ, params);

  LeftOperand<T, F, 1, kDepth, VEC, kKeep> left;  // K or V
  left.load(device_rows<VEC>(second ? v_rows : k_rows, key0, at));
  const SharedBlock<F, StagedRow<F, BD>::kLength> q_staged =
      shared_block<StagedRow<F, BD>::kLength>(second ? grad_block : q_block, at);
  const SharedBlock<F, StagedRow<F, BD>::kLength> grad_staged =
      shared_block<StagedRow<F, BD>::kLength>(second ? q_block : grad_block, at);
  threadgroup float2* handed_over = reinterpret_cast<threadgroup float2*>(storage + 2 * kChunks) +
                                    pair * kBlocks * ORCHARD_SIMD_WIDTH + lane;
  Tile<float, 1, kDepth> sum;  // dV or dK
  zero(sum);
  const Unmasked unmasked = unmasked_rows(key0, 8, BQ, params);

  for (int member = 0; member < heads; member++) {
    const int head = kv_head * heads + member;
    const int64_t stats0 = ((int64_t)batch * params.num_heads + head) * params.q_len;
    const device float* stats = (second ? delta : lse) + stats0;
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
      ColumnStats<kBlocks> row_stats;  // asked for early: they come from device memory
      row_stats.load(stats, row0, params.q_len, at);
      q.fetch();
      grad.fetch();
      threadgroup_barrier(mem_flags::mem_threadgroup);  // the previous block has been read
      q.store();
      grad.store();
      threadgroup_barrier(mem_flags::mem_threadgroup);

      Tile<float, 1, kBlocks> x;  // (8 keys, BQ queries): S^T and P^T, or dP^T and dS^T
      zero(x);
      mma_ABt<F, kDepth, Chains<T>::kCount>(x, left, q_staged);
      if (!second) {
        score(x, params.scale);
        weights_transposed(x, row_stats);
        if (!unmasked.has(row0)) {
          mask_transposed(x, key0, row0, at, params);
        }
        ORCHARD_UNROLL
        for (int c = 0; c < kBlocks; c++) {
          handed_over[c * ORCHARD_SIMD_WIDTH] = x.fragments[0][c];
        }
      }
      if (DROPOUT) {
        const uint kept = kept_transposed<kBlocks>(key0, row0, draws, lane);
        drop_transposed(x, kept, params.dropout_rescale);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);  // P^T is there
      if (second) {
        Tile<float, 1, kBlocks> p;
        ORCHARD_UNROLL
        for (int c = 0; c < kBlocks; c++) {
          p.fragments[0][c] = handed_over[c * ORCHARD_SIMD_WIDTH];
        }
        dscore_transposed(x, p, row_stats);
        if (STORE_DS) {
          store_dscore(ds_tiles, key0, row0, x, params);
        }
      }
      mma_AB(sum, x, grad_staged);
      q.advance();
      grad.advance();
    }
  }

  const float factor[1] = {second ? score_derivative(params) : 1.0f};
  if (second) {
    store_rows<VEC>(
        dk, params.dk, batch, kv_head, key0, params.kv_len, params.head_dim, sum, factor, at);
  } else {
    store_rows<VEC>(
        dv, params.dv, batch, kv_head, key0, params.kv_len, params.head_dim, sum, factor, at);
  }
}
