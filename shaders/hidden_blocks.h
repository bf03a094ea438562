// What a loop knows of the blocks that it comes to in the map of a mask (MaskMap), and how far it
// goes on where they are hidden: past a run of them at once. The lanes of a simdgroup hold the
// words of blocks in a row, one each, so that few of a loop's steps wait for the map. All
// simdgroups of a threadgroup look at the same blocks.
#pragma once

#include "masks.h"
#include "params.h"

/// Blocks of the map that a lane looks at together, of which it keeps one. Their loads do not wait
/// for each other, while those of the next look wait for what this one finds.
#define ORCHARD_LANE_LOOK 4

/// The map's words for ROWS queries, by blocks of keys.
template <typename MASK, int ROWS>
struct WordsOfQueries {
  MaskMap<MASK> map;
  int row;
  int last;  // block of keys

  METAL_FUNC void start(
      Head head, const device uint2* mask_map, int row0, constant AttentionParams& params) {
    map.start(head, mask_map, params);
    row = row0 / ORCHARD_MAP_BLOCK;
    last = (params.kv_len - 1) / ORCHARD_MAP_BLOCK;
  }

  /// Beyond the last block it is the last one's.
  METAL_FUNC uint2 of(int block) const { return map.template word<ROWS>(row, min(block, last)); }
};

/// The map's words for the keys that one of its blocks has, by blocks of queries.
template <typename MASK>
struct WordsOfKeys {
  MaskMap<MASK> map;
  int col;

  METAL_FUNC void start(
      Head head, const device uint2* mask_map, int key0, constant AttentionParams& params) {
    map.start(head, mask_map, params);
    col = key0 / ORCHARD_MAP_BLOCK;
  }

  /// Beyond the last block it is the last one's.
  METAL_FUNC uint2 of(int block) const { return map.block(block, col); }
};

/// Blocks of the map in a row, as many as lanes, which a loop over blocks of BLOCK keys or queries
/// comes to: its block of the map and those behind it, or later ones if all before them are hidden.
template <typename MASK, typename Words, int BLOCK>
struct BlocksAhead {
  using Seen = typename MaskMap<MASK>::Seen;

  Words words;
  ushort lane;
  int first;     // of these blocks: lane i holds what block first + i has
  int last;      // of those that pass, or first - 1 if none does
  uint keys;     // of this lane's block that its queries see
  uint passing;  // bit i: block first + i lets some pair through, so that it passes
  uint whole;    // bit i: it lets all pairs through

  /// Looks at the loop's first block, `begin`. `across` is the first of the queries whose loop goes
  /// along keys, or of the keys whose loop goes along queries.
  METAL_FUNC void start(Head head, const device uint2* mask_map, int across, int begin,
      ushort own_lane, constant AttentionParams& params) {
    words.start(head, mask_map, across, params);
    lane = own_lane;
    look(begin * BLOCK / ORCHARD_MAP_BLOCK);
  }

  /// Holds the blocks from this one on. Where all of them are hidden it holds the next, and so on:
  /// it looks at ORCHARD_LANE_LOOK times as many.
  METAL_FUNC void look(int block) {
    uint2 word[ORCHARD_LANE_LOOK];
    int turn = ORCHARD_LANE_LOOK - 1;  // the first in which some block passes, or the last of all
    ORCHARD_UNROLL
    for (int i = ORCHARD_LANE_LOOK - 1; i >= 0; i--) {
      word[i] = words.of(block + i * ORCHARD_SIMD_WIDTH + lane);
      turn = word[i].x != 0 ? i : turn;
    }
    turn = simd_min(turn);
    uint2 own = word[0];
    ORCHARD_UNROLL
    for (int i = 1; i < ORCHARD_LANE_LOOK; i++) {
      own = turn == i ? word[i] : own;
    }
    first = block + turn * ORCHARD_SIMD_WIDTH;
    keys = own.x;
    passing = simd_or(own.x != 0 ? 1u << lane : 0u);
    last = first + ORCHARD_SIMD_WIDTH - 1 - int(clz(passing));
    if (!MASK::kAdds) {
      whole = simd_or(own.y != 0 ? 1u << lane : 0u);
    }
  }

  /// Looks at the map where no block from this one on is known to pass.
  METAL_FUNC void come_to(int block) {
    if (block > last) {
      look(block);
    }
  }

  /// A block's place among these, the first one's if it lies before them.
  METAL_FUNC int place(int block) const { return max(block - first, 0); }

  METAL_FUNC bool is_masked(int block) const {
    return MASK::kAdds || (whole >> place(block) & 1) == 0;
  }

  /// The keys from key0 on, those of the loop's block, that any of the queries sees.
  METAL_FUNC Seen seen_keys(int key0) {
    const int block = key0 / ORCHARD_MAP_BLOCK;
    come_to(block);
    const uint bits = simd_shuffle(keys, ushort(place(block)));
    Seen seen;
    seen.bits = block < first ? 0 : bits >> (key0 % ORCHARD_MAP_BLOCK);
    seen.masked_pairs = is_masked(block);
    return seen;
  }

  /// Whether the map's block that has these queries lets any pair through.
  METAL_FUNC bool passes(int row0) {
    const int block = row0 / ORCHARD_MAP_BLOCK;
    come_to(block);
    return block >= first && (passing >> place(block) & 1) != 0;
  }

  /// Whether the scores of these queries, which are not hidden, differ from those without the mask.
  METAL_FUNC bool masked(int row0) const { return is_masked(row0 / ORCHARD_MAP_BLOCK); }

  /// Whether the map's block that holds (row, key), of only some of the queries, lets any pair
  /// through.
  METAL_FUNC bool block_passes(int row, int key) const { return words.map.passes(row, key); }

  /// Steps from the loop's block, which has been asked about, to the next one that is not known to
  /// be hidden. It is at least one.
  METAL_FUNC int steps_past(int block) const {
    const int kBlocks = ORCHARD_MAP_BLOCK / BLOCK;  // of one of the map
    const int from = place(block / kBlocks);
    const uint ahead = passing & (0xffffffffu << from);
    return max((first + int(ctz(ahead))) * kBlocks - block, 1);
  }
};

template <typename Words, int BLOCK>
struct BlocksAhead<NoMask, Words, BLOCK> {
  METAL_FUNC void start(Head, const device uint2*, int, int, ushort, constant AttentionParams&) {}
  METAL_FUNC EverySeen seen_keys(int) const {
    EverySeen seen;
    return seen;
  }
  METAL_FUNC bool passes(int) const { return true; }
  METAL_FUNC bool masked(int) const { return false; }
  METAL_FUNC bool block_passes(int, int) const { return true; }
  METAL_FUNC int steps_past(int) const { return 1; }
};

/// What ROWS queries see of the blocks of BK keys before a loop.
template <typename MASK, int ROWS, int BK>
using KeysAhead = BlocksAhead<MASK, WordsOfQueries<MASK, ROWS>, BK>;

/// What the blocks of BQ queries before a loop see of the keys that one block of the map has.
template <typename MASK, int BQ>
using QueriesAhead = BlocksAhead<MASK, WordsOfKeys<MASK>, BQ>;
