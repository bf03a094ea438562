#include "backward_cost.h"

#include <algorithm>

#include "forward_parts.h"
#include "params.h"

namespace orchard {
namespace {

// The numbers are fitted to backwards timed on a GPU of 132 cores.
// benchmarks.nvidia.choice compares what they make the plan prefer with what was timed there
// since.

// A visible pair of dq, by one of dk and dv: dq is three products, or one where dS is stored; dk
// and dv are four.
constexpr double kQueriesWeight = 0.75, kStoredWeight = 0.25;

// Threadgroups that keep one core busy: one alone waits for its own products.
constexpr double kGroupsOfCore = 1.4;

// What turns over keys take, by the time of their launches one by one: the cores wait for the last
// threadgroup of each.
constexpr double kTurnsOfKeys = 1.04;

// A launch takes some 5 us, in which a core multiplies so many pairs by head_dim columns.
constexpr double kLaunchColumns = 80000;

// A float of a sum that another launch goes on with is stored and loaded again: in the time of
// these 8 bytes an M1, whose cores have less bandwidth than any other's, multiplies so many
// columns.
constexpr double kFloatColumns = 24;

/// The pairs of one query head and its key head that the window lets through.
class Visible {
 public:
  explicit Visible(const Problem& p)
      : rows_(p.q.sizes[2]),
        first_(p.diagonal - clamp_window(p.window_left)),
        last_(p.diagonal + clamp_window(p.window_right)) {}

  double pairs(int64_t begin, int64_t end) const {
    const int64_t keys = end - begin;
    return static_cast<double>(
        pairs_up_to(last_ - begin, keys) - pairs_up_to(first_ - 1 - begin, keys));
  }

  /// Rows that see any of the keys.
  int64_t rows_of(int64_t begin, int64_t end) const {
    return std::max<int64_t>(
        std::min(rows_ - 1, end - 1 - first_) - std::max<int64_t>(begin - last_, 0) + 1, 1);
  }

  /// Rows that see one of the keys: the most that any of the keys has.
  double most_rows(int64_t begin, int64_t end) const {
    const int64_t key = std::clamp(last_, begin, end - 1);  // rows from 0 on see its like
    return overlap(key - last_, key - first_, 0, rows_ - 1);
  }

  /// Keys that one row sees: the most that any row has.
  double most_keys(int64_t begin, int64_t end) const {
    const int64_t row = std::clamp<int64_t>(begin - first_, 0, rows_ - 1);
    return overlap(row + first_, row + last_, begin, end - 1);
  }

 private:
  static double overlap(int64_t begin, int64_t last, int64_t from, int64_t to) {
    return static_cast<double>(
        std::max<int64_t>(std::min(last, to) - std::max(begin, from) + 1, 0));
  }

  /// 1 + 2 + ... + n; none if n is negative.
  static int64_t triangle(int64_t n) { return n < 0 ? 0 : n * (n + 1) / 2; }

  /// Pairs of all rows and so many keys in which the key is at most so far ahead of the row.
  int64_t pairs_up_to(int64_t ahead, int64_t keys) const {
    return triangle(rows_ + ahead) - triangle(ahead) - triangle(rows_ + ahead - keys) +
           triangle(ahead - keys);
  }

  int64_t rows_, first_, last_;  // row i sees the keys from i + first_ to i + last_
};

double cores(const Problem& p) { return static_cast<double>(p.gpu_cores); }

/// Threadgroups in whose time the core that has most of them is through. Of more than the cores
/// work on side by side, each takes another one when it is free, so that all are through together.
double turns_of_core(const Problem& p, int64_t groups) {
  if (groups > kHeldByCore * p.gpu_cores) return static_cast<double>(groups) / p.gpu_cores;
  return std::max(kGroupsOfCore, static_cast<double>(blocks_of(groups, p.gpu_cores)));
}

/// A launch lasts as long as the core with most threadgroups takes, or its longest threadgroup on a
/// core that has few of them. `heaviest`: pairs of that threadgroup.
double time_of_launch(const Problem& p, double pairs, int64_t groups, double heaviest) {
  return std::max(
      pairs / static_cast<double>(groups) * turns_of_core(p, groups), kGroupsOfCore * heaviest);
}

/// Of so many query heads and of keys [begin, end): dk and dv, and dq, or their part of it.
double time_of_launches(const Problem& p, const TileRow& row, int bd, bool stored, int64_t parts,
    int64_t heads, int64_t begin, int64_t end) {
  const Visible visible(p);
  const DqTile tile = stored ? row.dq_from_ds : row.dq;
  const int64_t of_part = query_heads(p) / kv_heads(p) / parts;
  const int64_t rows = std::min<int64_t>(8 * tile.r * kSimdgroups, p.q.sizes[2]);
  const int64_t keys = std::min<int64_t>(keys_of_group(row.dkv), end - begin);
  const double pairs = static_cast<double>(heads) * visible.pairs(begin, end);
  const bool in_turns = end - begin < p.k.sizes[2];
  const double sums = in_turns ? static_cast<double>(heads * p.q.sizes[2]) : 0;
  const double of_keys = static_cast<double>(of_part * keys) * visible.most_rows(begin, end);
  const double of_queries = static_cast<double>(rows) * visible.most_keys(begin, end);
  const int64_t key_groups = heads / of_part * blocks_of(end - begin, keys);
  const int64_t row_groups = heads * blocks_of(visible.rows_of(begin, end), rows);
  const double time = time_of_launch(p, pairs, key_groups, of_keys) +
                      (stored ? kStoredWeight : kQueriesWeight) *
                          time_of_launch(p, pairs + kFloatColumns * sums, row_groups, of_queries) +
                      2 * kLaunchColumns / bd;
  return in_turns ? kTurnsOfKeys * time : time;
}

}  // namespace

double time_of_backward(
    const Problem& p, const TileRow& row, int bd, const DsDivision& ds, int64_t parts) {
  const int64_t all = query_heads(p);
  double time = 0;
  if (parts > 1) {
    const double rows = static_cast<double>(kv_heads(p) * parts * p.k.sizes[2]);
    time += 2 * kFloatColumns * rows / cores(p);  // of dk and of dv
    time +=
        kLaunchColumns / bd * static_cast<double>(std::min(blocks_of(all, ds.heads), kv_heads(p)));
  }
  for (int64_t begin = 0; begin < p.k.sizes[2]; begin += ds.keys) {
    const auto of_heads = [&](int64_t heads) {
      const int64_t end = std::min(begin + ds.keys, p.k.sizes[2]);
      return time_of_launches(p, row, bd, ds.tile_elements > 0, parts, heads, begin, end);
    };
    time += static_cast<double>(all / ds.heads) * of_heads(ds.heads);
    if (all % ds.heads > 0) time += of_heads(all % ds.heads);
  }
  return time;
}

}  // namespace orchard
