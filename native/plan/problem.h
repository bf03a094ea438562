// The types of the plan: what a call is, and which kernels it runs. Everything else in this folder
// stands on them; they know neither torch nor Metal.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "../../shaders/params.h"

namespace orchard {

enum class DType { kFloat16, kBFloat16, kFloat32, kOther };

/// Where a 4-D tensor (B, H, length, head_dim) lies: sizes, strides and offset in elements.
struct Layout {
  std::array<int64_t, 4> sizes{};
  std::array<int64_t, 4> strides{};
  int64_t offset = 0;
};

/// One call, reduced to what decides kernels.
struct Problem {
  DType dtype = DType::kOther;
  Layout q, k, v;
  bool has_mask = false;
  bool has_alibi = false;
  bool has_sinks = false;
  bool has_key_ranges = false;
  double dropout_p = 0.0;
  double scale = 1.0;
  int64_t window_left = -1;
  int64_t window_right = -1;
  int64_t diagonal = 0;
  double softcap = 0.0;
  int64_t scratch_bytes = 0;  ///< what a backward may take for dS; 0: compute dS twice instead
  std::string tiles;          ///< tiles to take instead of the table's: "family=tile,..."
};

/// One kernel variant and its grid.
struct KernelPlan {
  std::string family;         ///< the name of the kernel's template
  std::string name;           ///< host name of the variant, every degree of freedom readable
  std::string instantiation;  ///< the line of Metal that makes the variant
  std::string tile;           ///< tile and grid in words
  std::string tile_name;      ///< as in `name`; the forward's as Problem::tiles has it, too
  std::vector<std::string> alternatives;  ///< tiles that Problem::tiles may name here
  std::array<uint64_t, 2> groups{};       ///< threadgroups in x and y
  uint64_t threads = 0;                   ///< per threadgroup, along x
};

/// One dispatch of a kernel of the plan: its threadgroups, and what it sets in the params.
struct KernelLaunch {
  size_t kernel = 0;
  std::array<uint64_t, 2> groups{};
  int32_t first_kv_head = 0;
  int32_t key_begin = 0;
  int32_t key_end = 0;

  void set(AttentionParams& params) const;
};

struct Plan {
  std::string refusal;  ///< empty, or why Metal cannot run the call: the same text for any values
  std::string detail;   ///< the values of this call that the refusal is about; may be empty
  std::string advice;   ///< what the caller could do, at no change of the result; may be empty
  AttentionParams params{};
  std::vector<KernelPlan> kernels;
  std::vector<KernelLaunch> launches;  ///< in order
  int64_t ds_elements = 0;             ///< of the float buffer for dS; 0: none
};

int64_t query_heads(const Problem& problem);
int64_t kv_heads(const Problem& problem);
int64_t blocks_of(int64_t length, int64_t block);

}  // namespace orchard
