#include "dscore_scratch.h"

#include <algorithm>

namespace orchard {
namespace {

// From this padded head dim on, storing dS costs less than the two products that it saves.
constexpr int kDsHeadDim = 64;

// Keys are divided only into parts of so many threadgroups: fewer would leave a large GPU idle (an
// M1 Max holds some 128 of them at once).
constexpr int64_t kGroupsToFill = 96;

/// Keys that the buffer has for each 8 queries. Where key_ranges leave them a span of keys, keys
/// that are farther apart share a place: whole blocks of every kernel.
int64_t stored_keys(const Problem& p) {
  const int64_t all = 8 * blocks_of(p.k.sizes[2], 8);
  if (!p.has_key_ranges || p.key_span <= 0 || p.key_span >= all) return all;
  const int64_t span = p.key_span + 7;  // wherever in a block of 8 keys it begins
  return std::min(all, ORCHARD_KEY_CHUNK * blocks_of(span, ORCHARD_KEY_CHUNK));
}

}  // namespace

DsDivision divide_ds(const Problem& p, int bd, int keys_of_group) {
  const int64_t q_len = p.q.sizes[2], kv_len = p.k.sizes[2];
  const DsDivision undivided{kv_heads(p), kv_len, 0, 0, 0};
  const int64_t query_heads_of_one = kv_heads(p) > 0 ? query_heads(p) / kv_heads(p) : 0;
  const int64_t rows = query_heads_of_one * 8 * blocks_of(q_len, 8);
  const int64_t budget = p.scratch_bytes / int64_t{sizeof(float)};
  if (bd < kDsHeadDim || rows == 0 || kv_len == 0) return undivided;
  const int64_t stored = stored_keys(p);
  const int64_t of_one = rows * stored;
  if (of_one <= budget) {
    const int64_t fitting = std::min(budget / of_one, kv_heads(p));
    return {fitting, kv_len, fitting * of_one, 0, p.has_key_ranges ? stored : 0};
  }
  // The keys that ranges let a row see are few as a rule: a buffer for all is worth having only
  // whole.
  if (p.has_key_ranges) return undivided;
  const int64_t sums = query_heads_of_one * q_len * bd;
  const int64_t fitting = std::max<int64_t>(budget - sums, 0) / rows;
  const int64_t keys = fitting / ORCHARD_KEY_CHUNK * ORCHARD_KEY_CHUNK;
  if (keys < kGroupsToFill * keys_of_group) return undivided;
  return {1, keys, rows * keys, sums, 0};
}

}  // namespace orchard
