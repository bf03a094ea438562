#include "dkv_parts.h"

#include <algorithm>

namespace orchard {
namespace {

// A core of an Apple GPU holds 3 or 4 threadgroups of the key's side at once. Twice as many let the
// cores finish together, though the last keys of a causal mask have less to do.
constexpr int64_t kGroupsOfCore = 8;

// Queries that a part takes at least, of all its heads: over fewer, the sums' way through memory
// would cost more than a tenth of the products.
constexpr int64_t kPartQueries = 256;

// The sums take no more than this part of what a backward may take for dS and for them, and so few
// bytes that the kernels count elements in int32.
constexpr int64_t kShareOfScratch = 8;
constexpr int64_t kMostBytes = int64_t{1} << 30;

}  // namespace

int64_t dkv_parts(int64_t heads, int64_t threadgroups, int64_t gpu_cores, int64_t most) {
  int64_t parts = 1;
  for (int64_t n = 2; n <= heads; n++) {
    const bool idle = parts * threadgroups < kGroupsOfCore * gpu_cores;
    if (idle && heads % n == 0 && n <= most) parts = n;
  }
  return parts;
}

int64_t most_part_elements(const Problem& p) {
  if (query_heads(p) <= kv_heads(p)) return 0;
  return std::min(p.scratch_bytes / kShareOfScratch, kMostBytes) / int64_t{sizeof(float)};
}

GroupDivision divide_groups(const Problem& p, const DsDivision& ds, int keys_of_group) {
  const int64_t of_one = ds.kv_heads * p.k.sizes[2] * (p.k.sizes[3] + p.v.sizes[3]);  // of a part
  if (of_one == 0) return {1, 0};
  const int64_t heads = query_heads(p) / kv_heads(p);
  const int64_t left =
      p.scratch_bytes / int64_t{sizeof(float)} - ds.tile_elements - ds.sum_elements;
  const int64_t fitting = std::min(most_part_elements(p), left) / of_one;
  const int64_t threadgroups = ds.kv_heads * blocks_of(ds.keys, keys_of_group);
  const int64_t parts = dkv_parts(
      heads, threadgroups, p.gpu_cores, std::min(fitting, heads * p.q.sizes[2] / kPartQueries));
  return {parts, parts > 1 ? parts * of_one : 0};
}

}  // namespace orchard
