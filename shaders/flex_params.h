// The border of the kernels whose scores are given as functions (flex_scores.h), beside params.h.
#pragma once

#include "params.h"

/// Tensors that the functions may read, and dimensions of each.
#define ORCHARD_MOST_CAPTURES 8
#define ORCHARD_CAPTURE_DIMS 4

/// Blocks of the map that a simdgroup writes. They are few, since it asks the functions for one
/// block after the other.
#define ORCHARD_MAP_RUN 8

/// Index of each [[buffer(n)]] that only these kernels have. block_states is bound in the place of
/// attn_mask.
enum FlexBuffer {
  kBufferCapture0 = 23,
  kBufferCapture1 = 24,
  kBufferCapture2 = 25,
  kBufferCapture3 = 26,
  kBufferCapture4 = 27,
  kBufferCapture5 = 28,
  kBufferCapture6 = 29,
  kBufferCapture7 = 30,
};

/// What block_states say of a block of queries and keys.
enum BlockState {
  kStateNothing = 0,     ///< no query sees a key
  kStateAsk = 1,         ///< mask_mod says what is seen
  kStateEverything = 2,  ///< every query sees every key, whatever mask_mod says
};

/// Where a captured tensor lies: sizes, and strides in elements. A dimension that it does not have
/// is of size 1.
struct CaptureShape {
  int32_t sizes[ORCHARD_CAPTURE_DIMS];
  int32_t strides[ORCHARD_CAPTURE_DIMS];
};

/// block_states, (batches, heads, blocks of queries, blocks of keys): strides in elements, 0 where
/// they are the same for all batches or heads.
struct BlockStateParams {
  int64_t batch;
  int64_t head;
  int64_t row;
  int32_t block_q;   ///< queries of a block, at most ORCHARD_MAX_LENGTH
  int32_t block_kv;  ///< keys, the same
  int32_t rows;      ///< blocks of queries
  int32_t cols;      ///< blocks of keys
  int32_t given;     ///< whether block_states is bound: else mask_mod is asked everywhere
  int32_t whole;     ///< whether each block is made of whole blocks of the map (masks.h)
};

struct FlexParams {
  AttentionParams attention;
  CaptureShape captures[ORCHARD_MOST_CAPTURES];
  BlockStateParams states;
};

static_assert(sizeof(CaptureShape) == 8 * 4, "host and shader must agree on CaptureShape");
static_assert(
    sizeof(BlockStateParams) == 3 * 8 + 6 * 4, "host and shader must agree on BlockStateParams");
static_assert(sizeof(FlexParams) ==
                  sizeof(AttentionParams) + 8 * sizeof(CaptureShape) + sizeof(BlockStateParams),
    "host and shader must agree on FlexParams");
