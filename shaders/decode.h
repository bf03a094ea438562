// Attention of few queries to a cache of keys and values: each byte of it is read once.
//
// The rows of a fragment are the queries of all heads that share a key/value head: row r is head
// r % G of the group at query r / G. The keys that the rows of a threadgroup see are divided into
// `parts` of whole blocks, as evenly as that goes, but of no fewer blocks than ORCHARD_LEAST_PART
// keys have. Each simdgroup takes one part. Those of a threadgroup join theirs in the
// order of the parts and leave one sum and its statistics, which attention_decode_merge joins with
// those of the other threadgroups in the same order. How the keys are divided depends on the
// sequence itself, on what all sequences have in common and on the GPU, so that no result depends
// on what else is in the batch.
//
// K and V go from device memory into operands of the matrix unit without a stop: a lane reads
// chunks of up to 16 bytes, which hold its elements of several fragments. Fragments of K^T so have
// the head dim in an order of their own, Q is given the same one, and products sum over it in any
// order. Fragments of V have columns in an order of their own, in which O has them until it is
// stored.
//
// What a block's values and the next block's keys take to arrive is time for the scores. Where they
// and O have room in registers together, the values are asked for before the products of Q and K,
// whose keys are there already, and the next keys before the softmax. Where they have not, as many
// of the values as have are asked for before the softmax.
//
// The forward of a call that has few queries and many keys runs here, too (prefers_decode in
// native/plan/decode.h): its keys are a cache that is full.
#pragma once

#include "cache.h"
#include "joined_row.h"
#include "masks.h"
#include "ranges.h"
#include "scores.h"
#include "softmax.h"

/// Q as left operand, for all simdgroups.
template <typename F, int DEPTH>
struct SharedQuery {
  const threadgroup vec<F, 2>* pairs;  // (rows of fragments, DEPTH, lanes)
  ushort lane;

  METAL_FUNC vec<F, 2> pair(int r, int d) const {
    return pairs[(r * DEPTH + d) * ORCHARD_SIMD_WIDTH + lane];
  }
};

/// What a row is, and what it sees: keys [begin, end).
struct DecodeRow {
  bool is_query;
  bool exists;  // is one, and sees any key
  Head head;    // no more of it than which one it is
  int query;
  int position;
  int begin;
  int end;

  METAL_FUNC void find(
      int kv_index, int row, CachedSequence sequence, constant DecodeParams& params) {
    constant AttentionParams& attention = params.attention;
    const int heads = attention.num_heads / attention.num_kv_heads;
    is_query = row < heads * attention.q_len;
    exists = is_query;
    query = row / heads;
    head.batch = kv_index / attention.num_kv_heads;
    head.head = kv_index % attention.num_kv_heads * heads + row % heads;
    // Aligned at the bottom right, where the call does not move the queries: the last one stands on
    // the last key.
    position = sequence.length - attention.q_len + query + attention.diagonal;
    see(max(sequence.start, position - attention.window_left),
        min(sequence.length, position + attention.window_right + 1));
  }

  /// Stands where its key ranges say, and sees what lies between their ends.
  METAL_FUNC void see(VisibleKeys keys) {
    position = keys.position;
    see(keys.prefix > 0 ? 0 : keys.begin, max(keys.end, keys.prefix));
  }

  METAL_FUNC void see(int first, int behind) {
    exists = exists && first < behind;
    begin = exists ? first : ORCHARD_WINDOW_OPEN;
    end = exists ? behind : 0;
  }

  /// Scores of key `first` and the next one: -inf for a key that the row does not see, and for one
  /// that is not among `keys`.
  METAL_FUNC float2 hide(float2 score, int first, Range keys) const {
    Range seen;
    seen.begin = max(keys.begin, begin);
    seen.end = min(keys.end, end);
    return float2(seen.has(first) ? score.x : -INFINITY, seen.has(first + 1) ? score.y : -INFINITY);
  }
};

/// What one simdgroup reads of Q for all: every SIMDGROUPS-th fragment of each row of fragments.
template <typename T, int DEPTH, int R, int SIMDGROUPS>
struct OwnQuery {
  static constant constexpr const int kFragments = (DEPTH + SIMDGROUPS - 1) / SIMDGROUPS;

  vec<T, 2> pairs[R][kFragments];
  ushort simdgroup;

  /// Where the i-th of them lies in its row, which has no more than DEPTH.
  METAL_FUNC int depth(int i) const { return i * SIMDGROUPS + simdgroup; }

  METAL_FUNC bool has(int i) const { return DEPTH % SIMDGROUPS == 0 || depth(i) < DEPTH; }

  /// In the order of the head dim that K^T has.
  METAL_FUNC void load(const device T* query, thread const DecodeRow* rows,
      constant AttentionParams& params, LanePosition at) {
    LaneColumns<T, 8, DEPTH> of_pair[2];  // rows of K^T
    of_pair[0].lane = at.col;
    of_pair[1].lane = at.col + 1;
    ORCHARD_UNROLL
    for (int r = 0; r < R; r++) {
      const device T* row = query + rows[r].head.batch * params.q.batch +
                            rows[r].head.head * params.q.head + rows[r].query * params.q.row;
      ORCHARD_UNROLL
      for (int i = 0; i < kFragments; i++) {
        const bool exists = rows[r].is_query && has(i);
        const int first = of_pair[0].column(depth(i));
        const int second = of_pair[1].column(depth(i));
        pairs[r][i] =
            vec<T, 2>(exists && first < params.head_dim ? row[first * params.q.col] : T(0),
                exists && second < params.head_dim ? row[second * params.q.col] : T(0));
      }
    }
  }

  /// To where SharedQuery has it.
  template <typename F>
  METAL_FUNC void share(threadgroup vec<F, 2>* storage, ushort lane) const {
    ORCHARD_UNROLL
    for (int r = 0; r < R; r++) {
      ORCHARD_UNROLL
      for (int i = 0; i < kFragments; i++) {
        if (has(i)) {
          storage[(r * DEPTH + depth(i)) * ORCHARD_SIMD_WIDTH + lane] =
              vec<F, 2>(F(pairs[r][i].x), F(pairs[r][i].y));
        }
      }
    }
  }
};

/// What is added to the score of a key: -inf hides it.
METAL_FUNC float mask_addend(uchar element) { return element ? 0.0f : -INFINITY; }

template <typename E>
METAL_FUNC float mask_addend(E element) {
  return float(element);
}

/// A mask that is the same for all heads and queries of a sequence.
template <typename MASK>
struct KeyMask {
  METAL_FUNC void start(Head, const device uchar*, constant AttentionParams&) {}
  METAL_FUNC float addend(int) const { return 0.0f; }
};

template <typename E, bool PAIRS>
struct KeyMask<Mask<E, PAIRS>> {
  const device E* elements;
  int64_t stride;

  METAL_FUNC void start(Head head, const device uchar* mask, constant AttentionParams& params) {
    elements = reinterpret_cast<const device E*>(mask) + mask_offset(head, params.mask);
    stride = params.mask.col;
  }

  METAL_FUNC float addend(int key) const { return mask_addend(elements[key * stride]); }
};

/// What hides keys from all rows of a sequence alike: a mask, and where there is one query, its key
/// ranges (RANGES). A hidden key reaches nothing, whatever its numbers are.
template <typename MASK, bool RANGES>
struct SharedSight {
  static constant constexpr const bool kAny = MASK::kAny || RANGES;

  KeyMask<MASK> mask;
  VisibleKeys ranges;
  float own;  // addend of the key of this lane

  METAL_FUNC void start(Head head, const device uchar* mask_elements, const device int* key_ranges,
      constant AttentionParams& params) {
    mask.start(head, mask_elements, params);
    if (RANGES) {
      ranges = range_rows(head, key_ranges, params).of(0);
    }
  }

  /// Reads the block from key0 on, a key a lane; those that are not among `keys` have what one of
  /// them has. Returns whether any of them may be seen.
  METAL_FUNC bool read(int key0, Range keys, ushort lane) {
    if (!kAny) {
      return true;
    }
    const int key = clamp(key0 + lane % ORCHARD_CACHE_BLOCK, keys.begin, keys.end - 1);
    own = mask.addend(key);
    if (RANGES) {
      own = ranges.has(key) ? own : -INFINITY;
    }
    return simd_any(own != -INFINITY);
  }

  /// The first block from key0 on of which any key may be seen, as `read` leaves it. Behind the
  /// last one the end of the keys, or more.
  METAL_FUNC int next(int key0, Range keys, ushort lane) {
    while (key0 < keys.end && !read(key0, keys, lane)) {
      key0 += ORCHARD_CACHE_BLOCK;
    }
    return key0;
  }

  /// What key i of the block adds.
  METAL_FUNC float addend(int i) const { return simd_shuffle(own, ushort(i)); }
};

/// A score with what its key adds. What is hidden is -inf even where the score is NaN.
METAL_FUNC float seen_score(float score, float addend) {
  return addend == -INFINITY ? -INFINITY : score + addend;
}

/// The keys of one of `parts`, of those that any row sees. Its end is not behind its beginning
/// where there are none.
METAL_FUNC Range keys_of_part(Range seen, int part, int parts) {
  const int kBlock = ORCHARD_CACHE_BLOCK;
  const int first = seen.begin / kBlock;
  const int blocks = max((seen.end + kBlock - 1) / kBlock - first, 0);
  const int taken = clamp(blocks / (ORCHARD_LEAST_PART / kBlock), 1, parts);  // parts with keys
  const int even = blocks / taken;
  const int rest = blocks - even * taken;  // so many parts have a block more
  const int begin = first + part * even + min(part, rest);
  Range range;
  range.begin = max(begin * kBlock, seen.begin);
  range.end = min((begin + even + (part < rest)) * kBlock, seen.end);
  return range;
}

// T is the tensors' type, F that of the matrix unit's operands, BD and VD the padded head dims of
// keys and values, 8 R the rows of a threadgroup. VEC: rows of keys and values are whole chunks of
// 16 bytes. Grid: x rows, y as many parts as there are simdgroups.
template <typename T, typename F, int BD, int VD, int R, int SIMDGROUPS, bool VEC, bool PAGED,
    bool SOFTCAP, bool ALIBI, typename MASK, bool RANGES>
[[kernel, max_total_threads_per_threadgroup(ORCHARD_THREADS(SIMDGROUPS))]] void attention_decode(
    const device T* query [[buffer(kBufferQuery)]],        // (B, Hq, L, D)
    const device T* key [[buffer(kBufferKey)]],            // (entries, Hkv, keys of an entry, D)
    const device T* value [[buffer(kBufferValue)]],        // (entries, Hkv, keys of an entry, Dv)
    device float* sums [[buffer(kBufferParts)]],           // (x, y, 8 R, VD)
    device float2* part_sums [[buffer(kBufferPartSums)]],  // (x, y, 8 R)
    constant DecodeParams& params [[buffer(kBufferParams)]],
    const device uchar* mask [[buffer(kBufferMask)]],
    const device float* alibi_slopes [[buffer(kBufferAlibiSlopes)]],
    const device int* key_ranges [[buffer(kBufferKeyRanges)]],  // (1 or B, 1, 1, 4)
    const device int* cache_lengths [[buffer(kBufferCacheLengths)]],
    const device int* cache_starts [[buffer(kBufferCacheStarts)]],
    const device int* cache_entries [[buffer(kBufferCacheEntries)]],
    const device int* block_table [[buffer(kBufferBlockTable)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  const int kDepth = BD / 8;
  const int kValueDepth = VD / 8;
  const int kChunk = Chunk<T>::kElements;
  const int kBlock = ORCHARD_CACHE_BLOCK;
  const int kColumns = kBlock / 8;
  const int kChains = Chains<T>::kCount;
  using Pair = vec<F, 2>;
  using KeyColumns = LaneColumns<T, 8, kDepth>;
  using ValueColumns = LaneColumns<T, 4, 2 * kValueDepth>;
  const int kJoined = 8;  // fragments of O at once
  // Registers of a lane: O, a block's values, and its keys.
  const int kSums = R * VD / 4;
  const int kOfValues = kBlock * VD * sizeof(T) / (4 * ORCHARD_SIMD_WIDTH);
  const int kOfKeys = kBlock * BD * sizeof(T) / (4 * ORCHARD_SIMD_WIDTH);
  const bool kKeysAhead = kSums + kOfValues + kOfKeys <= ORCHARD_OPERAND_REGISTERS;
  // So many of a block's fragments of values have room beside O, and are asked for ahead.
  const int kRoom = (ORCHARD_OPERAND_REGISTERS - kSums) / (kOfValues / kColumns);
  const int kValuesAhead = kRoom >= kColumns ? kColumns : kRoom > 0 ? kRoom : 0;
  threadgroup Pair storage[R * kDepth * ORCHARD_SIMD_WIDTH];
  threadgroup float2 part_stats[SIMDGROUPS * R * 8];
  threadgroup float2 fragments[SIMDGROUPS * kJoined * ORCHARD_SIMD_WIDTH];

  constant AttentionParams& attention = params.attention;
  const LanePosition at = lane_position(lane);
  const int kv_index = group.x / params.blocks;
  const int row0 = group.x % params.blocks * 8 * R;
  const int part = group.y * SIMDGROUPS + simdgroup;
  CachedSequence sequence;
  sequence.find(kv_index / attention.num_kv_heads,
      cache_buffers(cache_lengths, cache_starts, cache_entries, block_table), params.cache);

  SharedSight<MASK, RANGES> sight;
  sight.start(first_of_group(kv_index, attention), mask, key_ranges, attention);
  DecodeRow rows[R];
  HeadScore<SOFTCAP, ALIBI> scores[R];
  Range seen;  // by any query
  seen.begin = ORCHARD_WINDOW_OPEN;
  seen.end = 0;
  Range common;  // to all queries
  common.begin = 0;
  common.end = ORCHARD_WINDOW_OPEN;
  ORCHARD_UNROLL
  for (int r = 0; r < R; r++) {
    rows[r].find(kv_index, row0 + 8 * r + at.row, sequence, params);
    if (RANGES) {
      rows[r].see(sight.ranges);
    }
    scores[r].start(rows[r].head, alibi_slopes, attention);
    seen.begin = min(seen.begin, rows[r].begin);
    seen.end = max(seen.end, rows[r].end);
    common.begin = rows[r].is_query ? max(common.begin, rows[r].begin) : common.begin;
    common.end = rows[r].is_query ? min(common.end, rows[r].end) : common.end;
  }
  seen.begin = simd_min(seen.begin);
  seen.end = simd_max(seen.end);
  const Range keys = keys_of_part(seen, part, params.parts * SIMDGROUPS);
  common.begin = max(simd_max(common.begin), keys.begin);
  common.end = min(simd_min(common.end), keys.end);
  const Starts whole_blocks = Starts::between(common.begin, common.end - kBlock);

  // Q and the first keys are on their way together.
  OwnQuery<T, kDepth, R, SIMDGROUPS> own_query;
  own_query.simdgroup = simdgroup;
  own_query.load(query, rows, attention, at);
  BlockRows<T, VEC> k_rows;
  BlockRows<T, VEC> v_rows;
  k_rows.all.start(key + sequence.template first<PAGED>(attention.k),
      kv_index % attention.num_kv_heads, attention.k, attention.head_dim);
  v_rows.all.start(value + sequence.template first<PAGED>(attention.v),
      kv_index % attention.num_kv_heads, attention.v, attention.v_head_dim);
  k_rows.keys = keys;
  v_rows.keys = keys;
  KeyColumns k_columns;
  ValueColumns v_columns;
  k_columns.lane = at.row;
  v_columns.lane = at.col / 2;
  KeyChunks<T, kColumns, KeyColumns> k_chunks;
  ValueChunks<T, (kValuesAhead > 0 ? kValuesAhead : 1), ValueColumns> v_chunks;
  const bool wide = attention.head_dim == BD && attention.v_head_dim == VD;
  int key0 = sight.next(keys.begin / kBlock * kBlock, keys, lane);
  // Every query sees all keys of the block, but for what `sight` hides from all of them.
  bool whole = whole_blocks.has(key0);
  CachedBlock block;
  if (key0 < keys.end) {
    block = sequence.template block<PAGED>(key0);
    k_rows.move_to(key0, block, attention.k);
    if (kKeysAhead) {
      load_block(k_chunks, k_rows, wide && whole, k_columns, at);
    }
  }

  own_query.share(storage, lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  SharedQuery<F, kDepth> q;
  q.pairs = storage;
  q.lane = lane;

  Tile<float, R, kValueDepth> o;
  zero(o);
  OnlineSoftmax<R, true> softmax;
  softmax.init();
  while (key0 < keys.end) {
    v_rows.move_to(key0, block, attention.v);
    if (kKeysAhead) {
      load_block(v_chunks, v_rows, wide && whole, v_columns, at);
    }
    Tile<float, R, kColumns> s;
    ORCHARD_UNROLL
    for (int c = 0; c < kColumns; c++) {
      Tile<float, R, kChains> chains;
      zero(chains);
      Chunk<T> a;
      Chunk<T> b;
      ORCHARD_UNROLL
      for (int d = 0; d < kDepth; d++) {
        if (d % kChunk == 0) {
          const int g = d / kChunk;
          a = kKeysAhead ? k_chunks.first[c][g]
                         : k_rows.template chunk<false>(c, at.col, k_columns, g);
          b = kKeysAhead ? k_chunks.second[c][g]
                         : k_rows.template chunk<false>(c, at.col + 1, k_columns, g);
        }
        const vec<F, 2> right = vec<F, 2>(F(a.at(d % kChunk)), F(b.at(d % kChunk)));
        ORCHARD_UNROLL
        for (int r = 0; r < R; r++) {
          mma(chains.fragments[r][d % kChains], q.pair(r, d), right);
        }
      }
      ORCHARD_UNROLL
      for (int r = 0; r < R; r++) {
        s.fragments[r][c] = chains.fragments[r][0];
        ORCHARD_UNROLL
        for (int chain = 1; chain < kChains; chain++) {
          s.fragments[r][c] += chains.fragments[r][chain];
        }
      }
    }
    float2 addends[kColumns];  // not used where nothing hides keys
    bool hidden[kColumns];  // a value: its weights are zero, but zero times its numbers need not be
    ORCHARD_UNROLL
    for (int c = 0; c < kColumns; c++) {
      hidden[c] = !v_rows.has(8 * c + at.row);
      if (SharedSight<MASK, RANGES>::kAny) {
        addends[c] = float2(sight.addend(8 * c + at.col), sight.addend(8 * c + at.col + 1));
        const float addend = sight.addend(8 * c + at.row);  // a shuffle: of all lanes
        hidden[c] = hidden[c] || addend == -INFINITY;
      }
    }
    const int next = sight.next(key0 + kBlock, keys, lane);
    const bool next_whole = whole_blocks.has(next);
    if (next < keys.end) {
      block = sequence.template block<PAGED>(next);
      k_rows.move_to(next, block, attention.k);
      if (kKeysAhead) {
        load_block(k_chunks, k_rows, wide && next_whole, k_columns, at);
      }
    }
    if (kValuesAhead > 0 && !kKeysAhead) {
      load_block(v_chunks, v_rows, wide && whole, v_columns, at);
    }
    ORCHARD_UNROLL
    for (int r = 0; r < R; r++) {
      ORCHARD_UNROLL
      for (int c = 0; c < kColumns; c++) {
        const int column = key0 + 8 * c + at.col;
        const float distance = float(rows[r].position - column);
        float2 derivative;  // not used
        float2 score =
            scores[r].of(s.fragments[r][c], float2(distance, distance - 1.0f), derivative);
        if (SharedSight<MASK, RANGES>::kAny) {
          score = float2(seen_score(score.x, addends[c].x), seen_score(score.y, addends[c].y));
        }
        s.fragments[r][c] = score;
      }
    }
    if (!whole) {
      ORCHARD_UNROLL
      for (int r = 0; r < R; r++) {
        ORCHARD_UNROLL
        for (int c = 0; c < kColumns; c++) {
          s.fragments[r][c] = rows[r].hide(s.fragments[r][c], key0 + 8 * c + at.col, keys);
        }
      }
    }
    softmax.update(s, o);
    const Tile<F, R, kColumns> p = as_operand<F>(s);
    ORCHARD_UNROLL
    for (int c = 0; c < kColumns; c++) {
      Chunk<T> a;
      ORCHARD_UNROLL
      for (int f = 0; f < kValueDepth; f++) {
        if (f % (kChunk / 2) == 0) {
          const int g = f / (kChunk / 2);
          const bool ahead = c < kValuesAhead;
          a = ahead ? v_chunks.of[c][g] : v_rows.template chunk<false>(c, at.row, v_columns, g);
          if (!ahead || SharedSight<MASK, RANGES>::kAny) {
            a.bits = hidden[c] ? uint4(0) : a.bits;
          }
        }
        const vec<F, 2> right = operand<F>(a.pair(f % (kChunk / 2)));
        ORCHARD_UNROLL
        for (int r = 0; r < R; r++) {
          mma(o.fragments[r][f], p.fragments[r][c], right);
        }
      }
    }
    key0 = next;
    whole = next_whole;
  }

  // Rows whose fragments lie in different simdgroups become one before they leave the threadgroup.
  // A query sees some key of each part, unless `sight` hides all of them: parts have more keys than
  // there are queries. So no part has anything but zeros for a query that another part has more
  // for.
  ORCHARD_UNROLL
  for (int r = 0; r < R; r++) {
    const float total = softmax.total(r);
    if (at.col == 0) {
      part_stats[(simdgroup * R + r) * 8 + at.row] = float2(softmax.origin[r], total);
    }
  }
  ORCHARD_UNROLL
  for (int r = 0; r < R; r++) {
    const int64_t index = ((int64_t)group.x * params.parts + group.y) * 8 * R + 8 * r + at.row;
    JoinedRow<SIMDGROUPS> joined;
    ORCHARD_UNROLL
    for (int c0 = 0; c0 < kValueDepth; c0 += kJoined) {
      const int count = min(kValueDepth - c0, kJoined);
      if (r + c0 > 0) {  // the fragments of before have been read
        threadgroup_barrier(mem_flags::mem_threadgroup);
      }
      ORCHARD_UNROLL
      for (int c = 0; c < kJoined; c++) {
        if (c < count) {
          fragments[(simdgroup * kJoined + c) * ORCHARD_SIMD_WIDTH + lane] = o.fragments[r][c0 + c];
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (c0 == 0) {
        joined.find(part_stats + r * 8 + at.row, R * 8);
      }
      if (rows[r].exists && joined.total != 0.0f) {  // nothing reads the others
        for (int c = simdgroup; c < count; c += SIMDGROUPS) {
          const int col = v_columns.column(2 * (c0 + c));
          *reinterpret_cast<device float2*>(sums + index * VD + col) =
              joined.sum(fragments + c * ORCHARD_SIMD_WIDTH + lane, kJoined * ORCHARD_SIMD_WIDTH);
        }
      }
    }
    if (simdgroup == 0 && at.col == 0) {
      part_sums[index] = float2(joined.top, joined.total);
    }
  }
}
