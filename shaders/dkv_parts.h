// Which query heads of a group a threadgroup of the backward's key side takes, and where it stores
// what they sum up to. Few key/value heads would leave a GPU idle, and dS of a whole group may not
// fit into its buffer. There a group's query heads are divided into parts, which run side by side
// and in turns, and backward_dkv_sums.h adds up what those side by side leave.
#pragma once

#include "loader.h"

/// All heads of a group. The sums are dk and dv.
struct WholeGroup {
  template <typename T>
  using Sum = T;

  METAL_FUNC int heads(constant AttentionParams& params) const {
    return params.num_heads / params.num_kv_heads;
  }

  /// Whether an earlier turn has stored sums of other heads.
  METAL_FUNC bool had_turns(constant AttentionParams&) const { return false; }

  template <typename T>
  METAL_FUNC OutputRows<T> dk_rows(
      device T* dk, int index, Head head, constant AttentionParams& params) const {
    return head.key_output(dk, params.dk, params.head_dim);
  }

  template <typename T>
  METAL_FUNC OutputRows<T> dv_rows(
      device T* dv, int index, Head head, constant AttentionParams& params) const {
    return head.key_output(dv, params.dv, params.v_head_dim);
  }
};

/// One of the params.dkv_parts parts of a group, as many heads in each. The sums are rows of float,
/// (key/value heads of the dispatch, dkv_sums, S, D + Dv): dk's columns, and dv's behind them.
struct PartOfGroup {
  template <typename T>
  using Sum = float;

  METAL_FUNC int heads(constant AttentionParams& params) const {
    return params.num_heads / params.num_kv_heads / params.dkv_parts;
  }

  METAL_FUNC bool had_turns(constant AttentionParams& params) const {
    return params.first_head % (params.num_heads / params.num_kv_heads) > 0;
  }

  METAL_FUNC OutputRows<float> dk_rows(
      device float* parts, int index, Head head, constant AttentionParams& params) const {
    OutputRows<float> rows;
    rows.row_stride = params.head_dim + params.v_head_dim;
    rows.data = parts + index * (params.kv_len * rows.row_stride);
    rows.length = params.kv_len;
    rows.width = params.head_dim;
    rows.taking_part = head.window.seen_keys();
    return rows;
  }

  METAL_FUNC OutputRows<float> dv_rows(
      device float* parts, int index, Head head, constant AttentionParams& params) const {
    OutputRows<float> rows = dk_rows(parts, index, head, params);
    rows.data += params.head_dim;
    rows.width = params.v_head_dim;
    return rows;
  }
};
