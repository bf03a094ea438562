// The types of the plan: what a call is, and which kernels it runs. Everything else in this folder
// stands on them; they know neither torch nor Metal.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "../../shaders/params.h"

namespace orchard {

enum class DType { kFloat16, kBFloat16, kFloat32, kBool, kOther };

/// Where a 4-D tensor (B, H, length, head_dim) lies: sizes, strides and offset in elements.
struct Layout {
  std::array<int64_t, 4> sizes{};
  std::array<int64_t, 4> strides{};
  int64_t offset = 0;
};

/// Where attn_mask lies: as Layout, (outer, inner, Hq, L, S), each size as in the problem or 1.
/// Batch entry b is entry (b / inner, b % inner), with the numbers that the problem has.
struct MaskLayout {
  std::array<int64_t, 5> sizes{};
  std::array<int64_t, 5> strides{};
  int64_t offset = 0;
  int64_t inner = 1;
};

/// Problem::gpu_cores of a call whose kernels are to stay whole: no GPU is too large for them.
constexpr int64_t kUndivided = 0;

/// One call, reduced to what decides kernels.
struct Problem {
  DType dtype = DType::kOther;
  Layout q, k, v;
  bool has_mask = false;
  bool mask_grad = false;
  DType mask_dtype = DType::kOther;
  MaskLayout mask;
  bool has_alibi = false;
  bool has_sinks = false;
  bool per_head_float32 = true;  ///< whether alibi_slopes and sinks, as far as given, are float32
  int64_t alibi_batch = 0;       ///< strides of alibi_slopes; 0: the same for all batches
  int64_t alibi_head = 1;
  bool has_key_ranges = false;
  int64_t ranges_batch = 0;  ///< strides of key_ranges; 0: the same for all batches, or heads
  int64_t ranges_head = 0;
  int64_t key_span = 0;  ///< keys within which any 8 queries in a row see theirs; 0: not known
  double dropout_p = 0.0;
  double scale = 1.0;
  int64_t window_left = -1;
  int64_t window_right = -1;
  int64_t diagonal = 0;
  double softcap = 0.0;
  int64_t scratch_bytes = 0;  ///< what a backward may take for dS and for parts; 0: it does without
  int64_t gpu_cores = 8;      ///< of the GPU; plans fill them
  bool stores_ds = false;     ///< wherever a buffer for it fits, for measurements
  std::string tiles;          ///< tiles to take instead of the table's: "family=tile,..."
};

/// What a kernel of a plan is for.
enum class KernelRole {
  kMap,
  kRows,
  kKeys,
  kKeySums,
  kQueries,
  kMaskGradient,
  kMaskGradientSum,
  kSinkGradient
};

/// One kernel variant and its grid.
struct KernelPlan {
  KernelRole role = KernelRole::kQueries;
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
  int32_t first_head = 0;
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
  int64_t dkv_part_elements = 0;       ///< of the float buffer for parts of dk and dv; 0: none
  int64_t dmask_part_elements = 0;     ///< of the float buffer for dmask's parts; 0: none
  int64_t forward_part_elements = 0;   ///< of the float buffer for a forward's parts; 0: none
  int64_t hull_elements = 0;           ///< of the int32 buffer for hulls of key_ranges; 0: none
  int64_t map_elements = 0;            ///< of the uint2 buffer for the mask's map; 0: none

  /// Adds a kernel and one launch of its whole grid, behind the others.
  void add(KernelPlan kernel);
};

/// Whether a logit is a scaled dot product and nothing else (Scoring.plain in Python).
bool has_plain_logits(const Problem& problem);

/// The wider of query's and value's head dim.
int64_t widest_head_dim(const Problem& problem);

int64_t query_heads(const Problem& problem);
int64_t kv_heads(const Problem& problem);
int64_t blocks_of(int64_t length, int64_t block);

}  // namespace orchard
