// Who shares the elements of a mask: the heads of batch entries that it does not tell apart.
#pragma once

#include "loader.h"
#include "params.h"

/// The heads that share the index-th of the mask's (outer, inner, head), one after the other. The
/// mask's gradient has a stride of 0 where they do.
struct MaskSharers {
  int outer;
  int inner;
  int head;
  int first_inner;
  int first_head;
  int outers;  // that share it
  int inners;
  int heads;
  int inner_size;

  METAL_FUNC void start(int index, constant AttentionParams& params) {
    inner_size = int(params.dmask.inner_size);
    outers = params.dmask.outer == 0 ? params.batch / inner_size : 1;
    inners = params.dmask.inner == 0 ? inner_size : 1;
    heads = params.dmask.head == 0 ? params.num_heads : 1;
    const int mask_heads = params.num_heads / heads;
    const int mask_inners = inner_size / inners;
    first_head = index % mask_heads;
    first_inner = index / mask_heads % mask_inners;
    outer = index / mask_heads / mask_inners;
    inner = first_inner;
    head = first_head;
  }

  METAL_FUNC int count() const { return outers * inners * heads; }

  /// Goes on by so many heads.
  METAL_FUNC void skip(int steps) {
    head = first_head + steps % heads;
    inner = first_inner + steps / heads % inners;
    outer += steps / heads / inners;
  }

  METAL_FUNC void advance() {
    head++;
    if (head < first_head + heads) {
      return;
    }
    head = first_head;
    inner++;
    if (inner < first_inner + inners) {
      return;
    }
    inner = first_inner;
    outer++;
  }

  METAL_FUNC Head present(constant AttentionParams& params) const {
    Head x;
    x.batch = outer * inner_size + inner;
    x.head = head;
    x.kv_head = head / (params.num_heads / params.num_kv_heads);
    x.window = window_of(params);
    return x;
  }
};
