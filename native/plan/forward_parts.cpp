#include "forward_parts.h"

#include <algorithm>

#include "params.h"

namespace orchard {
namespace {

/// What a part has to have at least, so that it does not leave more than it reads.
constexpr int64_t kLeastKeys = 256;

/// Each lane of a simdgroup takes the statistics of one part (shaders/forward_merge.h).
constexpr int64_t kMostParts = ORCHARD_SIMD_WIDTH;

/// Floats that the parts leave: kernels count them in int32.
constexpr int64_t kMostElements = int64_t{1} << 28;

/// Keys that any `rows` queries in a row see at most.
int64_t keys_of(const Problem& p, int64_t rows) {
  const int64_t kv_len = p.k.sizes[2];
  if (p.has_key_ranges) return kv_len;  // the host reads none of them
  const int64_t left = clamp_window(p.window_left), right = clamp_window(p.window_right);
  const int64_t first = std::max<int64_t>(p.diagonal - left, 0);
  const int64_t end = std::min(p.q.sizes[2] + p.diagonal + right, kv_len);
  return std::min(end - first, rows + left + right);
}

}  // namespace

int64_t part_elements(const Problem& p) {
  return query_heads(p) * p.q.sizes[2] * (p.v.sizes[3] + 2);
}

int64_t forward_parts(const Problem& p, int64_t rows) {
  // Parts are at most a third more than these threadgroups, each with a tile of O: 14 MiB on 80
  // cores, at a head dim of 256.
  const int64_t wanted = p.gpu_cores * kHeldByCore;
  const int64_t groups = query_heads(p) * blocks_of(p.q.sizes[2], rows);
  if (groups == 0) return 1;
  const int64_t nearest = (2 * wanted + groups) / (2 * groups);  // to what fills the GPU
  const int64_t fitting = kMostElements / part_elements(p);
  return std::max<int64_t>(
      std::min({nearest, keys_of(p, rows) / kLeastKeys, fitting, kMostParts}), 1);
}

}  // namespace orchard
