// key_ranges: the keys that each query sees, given row by row. A variant that is LISTED has them;
// its window (keys.h) is open then, since windows count from the rows' own positions.
#pragma once

#include "keys.h"
#include "loader.h"
#include "masks.h"
#include "params.h"
#include "tile.h"

/// The keys that one query sees, [begin, end) and [0, prefix), and where it stands.
struct VisibleKeys {
  int begin;  // beyond all keys where the first range is empty, with an end of 0
  int end;
  int prefix;
  int position;

  METAL_FUNC bool has(int key) const { return key < prefix || (key >= begin && key < end); }

  /// Which of ORCHARD_MAP_BLOCK keys from key0 on: key0 + i is bit i.
  METAL_FUNC uint bits(int key0) const {
    return bits_below(prefix - key0) | (bits_below(end - key0) & ~bits_below(begin - key0));
  }

  METAL_FUNC static uint bits_below(int count) {
    return count >= 32 ? 0xffffffffu : (1u << max(count, 0)) - 1;
  }
};

/// The rows of key_ranges for one head: begin, end, position and prefix of each query.
struct RangeRows {
  const device int* rows;
  int q_len;
  int kv_len;
  int left;
  int right;

  /// What a query sees of its ranges, its window and the keys that there are.
  METAL_FUNC VisibleKeys of(int row) const {
    const device int* listed = rows + (int64_t)min(row, q_len - 1) * 4;
    VisibleKeys keys;
    keys.position = clamp(listed[2], -ORCHARD_FAR_POSITION, ORCHARD_FAR_POSITION);
    const int last = row < q_len ? min(kv_len, keys.position + right + 1) : 0;
    keys.begin = max(max(listed[0], 0), keys.position - left);
    keys.end = min(listed[1], last);
    keys.prefix = max(min(listed[3], last), 0);
    const bool empty = keys.begin >= keys.end;
    keys.begin = empty ? ORCHARD_WINDOW_OPEN : keys.begin;
    keys.end = empty ? 0 : keys.end;
    return keys;
  }
};

METAL_FUNC RangeRows range_rows(
    Head head, const device int* key_ranges, constant AttentionParams& params) {
  RangeRows ranges;
  ranges.rows = key_ranges + head.batch * params.ranges.batch + head.head * params.ranges.head;
  ranges.q_len = params.q_len;
  ranges.kv_len = params.kv_len;
  ranges.left = params.ranges.left;
  ranges.right = params.ranges.right;
  return ranges;
}

/// What several queries see: outside of it none of them sees a key, in its inner part all see all.
struct RangeHull {
  int begin;
  int end;
  int inner_begin;
  int inner_end;
  int prefix;
  int inner_prefix;

  METAL_FUNC void start() {
    begin = ORCHARD_WINDOW_OPEN;
    end = 0;
    inner_begin = 0;
    inner_end = ORCHARD_WINDOW_OPEN;
    prefix = 0;
    inner_prefix = ORCHARD_WINDOW_OPEN;
  }

  METAL_FUNC void load(const device int* from) {
    begin = from[0];
    end = from[1];
    inner_begin = from[2];
    inner_end = from[3];
    prefix = from[4];
    inner_prefix = from[5];
  }

  METAL_FUNC void store(device int* to) const {
    to[0] = begin;
    to[1] = end;
    to[2] = inner_begin;
    to[3] = inner_end;
    to[4] = prefix;
    to[5] = inner_prefix;
  }

  METAL_FUNC void add(VisibleKeys keys) {
    begin = min(begin, keys.begin);
    end = max(end, keys.end);
    inner_begin = max(inner_begin, keys.begin);
    inner_end = min(inner_end, keys.end);
    prefix = max(prefix, keys.prefix);
    inner_prefix = min(inner_prefix, keys.prefix);
  }

  METAL_FUNC void add(RangeHull other) {
    begin = min(begin, other.begin);
    end = max(end, other.end);
    inner_begin = max(inner_begin, other.inner_begin);
    inner_end = min(inner_end, other.inner_end);
    prefix = max(prefix, other.prefix);
    inner_prefix = min(inner_prefix, other.inner_prefix);
  }

  /// Of the hulls of all lanes.
  METAL_FUNC void join_lanes() {
    begin = simd_min(begin);
    end = simd_max(end);
    inner_begin = simd_max(inner_begin);
    inner_end = simd_min(inner_end);
    prefix = simd_max(prefix);
    inner_prefix = simd_min(inner_prefix);
  }

  /// Whether any query may see any key of [key0, key1).
  METAL_FUNC bool meets(int key0, int key1) const {
    return key0 < prefix || (begin < key1 && end > key0);
  }

  /// Whether every query sees every key of [key0, key1).
  METAL_FUNC bool covers(int key0, int key1) const {
    return key1 <= inner_prefix || (inner_begin <= key0 && key1 <= inner_end);
  }

  /// Whether dS of the keys from the first to the last that 8 queries may see has room in blocks of
  /// 8 keys that repeat after `keys` keys.
  METAL_FUNC bool fits(int keys) const {
    const int first = prefix > 0 ? 0 : begin;
    return max(prefix, end) - first / 8 * 8 <= keys;
  }

  /// Blocks of BK keys from the first to the last that any query may see.
  METAL_FUNC Range key_blocks(int BK) const {
    Range keys;
    keys.begin = prefix > 0 ? 0 : begin;
    keys.end = max(prefix, end);
    return Window::blocks(keys, BK);
  }
};

/// What the queries of a tile (queries, keys) see, and those of its threadgroup.
template <bool LISTED, int ROWS, int GROUP_ROWS>
struct TileRanges {
  METAL_FUNC void start(
      Head, const device int*, int, int, LanePosition, ushort, constant AttentionParams&) {}

  METAL_FUNC Range key_blocks(Range blocks, int) const { return blocks; }

  /// Whether any query of the group may see any key of [key0, key1).
  METAL_FUNC bool meets(int, int) const { return true; }

  /// Of the keys of a block that a mask leaves `seen`, those that the queries see.
  template <int BK, typename Seen>
  METAL_FUNC Seen narrow(Seen seen, int) const {
    return seen;
  }

  /// Hides from each query what it does not see.
  template <int COLS>
  METAL_FUNC void hide(thread Tile<float, ROWS, COLS>&, int, float, LanePosition) const {}

  METAL_FUNC int position(int row, int, constant AttentionParams& params) const {
    return row + params.diagonal;
  }
};

template <int ROWS, int GROUP_ROWS>
struct TileRanges<true, ROWS, GROUP_ROWS> {
  static constant constexpr const int kGroupRows = GROUP_ROWS / ORCHARD_SIMD_WIDTH;

  VisibleKeys own[ROWS];             // of this lane's rows
  VisibleKeys of_group[kGroupRows];  // of every 32nd row of the group
  RangeHull hull;                    // of the group

  METAL_FUNC void start(Head head, const device int* key_ranges, int group_row0, int row0,
      LanePosition at, ushort lane, constant AttentionParams& params) {
    const RangeRows ranges = range_rows(head, key_ranges, params);
    ORCHARD_UNROLL
    for (int r = 0; r < ROWS; r++) {
      own[r] = ranges.of(row0 + 8 * r + at.row);
    }
    hull.start();
    ORCHARD_UNROLL
    for (int i = 0; i < kGroupRows; i++) {
      of_group[i] = ranges.of(group_row0 + i * ORCHARD_SIMD_WIDTH + lane);
      hull.add(of_group[i]);
    }
    hull.join_lanes();
  }

  METAL_FUNC Range key_blocks(Range, int BK) const { return hull.key_blocks(BK); }

  METAL_FUNC bool meets(int key0, int key1) const { return hull.meets(key0, key1); }

  template <int BK, typename Seen>
  METAL_FUNC SeenKeys narrow(Seen seen, int key0) const {
    SeenKeys keys;
    keys.bits = seen.all_bits();
    keys.masked_pairs = seen.masked();
    if (!hull.meets(key0, key0 + BK)) {
      keys.bits = 0;
    } else if (!hull.covers(key0, key0 + BK)) {
      uint bits = 0;
      ORCHARD_UNROLL
      for (int i = 0; i < kGroupRows; i++) {
        bits |= of_group[i].bits(key0);
      }
      keys.bits &= simd_or(bits);
    }
    return keys;
  }

  template <int COLS>
  METAL_FUNC void hide(
      thread Tile<float, ROWS, COLS>& s, int key0, float hidden, LanePosition at) const {
    if (hull.covers(key0, key0 + 8 * COLS)) {
      return;
    }
    ORCHARD_UNROLL
    for (int r = 0; r < ROWS; r++) {
      ORCHARD_UNROLL
      for (int c = 0; c < COLS; c++) {
        const int key = key0 + 8 * c + at.col;
        s.fragments[r][c].x = own[r].has(key) ? s.fragments[r][c].x : hidden;
        s.fragments[r][c].y = own[r].has(key + 1) ? s.fragments[r][c].y : hidden;
      }
    }
  }

  METAL_FUNC int position(int, int r, constant AttentionParams&) const { return own[r].position; }
};

/// Hulls of 8 queries each of one head, which attention_backward_delta writes.
struct RangeHulls {
  const device int* hulls;  // ORCHARD_RANGE_HULL for each
  int count;

  METAL_FUNC void start(Head head, const device int* all, constant AttentionParams& params) {
    count = (params.q_len + 7) / 8;
    hulls = all + hulls_before(head, params) * count * ORCHARD_RANGE_HULL;
  }

  /// Heads of key_ranges before the one that this head has.
  METAL_FUNC static int64_t hulls_before(Head head, constant AttentionParams& params) {
    const int heads = params.ranges.head != 0 ? params.num_heads : 1;
    const int batch = params.ranges.batch != 0 ? head.batch : 0;
    return (int64_t)batch * heads + (params.ranges.head != 0 ? head.head : 0);
  }

  /// Of the index-th 8 queries, or the last ones.
  METAL_FUNC RangeHull at(int index) const {
    RangeHull hull;
    hull.load(hulls + (int64_t)min(index, count - 1) * ORCHARD_RANGE_HULL);
    return hull;
  }

  /// Of ROWS queries from row0 on.
  template <int ROWS>
  METAL_FUNC RangeHull of(int row0) const {
    const int first = row0 / 8;
    RangeHull hull = at(first);
    ORCHARD_UNROLL
    for (int i = 1; i < ROWS / 8; i++) {
      hull.add(at(first + i));
    }
    return hull;
  }
};

/// Whether dS of the ORCHARD_DS_ROWS queries round `row` is stored, where not all queries' is.
METAL_FUNC bool stores_dscore(
    Head head, const device int* all, int row, ushort lane, constant AttentionParams& params) {
  const int count = ORCHARD_DS_ROWS / 8;
  RangeHulls hulls;
  hulls.start(head, all, params);
  const RangeHull hull = hulls.at(row / ORCHARD_DS_ROWS * count + lane % count);
  return simd_min(hull.fits(params.ds_keys) ? 1 : 0) != 0;
}

/// Writes the hull of 8 queries, once for all heads that have these ranges.
METAL_FUNC void write_hull(device int* hulls, RangeRows ranges, Head head, int row0,
    LanePosition at, ushort lane, constant AttentionParams& params) {
  RangeHull hull;
  hull.start();
  hull.add(ranges.of(row0 + at.row));
  hull.join_lanes();
  const bool writes = (params.ranges.batch != 0 || head.batch == 0) &&
                      (params.ranges.head != 0 || head.head == 0) && row0 < params.q_len;
  if (writes && lane == 0) {
    const int count = (params.q_len + 7) / 8;
    const int64_t index = RangeHulls::hulls_before(head, params) * count + row0 / 8;
    hull.store(hulls + index * ORCHARD_RANGE_HULL);
  }
}

/// The hulls of a tile's rows of fragments.
template <bool LISTED, int ROWS>
struct RowHulls {
  METAL_FUNC void start(Head, const device int*, int, constant AttentionParams&) {}

  /// Whether any query of row r of fragments may see any of 8 keys.
  METAL_FUNC bool meets(int, int) const { return true; }
};

template <int ROWS>
struct RowHulls<true, ROWS> {
  RangeHull rows[ROWS];

  METAL_FUNC void start(
      Head head, const device int* all, int row0, constant AttentionParams& params) {
    RangeHulls hulls;
    hulls.start(head, all, params);
    ORCHARD_UNROLL
    for (int r = 0; r < ROWS; r++) {
      rows[r] = hulls.template of<8>(row0 + 8 * r);
    }
  }

  METAL_FUNC bool meets(int r, int key0) const { return rows[r].meets(key0, key0 + 8); }
};

/// What the queries see that the key's side takes, for transposed tiles (8 keys, queries).
template <bool LISTED, int BQ>
struct ColumnRanges {
  METAL_FUNC void start(
      Head, const device int*, const device int*, ushort, constant AttentionParams&) {}

  /// Blocks of BQ queries, those that are given or fewer, that may see keys of [key0, key1).
  METAL_FUNC Range query_blocks(Range blocks, int, int) const { return blocks; }

  METAL_FUNC bool meets(int, int, int) const { return true; }

  /// Whether dS of 8 queries and 8 keys is stored.
  METAL_FUNC bool stores(int, int, constant AttentionParams&) const { return true; }

  /// Makes weights zero of what a query does not see.
  template <int COLS>
  METAL_FUNC void hide(thread Tile<float, 1, COLS>&, int, int, LanePosition) const {}

  /// From the positions of this lane's rows of fragment c to a key.
  METAL_FUNC float2 distances(
      int row0, int c, int key, LanePosition at, constant AttentionParams& params) const {
    return float(row0 + at.col + params.diagonal - key) + float2(8 * c, 8 * c + 1);
  }
};

template <int BQ>
struct ColumnRanges<true, BQ> {
  RangeRows ranges;
  RangeHulls hulls;
  ushort lane;

  METAL_FUNC void start(Head head, const device int* key_ranges, const device int* all,
      ushort own_lane, constant AttentionParams& params) {
    ranges = range_rows(head, key_ranges, params);
    hulls.start(head, all, params);
    lane = own_lane;
  }

  METAL_FUNC Range query_blocks(Range, int key0, int key1) const {
    int first = hulls.count;
    int last = -1;
    for (int i = lane; i < hulls.count; i += ORCHARD_SIMD_WIDTH) {
      const bool meets = hulls.at(i).meets(key0, key1);
      first = meets ? min(first, i) : first;
      last = meets ? i : last;
    }
    first = simd_min(first);
    last = simd_max(last);
    Range blocks;
    blocks.begin = first * 8 / BQ;
    blocks.end = last < 0 ? blocks.begin : last * 8 / BQ + 1;
    return blocks;
  }

  METAL_FUNC bool meets(int row0, int key0, int key1) const {
    return hulls.template of<BQ>(row0).meets(key0, key1);
  }

  METAL_FUNC bool stores(int row0, int key0, constant AttentionParams& params) const {
    if (!params.ds_partial) {
      return true;
    }
    const RangeHull hull = hulls.at(row0 / 8);
    return hull.fits(params.ds_keys) && hull.meets(key0, key0 + 8);
  }

  template <int COLS>
  METAL_FUNC void hide(thread Tile<float, 1, COLS>& p, int key0, int row0, LanePosition at) const {
    if (hulls.template of<BQ>(row0).covers(key0, key0 + 8)) {
      return;
    }
    const int key = key0 + at.row;
    ORCHARD_UNROLL
    for (int c = 0; c < COLS; c++) {
      const int row = row0 + 8 * c + at.col;
      p.fragments[0][c].x = ranges.of(row).has(key) ? p.fragments[0][c].x : 0.0f;
      p.fragments[0][c].y = ranges.of(row + 1).has(key) ? p.fragments[0][c].y : 0.0f;
    }
  }

  METAL_FUNC float2 distances(
      int row0, int c, int key, LanePosition at, constant AttentionParams&) const {
    const int row = row0 + 8 * c + at.col;
    return float2(ranges.of(row).position - key, ranges.of(row + 1).position - key);
  }
};
