#include "dscore_scratch.h"

#include <algorithm>

namespace orchard {
namespace {

// From this padded head dim on, storing dS costs less than the two products that it saves.
constexpr int kDsHeadDim = 64;

// Keys are divided only into parts of so many threadgroups: fewer would leave a large GPU idle (an
// M1 Max holds some 128 of them at once).
constexpr int64_t kGroupsToFill = 96;

}  // namespace

DsDivision divide_ds(const Problem& p, int bd, int keys_of_group) {
  const int64_t q_len = p.q.sizes[2], kv_len = p.k.sizes[2];
  const DsDivision undivided{kv_heads(p), kv_len, 0, 0};
  const int64_t query_heads_of_one = kv_heads(p) > 0 ? query_heads(p) / kv_heads(p) : 0;
  const int64_t rows = query_heads_of_one * 8 * blocks_of(q_len, 8);
  const int64_t budget = p.scratch_bytes / int64_t{sizeof(float)};
  if (bd < kDsHeadDim || rows == 0 || kv_len == 0) return undivided;
  const int64_t of_one = rows * 8 * blocks_of(kv_len, 8);
  if (of_one <= budget) {
    const int64_t fitting = std::min(budget / of_one, kv_heads(p));
    return {fitting, kv_len, fitting * of_one, 0};
  }
  // The keys that ranges let a row see are few as a rule: a buffer for all is worth having only
  // whole.
  if (p.has_key_ranges) return undivided;
  const int64_t sums = query_heads_of_one * q_len * bd;
  const int64_t fitting = std::max<int64_t>(budget - sums, 0) / rows;
  const int64_t keys = fitting / ORCHARD_KEY_CHUNK * ORCHARD_KEY_CHUNK;
  if (keys < kGroupsToFill * keys_of_group) return undivided;
  return {1, keys, rows * keys, sums};
}

}  // namespace orchard
