// The tiles of every kernel: the table by head dim and operand type, and what else would fit.
#pragma once

#include "problem.h"

namespace orchard {

constexpr int kSimdgroups = 4;  // of a threadgroup, in every kernel
constexpr int kMaxHeadDim = 256;

struct DTypeNames {
  const char* torch;
  const char* metal;
  /// Operand type of the matrix unit. bfloat16 operands would round the weights to 8 bits.
  const char* operand;
  int size;
};

DTypeNames names(DType dtype);

/// The narrowest kernel's width that holds head_dim.
int padded_head_dim(int64_t head_dim);

/// Rows staged at once (BK keys, BQ queries), row blocks of 8 per simdgroup (R), buffers for K and
/// V (shaders/forward.h), simdgroups that share 8 keys (2: shaders/backward_dkv_pairs.h).
struct ForwardTile {
  int r, bk, buffers;
};
struct DqTile {
  int r, bk;
};
struct DkvTile {
  int bq, simdgroups;
};

/// Tiles by padded head dim and size of an operand of the matrix unit in bytes.
struct TileRow {
  int max_head_dim;
  int operand_size;
  ForwardTile forward;
  DkvTile dkv;
  DqTile dq, dq_from_ds, dmask;
};

/// The padded head dim of values beside queries of the padded head dim bd: bd, or one of its own
/// that kernels are made in.
int padded_value_dim(int64_t value_dim, int bd);

const TileRow& tiles(int head_dim, const DTypeNames& dtype);

/// One degree of freedom of a kernel: its tile and operand type.
struct TileChoice {
  std::string name;  // as in the kernel's name: r1_k32_b2
  std::string args;  // as in the template's arguments, before the number of simdgroups: 1, 32, 2
  std::string text;
  std::string operand;
  int rows = 0;  // of queries, or keys, that a threadgroup takes
};

TileChoice forward_choice(ForwardTile tile, const std::string& operand);
TileChoice dq_choice(DqTile tile, const std::string& operand);
TileChoice dkv_choice(DkvTile tile, bool store_ds, const std::string& operand);
TileChoice delta_choice();

int keys_of_group(DkvTile tile);
const char* dkv_family(DkvTile tile);

/// Every tile of the forward that fits, for sweeps on a device. A mask needs K and V staged.
std::vector<TileChoice> forward_choices(int head_dim, const DTypeNames& dtype, bool has_mask);

/// What Problem::tiles asks for this family; empty if nothing.
std::string asked_tile(const Problem& problem, const std::string& family);

}  // namespace orchard
