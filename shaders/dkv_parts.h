// Which query heads of a group a threadgroup of the backward's key side takes, and where it stores
// what they sum up to. Few key/value heads would leave a GPU idle. There a group's query heads are
// divided between threadgroups, and backward_dkv_sums.h adds up what these leave.
#pragma once

#include "loader.h"

/// All heads of a group. The sums are dk and dv.
struct WholeGroup {
  template <typename T>
  using Sum = T;

  METAL_FUNC int heads(constant AttentionParams& params) const {
    return params.num_heads / params.num_kv_heads;
  }

  /// index counts threadgroups of the dispatch: key/value heads.
  METAL_FUNC Head first_head(int index, constant AttentionParams& params) const {
    return first_of_group(index + params.first_kv_head, params);
  }

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
/// (key/value heads of the dispatch, parts, S, D + Dv): dk's columns, and dv's behind them.
struct PartOfGroup {
  template <typename T>
  using Sum = float;

  WholeGroup group;

  METAL_FUNC int heads(constant AttentionParams& params) const {
    return group.heads(params) / params.dkv_parts;
  }

  /// index counts threadgroups of the dispatch: parts of key/value heads.
  METAL_FUNC Head first_head(int index, constant AttentionParams& params) const {
    Head head = group.first_head(index / params.dkv_parts, params);
    head.head += index % params.dkv_parts * heads(params);
    return head;
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
