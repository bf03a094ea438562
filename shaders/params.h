// The border: what the host passes to the kernels. Compiled by the C++ and by the Metal compiler.
#pragma once

#ifdef __METAL_VERSION__
#include <metal_stdlib>
using namespace metal;
#else
#include <cstdint>
#endif

/// Index of each [[buffer(n)]], the same in all kernels.
enum AttentionBuffer {
  kBufferQuery = 0,
  kBufferKey = 1,
  kBufferValue = 2,
  kBufferOut = 3,
  kBufferRowStats = 4,
  kBufferDout = 5,
  kBufferDlse = 6,
  kBufferDelta = 7,
  kBufferDq = 8,
  kBufferDk = 9,
  kBufferDv = 10,
  kBufferDs = 11,
  kBufferParams = 12,
  kBufferMask = 13,
  kBufferAlibiSlopes = 14,
  kBufferSinks = 15,
  kBufferDmask = 16,
  kBufferSinkParts = 17,
  kBufferDsinks = 18,
  kBufferMaskMap = 19,
  kBufferDmaskParts = 20,
  kBufferKeyRanges = 21,
  kBufferRangeHulls = 22,
  kBufferDkvParts = 23,
  kBufferForwardParts = 11,  ///< where a backward has dS; functions as scores take all from 23 on
};

/// Threads of a simdgroup.
#define ORCHARD_SIMD_WIDTH 32

/// Threads of a threadgroup. The parentheses keep clang-format from taking a product for a pointer.
#define ORCHARD_THREADS(SIMDGROUPS) ((SIMDGROUPS) * (ORCHARD_SIMD_WIDTH))

/// Strides of a (B, H, length, head_dim) tensor, in elements.
struct TensorStrides {
  int64_t batch;
  int64_t head;
  int64_t row;
  int64_t col;
};

/// Where attn_mask lies: batch entry b is entry (b / inner_size, b % inner_size) of the mask, and a
/// stride of 0 is a dimension that it broadcasts.
struct MaskStrides {
  int64_t outer;
  int64_t inner;
  int64_t head;
  int64_t row;
  int64_t col;
  int64_t inner_size;
};

/// key_ranges: strides in elements, 0 where they are the same for all batches or heads, and the
/// window, which counts from the rows' positions. Where they are given, the other window is open.
struct RangeParams {
  int64_t batch;
  int64_t head;
  int32_t left;
  int32_t right;
};

/// One attention problem. Row i sees key j iff i + diagonal - window_left <= j and
/// j <= i + diagonal + window_right; open windows come as ORCHARD_WINDOW_OPEN.
struct AttentionParams {
  TensorStrides q;
  TensorStrides k;
  TensorStrides v;
  TensorStrides out;
  TensorStrides dout;
  TensorStrides dq;
  TensorStrides dk;
  TensorStrides dv;
  MaskStrides mask;      ///< of attn_mask (where the score adds it)
  MaskStrides dmask;     ///< of its gradient, which has the mask's shape (backward)
  MaskStrides mask_map;  ///< of its map, (outer, inner, head, blocks of rows, blocks of keys)
  int64_t alibi_batch;   ///< strides of alibi_slopes, 0 where they are the same for all batches
  int64_t alibi_head;
  int64_t dmask_elements;
  RangeParams ranges;
  int64_t dq_sums;    ///< elements of buffer ds before PartialDq (backward)
  int64_t ds_folded;  ///< the tile that key 0 would have, were its row folded (dscore.h); 0: no row
                      ///< that queries see is
  int32_t batch;
  int32_t num_heads;     ///< query heads
  int32_t num_kv_heads;  ///< divides num_heads; query head h reads key head h / (num_heads /
                         ///< num_kv_heads)
  int32_t q_len;
  int32_t kv_len;
  int32_t head_dim;    ///< D <= BD; the kernels pad with zeros
  int32_t v_head_dim;  ///< of v, out and their gradients, the same way
  int32_t diagonal;
  int32_t window_left;
  int32_t window_right;
  float scale;                 ///< softmax scale
  float scale_log2;            ///< scale * log2(e): exponentials are powers of two
  float softcap;               ///< c of c * tanh(s / c), where scores are capped
  uint32_t dropout_seed[2];    ///< Philox key: low, high
  uint32_t dropout_threshold;  ///< of 65536: a weight whose 16-bit draw lies below is dropped
  float dropout_rescale;       ///< 65536 / (65536 - dropout_threshold)
  int32_t has_sinks;           ///< whether buffer sinks is bound
  int32_t has_dlse;            ///< whether buffer dlse is bound (backward)
  int32_t dmask_parts;         ///< threadgroups that share a tile of dmask (backward)
  int32_t has_key_sums;        ///< whether the key's side sums up dS of each key (backward)
  int32_t forward_parts;       ///< threadgroups that share the keys of a block of queries (forward)
  int32_t first_head;          ///< of batch * num_heads, where this dispatch begins (backward)
  int32_t key_begin;           ///< keys of this dispatch (backward, where dS is stored): a multiple
  int32_t key_end;             ///< of ORCHARD_KEY_CHUNK, unless the end of the keys
  int32_t dkv_parts;           ///< parts of a group's query heads on the key's side (backward)
  int32_t dkv_sums;    ///< how many parts of a group run at once, each with sums of its own. Those
                       ///< of later turns add to the same sums
  int32_t ds_keys;     ///< 8 times the rows that the buffer for dS has for a head (dscore.h)
  int32_t ds_row;      ///< tiles of such a row
  int32_t ds_partial;  ///< whether some queries may see keys that are farther apart, as far
                       ///< as key_ranges tell: their dS is not stored
};

/// Lengths and diagonals stay below ORCHARD_MAX_LENGTH so that int32 holds i + diagonal +
/// ORCHARD_WINDOW_OPEN.
#define ORCHARD_MAX_LENGTH (1 << 28)
#define ORCHARD_WINDOW_OPEN (1 << 30)

/// Positions beyond it are as good as this one: int32 holds it with an open window.
#define ORCHARD_FAR_POSITION (1 << 29)

/// Integers of a RangeHull (ranges.h).
#define ORCHARD_RANGE_HULL 6

/// Queries that either all take their dS from memory or all compute it again (key_ranges).
#define ORCHARD_DS_ROWS 64

/// Keys are divided between dispatches at multiples of this, whole blocks of every kernel.
#define ORCHARD_KEY_CHUNK 64

/// Queries, and keys, of a block of the map of what a mask lets through.
#define ORCHARD_MAP_BLOCK 32

static_assert(sizeof(TensorStrides) == 32, "host and shader must agree on TensorStrides");
static_assert(sizeof(MaskStrides) == 48, "host and shader must agree on MaskStrides");
static_assert(sizeof(AttentionParams) == 8 * 32 + 24 + 3 * 48 + 5 * 8 + 30 * 4,
    "host and shader must agree on AttentionParams");
