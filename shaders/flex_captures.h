// The tensors that a score_mod or a mask_mod reads, and block_states.
#pragma once

#include "flex_params.h"
#include "tile.h"

/// The captured tensors of a call, in the order in which the functions' text counts them. Those
/// that it does not read are not bound.
struct FlexCaptures {
  const device uchar* tensors[ORCHARD_MOST_CAPTURES];
  CaptureShape shapes[ORCHARD_MOST_CAPTURES];  // no longer in memory, which loops would read again
  constant FlexParams* params;

  /// An element of tensor n, of type T. Negative indices count from the end, and nothing is read
  /// beyond either end.
  template <typename T>
  METAL_FUNC T at(int n) const {
    return element<T>(n, 0);
  }

  template <typename T>
  METAL_FUNC T at(int n, int i0) const {
    return element<T>(n, place(n, 0, i0));
  }

  template <typename T>
  METAL_FUNC T at(int n, int i0, int i1) const {
    return element<T>(n, place(n, 0, i0) + place(n, 1, i1));
  }

  template <typename T>
  METAL_FUNC T at(int n, int i0, int i1, int i2) const {
    return element<T>(n, place(n, 0, i0) + place(n, 1, i1) + place(n, 2, i2));
  }

  template <typename T>
  METAL_FUNC T at(int n, int i0, int i1, int i2, int i3) const {
    return element<T>(n, place(n, 0, i0) + place(n, 1, i1) + place(n, 2, i2) + place(n, 3, i3));
  }

  template <typename T>
  METAL_FUNC T element(int n, int index) const {
    return reinterpret_cast<const device T*>(tensors[n])[index];
  }

  /// What an index of dimension d adds to the place of an element.
  METAL_FUNC int place(int n, int d, int index) const {
    const int size = shapes[n].sizes[d];
    const int counted = index < 0 ? index + size : index;
    return clamp(counted, 0, size - 1) * shapes[n].strides[d];
  }
};

METAL_FUNC FlexCaptures flex_captures(const device uchar* capture0, const device uchar* capture1,
    const device uchar* capture2, const device uchar* capture3, const device uchar* capture4,
    const device uchar* capture5, const device uchar* capture6, const device uchar* capture7,
    constant FlexParams& params) {
  FlexCaptures captures;
  captures.tensors[0] = capture0;
  captures.tensors[1] = capture1;
  captures.tensors[2] = capture2;
  captures.tensors[3] = capture3;
  captures.tensors[4] = capture4;
  captures.tensors[5] = capture5;
  captures.tensors[6] = capture6;
  captures.tensors[7] = capture7;
  ORCHARD_UNROLL
  for (int n = 0; n < ORCHARD_MOST_CAPTURES; n++) {
    ORCHARD_UNROLL
    for (int d = 0; d < ORCHARD_CAPTURE_DIMS; d++) {
      captures.shapes[n].sizes[d] = params.captures[n].sizes[d];
      captures.shapes[n].strides[d] = params.captures[n].strides[d];
    }
  }
  captures.params = &params;
  return captures;
}

/// block_states of one head. What says where they lie stays in memory: few tiles ask, and a loop
/// would keep it in registers.
struct BlockStates {
  const device uchar* states;
  constant FlexParams* params;

  METAL_FUNC void start(int batch, int head, const device uchar* all, constant FlexParams& flex) {
    params = &flex;
    states = all + batch * flex.states.batch + head * flex.states.head;
  }

  METAL_FUNC bool whole() const { return params->states.whole; }

  /// A BlockState: that of the block which holds the pair.
  METAL_FUNC int of(int row, int key) const {
    return params->states.given ? listed(row, key) : int(kStateAsk);
  }

  /// The same where block_states is given.
  METAL_FUNC int listed(int row, int key) const {
    constant BlockStateParams& blocks = params->states;
    return states[min(row / blocks.block_q, blocks.rows - 1) * blocks.row +
                  min(key / blocks.block_kv, blocks.cols - 1)];
  }

  /// The first query behind the row's block.
  METAL_FUNC int behind(int row) const {
    constant BlockStateParams& blocks = params->states;
    return blocks.given ? (row / blocks.block_q + 1) * blocks.block_q : ORCHARD_MAX_LENGTH;
  }
};
