// What attention_forward leaves at its end: `Finished` the rows' results, or `Part` the sums of its
// share of the keys, where too few threadgroups would have all of a row's
// (attention_forward_merge).
#pragma once

#include "loader.h"
#include "softmax.h"

/// Where a forward's results go. `parts` has float2 (parts, B, Hq, L), the rows' origins and sums,
/// and behind them O as floats (parts, B, Hq, L, Dv).
template <typename T>
struct ForwardResults {
  device T* out;
  device float2* row_stats;
  device float* parts;
};

/// Rows of a part. They are few where there are parts: int holds every place in them.
METAL_FUNC int rows_of_part(constant AttentionParams& params) {
  return params.batch * params.num_heads * params.q_len;
}

/// Floats before the O of the first part.
METAL_FUNC int floats_before_sums(constant AttentionParams& params) {
  return 2 * params.forward_parts * rows_of_part(params);
}

/// What a row's sums become: O is multiplied by `factor`.
struct FinishedRow {
  float factor;
  float2 stats;

  /// `of_keys` is the sum of row r's exponentials.
  template <bool DROPOUT, int ROWS, bool NATURAL>
  METAL_FUNC void finish(thread const OnlineSoftmax<ROWS, NATURAL>& softmax, int r, float of_keys,
      bool has_sink, float sink, constant AttentionParams& params) {
    const float total = has_sink ? of_keys + exponential_of_sink(sink, softmax.origin[r]) : of_keys;
    factor = of_keys == 0.0f ? 0.0f : (DROPOUT ? params.dropout_rescale : 1.0f) / total;
    stats = softmax.row_stats(r, of_keys, total);
  }
};

/// A threadgroup has all keys of its rows: it takes the sink, and divides by the sum.
struct Finished {
  int block;  // of queries

  METAL_FUNC void start(int index, constant AttentionParams&) { block = index; }

  METAL_FUNC Range keys(Range blocks) const { return blocks; }

  /// `index` is the head's, of batch * num_heads.
  template <typename V, typename T, int R, bool NATURAL, int COLS>
  METAL_FUNC void leave(thread Tile<float, R, COLS>& o, thread OnlineSoftmax<R, NATURAL>& softmax,
      ForwardResults<T> results, Head head, int index, const device float* sinks, int row0,
      LanePosition at, constant AttentionParams& params) const {
    const bool has_sink = NATURAL && params.has_sinks;
    const float sink = has_sink ? sinks[head.head] : -INFINITY;
    if (has_sink) {
      softmax.make_room_for(sink, o);
    }
    float factor[R];
    ORCHARD_UNROLL
    for (int r = 0; r < R; r++) {
      FinishedRow of_row;
      of_row.template finish<V::kDropout>(softmax, r, softmax.total(r), has_sink, sink, params);
      factor[r] = of_row.factor;
      const int row = row0 + 8 * r + at.row;
      if (row < params.q_len && at.col == 0) {
        results.row_stats[(int64_t)index * params.q_len + row] = of_row.stats;
      }
    }
    mul_row(o, factor);
    store_rows<V::kVec>(head.query_output(results.out, params.out, params.v_head_dim), o, row0, at);
  }
};

/// A threadgroup has one of params.forward_parts equal shares of the blocks of keys.
struct Part {
  int block;  // of queries
  int part;
  int parts;

  METAL_FUNC void start(int index, constant AttentionParams& params) {
    parts = params.forward_parts;
    block = index / parts;
    part = index % parts;
  }

  METAL_FUNC Range keys(Range blocks) const {
    const int count = blocks.end - blocks.begin;
    Range share;
    share.begin = blocks.begin + count * part / parts;
    share.end = blocks.begin + count * (part + 1) / parts;
    return share;
  }

  template <typename V, typename T, int R, bool NATURAL, int COLS>
  METAL_FUNC void leave(thread Tile<float, R, COLS>& o, thread OnlineSoftmax<R, NATURAL>& softmax,
      ForwardResults<T> results, Head head, int index, const device float*, int row0,
      LanePosition at, constant AttentionParams& params) const {
    const int first = part * rows_of_part(params) + index * params.q_len;
    device float2* stats = reinterpret_cast<device float2*>(results.parts) + first;
    ORCHARD_UNROLL
    for (int r = 0; r < R; r++) {
      const float total = softmax.total(r);
      const int row = row0 + 8 * r + at.row;
      if (row < params.q_len && at.col == 0) {
        stats[row] = float2(softmax.origin[r], total);
      }
    }
    OutputRows<float> sums;
    sums.data = results.parts + floats_before_sums(params) + first * params.v_head_dim;
    sums.row_stride = params.v_head_dim;
    sums.length = params.q_len;
    sums.width = params.v_head_dim;
    sums.taking_part = head.window.seeing_rows();
    store_rows<V::kVec>(sums, o, row0, at);
  }
};
