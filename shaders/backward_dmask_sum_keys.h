// Attention backward, the gradient of an additive mask that all queries share: what the key's side
// has summed up over the queries of each head (key_sums.h), added up over the heads of batch
// entries that share an element, in a fixed order. A threadgroup takes 32 SIMDGROUPS keys of one
// (batch, head) of the mask, a thread for each.
#pragma once

#include "long_sum.h"
#include "mask_sharers.h"
#include "params.h"
#include "tile.h"

template <typename O, int SIMDGROUPS>
[[kernel, max_total_threads_per_threadgroup(ORCHARD_THREADS(SIMDGROUPS))]] void
attention_backward_dmask_sum_keys(const device float* key_sums
    [[buffer(kBufferDmaskParts)]],             // (B, Hq, S)
    device O* dmask [[buffer(kBufferDmask)]],  // (outer, inner, Hq, 1, S), dense
    constant AttentionParams& params [[buffer(kBufferParams)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]]) {
  const int key = group.y * ORCHARD_THREADS(SIMDGROUPS) + thread_index;
  if (key >= params.kv_len) {
    return;
  }
  MaskSharers sharers;
  sharers.start(group.x, params);
  LongSum sum;
  sum.start();
  for (int i = 0; i < sharers.count(); i++) {
    const Head head = sharers.present(params);
    const int64_t index = (int64_t)head.batch * params.num_heads + head.head;
    sum.take(key_sums[index * params.kv_len + key]);
    sharers.advance();
  }
  dmask[(int64_t)group.x * params.kv_len + key] = O(sum.total());
}
