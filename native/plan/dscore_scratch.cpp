#include "dscore_scratch.h"

#include <algorithm>
#include <limits>

#include "backward_cost.h"
#include "dkv_parts.h"
#include "params.h"

namespace orchard {
namespace {

// From this padded head dim on, storing dS costs less than the two products that it saves.
constexpr int kDsHeadDim = 64;

// A division of more turns would spend more on launches, and on making the plan, than it saves.
constexpr int64_t kMostTurns = 1024;

/// Keys within which any 8 queries in a row see theirs; 0: not known.
int64_t key_span(const Problem& p) {
  if (p.has_key_ranges) return p.key_span;
  return int64_t{clamp_window(p.window_left)} + clamp_window(p.window_right) + 8;
}

/// Rows for all keys, or where 8 queries see a span of them, a ring of rows: whole blocks of every
/// kernel.
DscoreRows ring_of_rows(const Problem& p) {
  const int64_t all = 8 * blocks_of(p.k.sizes[2], 8), span = key_span(p);
  const int64_t tiles = blocks_of(p.q.sizes[2], 8);
  if (span <= 0 || span >= all) return {all, tiles, 0};
  // wherever in a block of 8 keys it begins
  return {std::min(all, ORCHARD_KEY_CHUNK * blocks_of(span + 7, ORCHARD_KEY_CHUNK)), tiles, 0};
}

/// Rows that are folded where a window ends with the keys behind a query. In blocks of 8: all
/// queries see the first `whole` of the keys, each one behind is seen by one of the queries less,
/// and those from `seen` on by none.
DscoreRows folded_rows(const Problem& p) {
  const int64_t queries = blocks_of(p.q.sizes[2], 8);
  const int64_t ahead = p.diagonal + clamp_window(p.window_right);
  const int64_t whole = ahead > 0 ? blocks_of(ahead, 8) : 0;
  const int64_t seen = std::min(blocks_of(p.k.sizes[2], 8), whole + queries);
  const int64_t step = ORCHARD_KEY_CHUNK / 8;  // the fold is between blocks of every kernel
  const int64_t rows = step * blocks_of(whole + blocks_of(seen - whole, 2), step);
  const int64_t tiles = std::max(queries, 2 * queries - (seen - whole) + 1);
  return {8 * rows, tiles, (whole + seen - 1) * tiles + whole};
}

/// How all of a query head's dS takes the least memory.
DscoreRows stored_rows(const Problem& p) {
  const DscoreRows ring = ring_of_rows(p);
  const bool causal = !p.has_key_ranges && p.window_right >= 0;
  if (!causal) return ring;
  const DscoreRows folded = folded_rows(p);
  return folded.keys < ring.keys && folded.elements() < ring.elements() ? folded : ring;
}

/// Of `all`, so many at once that each turn has as many, or fewer the last: at most `fitting`.
int64_t even_turns(int64_t all, int64_t fitting) { return blocks_of(all, blocks_of(all, fitting)); }

/// How many query heads may share the buffer: 1, 2 ... of a group, if they divide it and their sums
/// of dk and dv have room, then 1, 2, 4 ... whole groups.
std::vector<int64_t> heads_at_once(const Problem& p) {
  const int64_t group = query_heads(p) / kv_heads(p);
  std::vector<int64_t> found;
  for (int64_t heads = 1; heads < group && sums_of_part(p) <= kMostPartElements; heads++) {
    if (group % heads == 0) found.push_back(heads);
  }
  for (int64_t groups = 1; groups < 2 * kv_heads(p); groups *= 2) {
    found.push_back(group * std::min(groups, kv_heads(p)));
  }
  return found;
}

/// Adds the divisions that fit into so many floats, beside the sums of a part where a group's heads
/// take turns.
void add_divisions(const Problem& p, int bd, int64_t floats, std::vector<DsDivision>& found) {
  const int64_t kv_len = p.k.sizes[2], all = query_heads(p), group = all / kv_heads(p);
  const int64_t tiles = blocks_of(p.q.sizes[2], 8);
  const DscoreRows stored = stored_rows(p);
  const auto fits = [&](int64_t heads, int64_t keys) {
    return blocks_of(all, heads) * blocks_of(kv_len, keys) <= kMostTurns;
  };
  const auto room = [&](int64_t heads) {
    return heads < group ? floats - sums_of_part(p) : floats;
  };
  std::vector<int64_t> whole;  // heads at once of which all keys fit: the most of them first
  for (int64_t heads : heads_at_once(p)) {
    if (stored.elements() <= room(heads) / heads) whole.insert(whole.begin(), heads);
  }
  if (!whole.empty() && whole[0] >= group) {
    const int64_t groups = std::min(floats / (group * stored.elements()), kv_heads(p));
    const int64_t even = group * even_turns(kv_heads(p), groups);
    if (even != whole[0]) whole.insert(whole.begin(), even);
  }
  for (int64_t heads : whole) {
    if (!fits(heads, kv_len)) continue;
    found.push_back({heads, kv_len, heads * stored.elements(), 0, stored});
  }
  // The keys that ranges let a row see are few as a rule: a buffer for all is worth having only
  // whole.
  if (p.has_key_ranges) return;
  const int64_t sums_of_one = p.q.sizes[2] * bd;
  for (int64_t heads : heads_at_once(p)) {
    const int64_t fitting = (room(heads) / heads - sums_of_one) / (8 * tiles);
    if (fitting < ORCHARD_KEY_CHUNK || fitting >= ring_of_rows(p).keys) continue;
    const int64_t chunks = blocks_of(kv_len, ORCHARD_KEY_CHUNK);
    const int64_t keys = ORCHARD_KEY_CHUNK * even_turns(chunks, fitting / ORCHARD_KEY_CHUNK);
    if (!fits(heads, keys)) continue;
    const DscoreRows rows{keys, tiles, 0};
    found.push_back({heads, keys, heads * rows.elements(), heads * sums_of_one, rows});
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
  DsDivision best{query_heads(p), p.k.sizes[2], 0, 0, {}};
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
