// Attention backward, the gradient of an additive mask that all keys of a query share. It moves all
// scores of a row alike, so that only lse follows, and the weight that goes to a sink:
//
//   for each head of a batch entry that shares an element, each row that does:
//     sum = sum + dlse + exp((sink - m) - log(l)) delta
//   dmask = sum
//
// which is what dS sums up to along a row: NaN where weights are, or dO V^T is infinite. A
// threadgroup takes 32 SIMDGROUPS rows of one (batch, head) of the mask, a thread for each; where
// all rows share one row of the mask, it takes all of them.
#pragma once

#include "keys.h"
#include "long_sum.h"
#include "mask_sharers.h"
#include "params.h"
#include "softmax.h"

template <typename O, int SIMDGROUPS>
[[kernel, max_total_threads_per_threadgroup(ORCHARD_THREADS(SIMDGROUPS))]] void
attention_backward_dmask_rows(const device float2* row_stats
    [[buffer(kBufferRowStats)]],                         // (B, Hq, L)
    const device float* dlse [[buffer(kBufferDlse)]],    // (B, Hq, L), bound if params.has_dlse
    const device float* delta [[buffer(kBufferDelta)]],  // (B, Hq, L)
    const device float* sinks [[buffer(kBufferSinks)]],  // (Hq), bound if params.has_sinks
    device O* dmask [[buffer(kBufferDmask)]],            // (outer, inner, Hq, L, 1), dense
    constant AttentionParams& params [[buffer(kBufferParams)]],
    uint3 group [[threadgroup_position_in_grid]], uint thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  const int kThreads = ORCHARD_THREADS(SIMDGROUPS);
  threadgroup float sums[SIMDGROUPS];

  const bool shared_rows = params.dmask.row == 0;
  const int row0 = group.y * kThreads + thread_index;
  const int row_end = shared_rows ? params.q_len : min(row0 + 1, params.q_len);
  MaskSharers sharers;
  sharers.start(group.x, params);
  LongSum sum;
  sum.start();
  for (int i = 0; i < sharers.count(); i++) {
    const Head head = sharers.present(params);
    const int64_t stats0 = ((int64_t)head.batch * params.num_heads + head.head) * params.q_len;
    for (int row = row0; row < row_end; row += kThreads) {
      const float2 stats = row_stats[stats0 + row];
      if (sees_no_key(stats)) {  // and has nothing to move
        continue;
      }
      const float of_lse = params.has_dlse ? dlse[stats0 + row] : 0.0f;
      const float of_out = delta[stats0 + row];
      float of_row = of_lse;
      if (params.has_sinks) {
        of_row += weight_of_sink(sinks[head.head], stats) * of_out;
      }
      const bool finite = isfinite(of_out) || isinf(of_lse);
      sum.take(finite && !isnan(stats.x) ? of_row : NAN);
    }
    sharers.advance();
  }

  if (!shared_rows) {
    if (row0 < params.q_len) {
      dmask[(int64_t)group.x * params.q_len + row0] = O(sum.total());
    }
    return;
  }
  const float of_simdgroup = simd_sum(sum.total());
  if (lane == 0) {
    sums[simdgroup] = of_simdgroup;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (thread_index == 0) {
    float total = 0.0f;
    for (int i = 0; i < SIMDGROUPS; i++) {
      total += sums[i];
    }
    dmask[group.x] = O(total);
  }
}
