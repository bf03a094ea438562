// Attention backward, the gradient of an additive mask: where several threadgroups have shared each
// element of it, what they have stored, added up in a fixed order. A thread takes an element.
#pragma once

#include "long_sum.h"
#include "params.h"
#include "tile.h"

template <typename O, int SIMDGROUPS>
[[kernel, max_total_threads_per_threadgroup(ORCHARD_THREADS(SIMDGROUPS))]] void
attention_backward_dmask_sum(const device float* dmask_parts
    [[buffer(kBufferDmaskParts)]],             // (parts, elements)
    device O* dmask [[buffer(kBufferDmask)]],  // (elements)
    constant AttentionParams& params [[buffer(kBufferParams)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]]) {
  const int64_t elements = params.dmask_elements;
  const int64_t element = (int64_t)group.x * ORCHARD_THREADS(SIMDGROUPS) + thread_index;
  if (element >= elements) {
    return;
  }
  LongSum sum;
  sum.start();
  for (int part = 0; part < params.dmask_parts; part++) {
    sum.take(dmask_parts[part * elements + element]);
  }
  dmask[element] = O(sum.total());
}
