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

// The sums take no more than this part of what a backward may take for dS and for them.
constexpr int64_t kShareOfScratch = 8;

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
  return std::min(p.scratch_bytes / kShareOfScratch / int64_t{sizeof(float)}, kMostPartElements);
}

int64_t sums_of_part(const Problem& p) { return p.k.sizes[2] * (p.k.sizes[3] + p.v.sizes[3]); }

GroupDivision divide_groups(const Problem& p, const DsDivision& ds, int keys_of_group) {
  if (ds.heads == 0 || kv_heads(p) == 0 || sums_of_part(p) == 0) return {1, 1, 0};
  const int64_t group = query_heads(p) / kv_heads(p), heads = std::min(ds.heads, group);
  const int64_t groups = ds.heads / heads, of_one = groups * sums_of_part(p);
  const int64_t left =
      p.scratch_bytes / int64_t{sizeof(float)} - ds.tile_elements - ds.sum_elements;
  const int64_t fitting = std::min(most_part_elements(p), left) / of_one;
  const int64_t threadgroups = groups * blocks_of(ds.keys, keys_of_group);
  const int64_t at_once = dkv_parts(
      heads, threadgroups, p.gpu_cores, std::min(fitting, heads * p.q.sizes[2] / kPartQueries));
  const int64_t parts = group / heads * at_once;
  return {parts, at_once, parts > 1 ? at_once * of_one : 0};
}

}  // namespace orchard
