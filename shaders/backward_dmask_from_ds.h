// Attention backward, the gradient of an additive mask: what dS sums up to over the heads of batch
// entries that share an element of the mask, from the dS that the key's side has stored for all of
// the call. It is not for capped scores, whose stored dS has the cap's derivative in it.
//
//   for each head of a batch entry that shares these elements:
//     sum = sum + dS
//   dmask = sum
//
// A threadgroup takes a block of the mask's map, each simdgroup 8 of its queries. Where there are
// few blocks, several threadgroups share one, as in backward_dmask.h. Tiles of dS whose queries see
// none of their keys have not been written, and are not read.
#pragma once

#include "dscore.h"
#include "keys.h"
#include "long_sum.h"
#include "mask_gradient.h"
#include "mask_sharers.h"
#include "masks.h"
#include "ranges.h"

template <typename O, int SIMDGROUPS, bool LISTED>
[[kernel, max_total_threads_per_threadgroup(ORCHARD_THREADS(SIMDGROUPS))]] void
attention_backward_dmask_from_ds(device float* ds [[buffer(kBufferDs)]],  // DscoreTiles
    device O* dmask [[buffer(kBufferDmask)]],  // (parts, outer, inner, Hq, L, S), dense
    constant AttentionParams& params [[buffer(kBufferParams)]],
    const device uint2* mask_map [[buffer(kBufferMaskMap)]],      // MaskMap
    const device int* range_hulls [[buffer(kBufferRangeHulls)]],  // RangeHulls
    uint3 group [[threadgroup_position_in_grid]], uint3 grid [[threadgroups_per_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  const int kCols = ORCHARD_MAP_BLOCK / 8;
  static_assert(8 * SIMDGROUPS == ORCHARD_MAP_BLOCK, "simdgroups take all queries of a block");
  const int parts = params.dmask_parts;
  const int part = int(group.x) % parts;
  const int entry = int(group.x) / parts;
  const int key_blocks = (params.kv_len + ORCHARD_MAP_BLOCK - 1) / ORCHARD_MAP_BLOCK;
  const int key0 = int(group.y) % key_blocks * ORCHARD_MAP_BLOCK;
  const int row0 = int(group.y) / key_blocks * ORCHARD_MAP_BLOCK + simdgroup * 8;
  const LanePosition at = lane_position(lane);
  const Window window = window_of(params);
  const DscoreRow row = dscore_row(key0, params);
  MaskSharers sharers;
  sharers.start(entry, params);
  const Range terms = terms_of_part(sharers.count(), part, parts);
  sharers.skip(terms.begin);
  LongTileSum<1, kCols> sum;
  sum.start();

  for (int term = terms.begin; term < terms.end; term++, sharers.advance()) {
    const Head head = sharers.present(params);
    MaskMap<Mask<uchar, false>> visible;
    visible.start(head, mask_map, params);
    if (!visible.passes(row0, key0)) {
      continue;
    }
    RowHulls<LISTED, 1> hulls;
    hulls.start(head, range_hulls, row0, params);
    const DscoreTiles tiles =
        dscore_tiles(ds, head.batch * params.num_heads + head.head, at, params);
    const device float* tile = tiles.tile(row.first, row0);
    Tile<float, 1, kCols> ds_block;
    ORCHARD_UNROLL
    for (int c = 0; c < kCols; c++) {
      const bool written =
          window.sees_any(row0, 8, key0 + 8 * c, 8) && hulls.meets(0, key0 + 8 * c);
      ds_block.fragments[0][c] = written ? tiles.load(tile, row.next * 64, 0, c) : float2(0.0f);
    }
    sum.take(ds_block);
  }

  sum.put_aside();
  MaskGradient<O> to;
  to.rows = params.q_len;
  to.keys = params.kv_len;
  const int entries = int(grid.x) / parts;
  to.data = dmask + ((int64_t)part * entries + entry) * to.rows * to.keys;
  to.store(sum.earlier, row0, key0, at);
}
