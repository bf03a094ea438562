// The MPS kernels of the ops for caches of keys and values, and their arguments, each written once:
// src/orchard_ops/cache.py has the same list in Python.
#pragma once

#include "plan/decode.h"
#include "scoring.h"
#include "shader_library.h"

namespace orchard {

/// Where the keys and values of the sequences lie, in the order of the schemas.
#define ORCHARD_CACHE(X)             \
  X(OptionalTensor, cache_seqlens)   \
  X(OptionalTensor, cache_batch_idx) \
  X(OptionalTensor, cache_leftpad)   \
  X(OptionalTensor, block_table)     \
  X(SymInt, added)

/// The arguments besides the operands and the cache that decide the weights.
#define ORCHARD_DECODE_SCORING(X) \
  X(OptionalTensor, alibi_slopes) \
  X(OptionalTensor, sinks)        \
  X(double, scale)                \
  X(int64_t, window_left)         \
  X(int64_t, window_right)        \
  X(double, softcap)

#define ORCHARD_FIELD(Type, name) Type name;

struct Cache {
  ORCHARD_CACHE(ORCHARD_FIELD)
};

/// The arguments of orchard::flash_attn_decode.
struct DecodeCall {
  Operands operands;
  Cache cache;
  ORCHARD_DECODE_SCORING(ORCHARD_FIELD)
  std::string impl;
};

/// The caches that a call fills, and what goes into them.
#define ORCHARD_FILLED(X) \
  X(Tensor, key_cache)    \
  X(Tensor, value_cache)
#define ORCHARD_ADDED(X) \
  X(Tensor, key)         \
  X(Tensor, value)
#define ORCHARD_PLACES(X)            \
  X(OptionalTensor, cache_seqlens)   \
  X(OptionalTensor, cache_batch_idx) \
  X(OptionalTensor, block_table)     \
  X(SymInt, offset)

/// The arguments of orchard::flash_attn_append.
struct AppendCall {
  ORCHARD_FILLED(ORCHARD_FIELD)
  ORCHARD_ADDED(ORCHARD_FIELD)
  ORCHARD_PLACES(ORCHARD_FIELD)
  std::string impl;
};

#undef ORCHARD_FIELD

std::string decode_arguments();
std::string append_arguments();

void flash_attn_append(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

void flash_attn_decode(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

/// Queries for the plans of the two: their arguments, and a plan's results.
void flash_attn_decode_plan(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

void flash_attn_append_plan(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

/// Runs the kernels of a plan, and counts it. `tensors` are the buffers of the first one besides
/// the operands and what it writes; `stats` are lse or row_stats. Throws MetalError.
void run_decode_plan(const DecodePlan& decode, const DecodeParams& params, const Operands& operands,
    Bindings tensors, const OptionalTensor& sinks, const Tensor& out, const Tensor& stats);

/// Calls of flash_attn_decode, and forwards on its kernels, that have run as Metal kernels.
int64_t metal_decodes();

}  // namespace orchard
