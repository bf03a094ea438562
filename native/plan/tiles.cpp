#include "tiles.h"

#include <algorithm>
#include <sstream>

#include "join.h"
#include "plan.h"

namespace orchard {
namespace {

// Chosen by benchmarks/apple_model (docs/performance-tables.md): below 32 KiB or so of threadgroup
// memory and 100 registers, so that a core holds 12 to 16 simdgroups. Blocks of more than 64
// products may cost more than the model knows; docs/performance-tables.md says where that was
// risked. No choice depends on the GPU's generation or the problem's size until one has been
// measured.
constexpr TileRow kTiles[] = {
    {32, 2, {2, 32, 2}, {32, 1}, {1, 32}, {2, 32}, {1, 32}},
    {64, 2, {1, 32, 2}, {16, 1}, {1, 16}, {2, 32}, {1, 32}},
    {96, 2, {1, 32, 1}, {16, 1}, {1, 16}, {2, 32}, {1, 32}},
    {128, 2, {1, 32, 1}, {16, 2}, {1, 16}, {2, 16}, {1, 32}},
    {256, 2, {1, 8, 2}, {8, 2}, {1, 8}, {1, 8}, {1, 16}},
    {32, 4, {2, 32, 1}, {32, 1}, {1, 32}, {2, 32}, {1, 32}},
    {64, 4, {1, 32, 1}, {16, 1}, {1, 16}, {2, 32}, {1, 32}},
    {80, 4, {1, 32, 1}, {8, 1}, {1, 16}, {2, 32}, {1, 16}},
    {96, 4, {1, 32, 1}, {16, 2}, {1, 16}, {2, 32}, {1, 16}},
    {128, 4, {1, 16, 1}, {8, 2}, {1, 8}, {2, 16}, {1, 16}},
    {256, 4, {1, 8, 1}, {8, 2}, {1, 8}, {1, 8}, {1, 8}},
};

constexpr int64_t kThreadgroupMemory = 32768;

// A small closed set of widths, so that each variant is proven; others are padded with zeros.
constexpr int kHeadDims[] = {16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256};

int size_of(const std::string& operand) { return operand == "half" ? 2 : 4; }

int query_rows(int r) { return 8 * r * kSimdgroups; }

/// Bytes of a block of staged rows.
int64_t staged_bytes(int rows, int head_dim, const std::string& operand) {
  return int64_t{rows} * (head_dim * size_of(operand) + 16);
}

/// Operand types that a dtype may be multiplied in, the usual one first.
std::vector<std::string> operands(const DTypeNames& dtype) {
  if (size_of(dtype.operand) == 2) return {dtype.operand, "float"};
  return {dtype.operand};
}

}  // namespace

DTypeNames names(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return {"float16", "half", "half", 2};
    case DType::kBFloat16:
      return {"bfloat16", "bfloat", "float", 2};
    default:
      return {"float32", "float", "float", 4};
  }
}

std::vector<int64_t> kernel_head_dims() { return {std::begin(kHeadDims), std::end(kHeadDims)}; }

int padded_head_dim(int64_t head_dim) {
  return *std::lower_bound(std::begin(kHeadDims), std::end(kHeadDims), head_dim);
}

int padded_value_dim(int64_t value_dim, int bd) {
  // As few as pay (docs/performance-tables.md), since each is a variant of its own: those of
  // multi-head latent attention.
  return bd == 192 && value_dim <= 128 ? 128 : bd;
}

const TileRow& tiles(int head_dim, const DTypeNames& dtype) {
  const int operand_size = size_of(dtype.operand);
  return *std::find_if(std::begin(kTiles), std::end(kTiles), [&](const TileRow& row) {
    return head_dim <= row.max_head_dim && operand_size == row.operand_size;
  });
}

TileChoice forward_choice(ForwardTile t, const std::string& operand) {
  const char* staged[] = {"read directly", "staged in turn", "staged together"};
  return {join("r", t.r, "_k", t.bk, "_b", t.buffers), join(t.r, ", ", t.bk, ", ", t.buffers),
      join("BQ ", query_rows(t.r), ", BK ", t.bk, ", K and V ", staged[t.buffers]), operand,
      query_rows(t.r)};
}

TileChoice dq_choice(DqTile t, const std::string& operand) {
  return {join("r", t.r, "_k", t.bk), join(t.r, ", ", t.bk),
      join("BQ ", query_rows(t.r), ", BK ", t.bk), operand, query_rows(t.r)};
}

int keys_of_group(DkvTile t) { return 8 * kSimdgroups / t.simdgroups; }

const char* dkv_family(DkvTile t) {
  return t.simdgroups == 2 ? "attention_backward_dkv_pairs" : "attention_backward_dkv";
}

TileChoice dkv_choice(DkvTile t, bool store_ds, const std::string& operand) {
  return {join("q", t.bq, store_ds ? "_ds" : ""), join(t.bq, ", ", store_ds ? "true" : "false"),
      join("BK ", keys_of_group(t), ", BQ ", t.bq, store_ds ? ", dS stored" : ""), operand,
      keys_of_group(t)};
}

TileChoice delta_choice() {
  TileChoice delta;
  delta.rows = query_rows(1);
  return delta;
}

std::vector<TileChoice> forward_choices(int bd, const DTypeNames& dtype, bool has_mask) {
  std::vector<TileChoice> choices;
  for (const std::string& operand : operands(dtype)) {
    for (int r : {1, 2}) {
      for (int bk : {8, 16, 32}) {
        for (int buffers : {0, 1, 2}) {
          if (buffers == 0 && has_mask) continue;
          if (buffers * staged_bytes(bk, bd, operand) > kThreadgroupMemory) continue;
          TileChoice choice = forward_choice({r, bk, buffers}, operand);
          if (operand != dtype.operand) choice.name += "_" + operand;
          choices.push_back(choice);
        }
      }
    }
  }
  return choices;
}

std::string asked_tile(const Problem& p, const std::string& family) {
  std::istringstream entries(p.tiles);
  for (std::string entry; std::getline(entries, entry, ',');) {
    if (entry.rfind(family + "=", 0) == 0) return entry.substr(family.size() + 1);
  }
  return "";
}

}  // namespace orchard
