#include "dscore_scratch.h"

#include <algorithm>
#include <limits>

#include "backward_cost.h"
#include "dkv_parts.h"

namespace orchard {
namespace {

// From this padded head dim on, storing dS costs less than the two products that it saves.
constexpr int kDsHeadDim = 64;

// A division of more turns would spend more on launches, and on making the plan, than it saves.
constexpr int64_t kMostTurns = 1024;

/// Keys that the buffer has for each 8 queries. Where key_ranges leave them a span of keys, keys
/// that are farther apart share a place: whole blocks of every kernel.
int64_t stored_keys(const Problem& p) {
  const int64_t all = 8 * blocks_of(p.k.sizes[2], 8);
  if (!p.has_key_ranges || p.key_span <= 0 || p.key_span >= all) return all;
  const int64_t span = p.key_span + 7;  // wherever in a block of 8 keys it begins
  return std::min(all, ORCHARD_KEY_CHUNK * blocks_of(span, ORCHARD_KEY_CHUNK));
}

/// Of `all`, so many at once that each turn has as many, or fewer the last: at most `fitting`.
int64_t even_turns(int64_t all, int64_t fitting) { return blocks_of(all, blocks_of(all, fitting)); }

/// Adds the divisions that fit into so many floats.
void add_divisions(const Problem& p, int bd, int64_t floats, std::vector<DsDivision>& found) {
  const int64_t kv_len = p.k.sizes[2], heads = kv_heads(p);
  const int64_t query_heads_of_one = query_heads(p) / heads;
  const int64_t rows = query_heads_of_one * 8 * blocks_of(p.q.sizes[2], 8);
  const int64_t stored = stored_keys(p);
  if (stored <= floats / rows) {
    const int64_t of_one = rows * stored;
    const int64_t at_once = even_turns(heads, std::min(floats / of_one, heads));
    if (blocks_of(heads, at_once) <= kMostTurns) {
      found.push_back({at_once, kv_len, at_once * of_one, 0, p.has_key_ranges ? stored : 0});
    }
  }
  // The keys that ranges let a row see are few as a rule: a buffer for all is worth having only
  // whole.
  if (p.has_key_ranges) return;
  const int64_t sums_of_one = query_heads_of_one * p.q.sizes[2] * bd;
  for (int64_t wanted = 1; wanted < 2 * heads; wanted *= 2) {
    const int64_t at_once = std::min(wanted, heads);
    const int64_t fitting = (floats - at_once * sums_of_one) / (at_once * rows);
    if (fitting < ORCHARD_KEY_CHUNK) return;
    if (fitting >= kv_len) continue;
    const int64_t chunks = blocks_of(kv_len, ORCHARD_KEY_CHUNK);
    const int64_t keys = ORCHARD_KEY_CHUNK * even_turns(chunks, fitting / ORCHARD_KEY_CHUNK);
    if (blocks_of(heads, at_once) * blocks_of(kv_len, keys) > kMostTurns) continue;
    found.push_back({at_once, keys, at_once * rows * keys, at_once * sums_of_one, 0});
  }
}

}  // namespace

std::vector<DsDivision> ds_divisions(const Problem& p, int bd) {
  std::vector<DsDivision> found;
  const bool empty =
      query_heads(p) == 0 || kv_heads(p) == 0 || p.q.sizes[2] == 0 || p.k.sizes[2] == 0;
  if (bd < kDsHeadDim || empty) return found;
  const int64_t floats = p.scratch_bytes / int64_t{sizeof(float)}, parts = most_part_elements(p);
  add_divisions(p, bd, floats, found);
  if (parts > 0 && !p.has_key_ranges) add_divisions(p, bd, floats - parts, found);
  return found;
}

DsDivision divide_ds(const Problem& p, const TileRow& row, int bd) {
  DsDivision best{kv_heads(p), p.k.sizes[2], 0, 0, 0};
  const std::vector<DsDivision> divisions = ds_divisions(p, bd);
  if (divisions.empty()) return best;
  if (p.has_key_ranges) return divisions.front();  // what the rows see is not known
  const auto time_of = [&](const DsDivision& division) {
    const int64_t parts = divide_groups(p, division, keys_of_group(row.dkv)).parts;
    return time_of_backward(p, row, bd, division, parts);
  };
  double least = p.stores_ds ? std::numeric_limits<double>::infinity() : time_of(best);
  for (const DsDivision& division : divisions) {
    const double time = time_of(division);
    if (time < least) {
      best = division;
      least = time;
    }
  }
  return best;
}

}  // namespace orchard
