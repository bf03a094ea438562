#include "instantiate.h"

#include "forward_parts.h"
#include "join.h"
#include "params.h"
#include "plan.h"

namespace orchard {

namespace {

/// As a Mask (shaders/masks.h) calls its elements.
const char* mask_element(const Problem& p) {
  return p.mask_dtype == DType::kBool ? "uchar" : names(p.mask_dtype).metal;
}

/// Whether a key of an even number and the next one lie side by side in the mask, aligned to both.
bool has_pairs(const MaskLayout& mask, int64_t kv_len) {
  bool even = kv_len % 2 == 0 && mask.sizes[4] > 1 && mask.strides[4] == 1 && mask.offset % 2 == 0;
  for (int d = 0; d < 4; d++) even &= mask.sizes[d] == 1 || mask.strides[d] % 2 == 0;
  return even;
}

const char* word(bool x) { return x ? "true" : "false"; }

/// `score` is the type of that name, `suffix` what a kernel's name says of it.
/// `value` is the padded head dim of values where the kernel has one of its own, else 0.
Variant variant_of(const Problem& p, bool chunks, bool dropout, const std::string& score,
    const std::string& suffix, int value) {
  // A kernel's name says which loads it uses either way, and the rest only where it is there.
  return {join("Variant<", word(chunks), ", ", word(dropout), ", ", score, ", ",
              word(p.has_key_ranges), value > 0 ? join(", ", value) : "", ">"),
      join(chunks ? "_chunks" : "_elements", dropout ? "_dropout" : "", suffix,
          p.has_key_ranges ? "_ranges" : "", value > 0 ? join("_v", value) : "")};
}

/// The padded head dim of values, or 0 where that is the kernel's.
int own_value_dim(const Problem& p) {
  const int bd = padded_head_dim(widest_head_dim(p));
  const int value = padded_value_dim(p.v.sizes[3], bd);
  return value < bd ? value : 0;
}

struct ScoreType {
  std::string type, suffix;
};

bool has_plain_scores(const Problem& p) { return !p.has_mask && !p.has_alibi && p.softcap == 0.0; }

/// Beside sinks the exponentials of plain scores are natural, as sinks are.
ScoreType score_of(const Problem& p) {
  if (has_plain_logits(p)) return {"PlainScore", ""};
  std::string mask = "NoMask", suffix;
  if (p.has_mask) {
    const bool pairs = has_pairs(p.mask, p.k.sizes[2]);
    mask = join("Mask<", mask_element(p), ", ", word(pairs), ">");
    suffix = join("_mask_", p.mask_dtype == DType::kBool ? "bool" : names(p.mask_dtype).torch,
        pairs ? "_pairs" : "");
  }
  return {join("Score<", word(p.softcap > 0.0), ", ", word(p.has_alibi), ", ", mask, ">"),
      join(p.softcap > 0.0 ? "_softcap" : "", p.has_alibi ? "_alibi" : "", suffix,
          has_plain_scores(p) ? "_natural" : "")};
}

KernelRole role_of(const std::string& family) {
  const auto has = [&](const char* part) { return family.find(part) != std::string::npos; };
  if (has("_mask_map")) return KernelRole::kMap;
  if (has("_delta")) return KernelRole::kRows;
  if (has("_dkv_sums")) return KernelRole::kKeySums;
  if (has("_dkv")) return KernelRole::kKeys;
  if (has("_dmask_sum")) return KernelRole::kMaskGradientSum;
  if (has("_dmask")) return KernelRole::kMaskGradient;
  if (has("_dsinks")) return KernelRole::kSinkGradient;
  return KernelRole::kQueries;
}

/// A kernel whose name and template arguments are given.
KernelPlan named_kernel(const std::string& family, const std::string& name,
    const std::string& arguments, const std::array<uint64_t, 2>& groups) {
  KernelPlan kernel;
  kernel.family = family;
  kernel.role = role_of(family);
  kernel.name = name;
  const std::string args = join(family, "<", arguments, ">");
  kernel.instantiation =
      join("template [[host_name(\"", name, "\")]] [[kernel]] decltype(", args, ") ", args, ";\n");
  kernel.groups = groups;
  kernel.threads = kSimdgroups * ORCHARD_SIMD_WIDTH;
  return kernel;
}

/// A kernel that knows of the problem only a dtype.
KernelPlan kernel_of_type(
    const std::string& family, const DTypeNames& dtype, const std::array<uint64_t, 2>& groups) {
  KernelPlan kernel = named_kernel(
      family, join(family, "_", dtype.torch), join(dtype.metal, ", ", kSimdgroups), groups);
  kernel.tile = join(groups[0], " x ", groups[1], " threadgroups of ", kernel.threads, " threads");
  return kernel;
}

}  // namespace

Variant full_variant(const Problem& p, bool chunks) {
  const ScoreType score = score_of(p);
  return variant_of(
      p, chunks, dropout_threshold(p.dropout_p) > 0, score.type, score.suffix, own_value_dim(p));
}

namespace {

Variant visibility(const Problem& p, bool chunks, int value) {
  return variant_of(p, chunks, false,
      p.has_mask ? "Score<false, false, Mask<uchar, false>>" : "PlainScore",
      p.has_mask ? "_mask" : "", value);
}

}  // namespace

Variant variant_of_visibility(const Problem& p, bool chunks) { return visibility(p, chunks, 0); }

Variant variant_of_sinks(const Problem& p, bool chunks) {
  Variant variant = visibility(p, chunks, own_value_dim(p));
  variant.type += p.has_sinks ? ", Sinks" : ", NoSinks";
  variant.suffix += p.has_sinks ? "_sinks" : "";
  return variant;
}

Variant variant_of_keys(const Problem& p, bool chunks, bool parts) {
  Variant variant = full_variant(p, chunks);
  variant.type += parts ? ", PartOfGroup" : "";
  variant.suffix += parts ? "_parts" : "";
  return variant;
}

Variant variant_of_forward(const Problem& p, bool chunks, bool parts) {
  Variant variant = full_variant(p, chunks);
  variant.type += parts ? ", Part" : "";
  variant.suffix += parts ? "_part" : "";
  return variant;
}

Variant variant_of_mask_gradient(const Problem& p, bool chunks, bool parts) {
  Variant variant = full_variant(p, chunks);
  variant.type += join(", ", parts ? "float" : mask_element(p));
  variant.suffix += parts ? "_parts" : "";
  return variant;
}

KernelPlan make_kernel(const Problem& p, const std::string& family, const TileChoice& tile,
    const Variant& variant, int64_t heads, int64_t length) {
  const DTypeNames dtype = names(p.dtype);
  const int bd = padded_head_dim(widest_head_dim(p));
  const int64_t blocks = blocks_of(length, tile.rows);
  KernelPlan kernel = named_kernel(family,
      join(family, "_", dtype.torch, "_d", bd, tile.name.empty() ? "" : "_", tile.name,
          variant.suffix),
      join(dtype.metal, ", ", tile.operand.empty() ? "" : tile.operand + ", ", bd, ", ", tile.args,
          tile.args.empty() ? "" : ", ", kSimdgroups, ", ", variant.type),
      {static_cast<uint64_t>(heads), static_cast<uint64_t>(blocks)});
  kernel.tile_name = tile.name;
  kernel.tile = join(tile.text, tile.text.empty() ? "" : ", ", "head_dim padded to ", bd, "; ",
      heads, " x ", blocks, " threadgroups of ", kSimdgroups * ORCHARD_SIMD_WIDTH, " threads");
  return kernel;
}

void add_forward_merge(const Problem& p, int64_t parts, Plan& plan) {
  const DTypeNames dtype = names(p.dtype);
  const bool natural = !has_plain_logits(p), dropout = dropout_threshold(p.dropout_p) > 0;
  const int64_t rows = query_heads(p) * p.q.sizes[2];
  const std::string family = "attention_forward_merge";
  KernelPlan kernel = named_kernel(family,
      join(family, "_", dtype.torch, natural ? "_natural" : "", dropout ? "_dropout" : ""),
      join(dtype.metal, ", ", kSimdgroups, ", ", word(natural), ", ", word(dropout)),
      {static_cast<uint64_t>(blocks_of(rows, kSimdgroups)), 1});
  plan.params.forward_parts = static_cast<int32_t>(parts);
  plan.forward_part_elements = parts * part_elements(p);
  kernel.tile =
      join("keys in ", parts, " parts, ", 4 * plan.forward_part_elements, " bytes for their sums; ",
          kernel.groups[0], " x 1 threadgroups of ", kernel.threads, " threads");
  plan.add(std::move(kernel));
}

void set_map_groups(int64_t heads, int64_t blocks, KernelPlan& kernel) {
  kernel.groups = {static_cast<uint64_t>(heads), static_cast<uint64_t>(blocks)};
  kernel.tile = join("blocks of ", ORCHARD_MAP_BLOCK, " queries and keys of the mask; ", heads,
      " x ", blocks, " threadgroups of ", kernel.threads, " threads");
}

void add_mask_map(const Problem& p, Plan& plan) {
  if (!p.has_mask) return;
  const std::array<int64_t, 5> sizes = mask_map_sizes(p);
  const int64_t heads = sizes[0] * sizes[1] * sizes[2];
  const int64_t blocks = sizes[3] * blocks_of(sizes[4], kSimdgroups);
  const bool listed = map_has_ranges(p);
  KernelPlan kernel = named_kernel("attention_mask_map",
      join("attention_mask_map_", p.mask_dtype == DType::kBool ? "bool" : names(p.mask_dtype).torch,
          listed ? "_ranges" : ""),
      join(mask_element(p), ", ", kSimdgroups, ", ", word(listed)), {});
  set_map_groups(heads, blocks, kernel);
  plan.map_elements = heads * sizes[3] * sizes[4];
  plan.add(std::move(kernel));
}

KernelPlan make_key_sums(const Problem& p) {
  const int64_t elements = p.k.sizes[2] * (p.k.sizes[3] + p.v.sizes[3]);  // of dk and dv of a head
  const int64_t blocks = blocks_of(elements, kSimdgroups * ORCHARD_SIMD_WIDTH);
  return kernel_of_type("attention_backward_dkv_sums", names(p.dtype),
      {static_cast<uint64_t>(kv_heads(p)), static_cast<uint64_t>(blocks)});
}

void add_mask_kernel(const Problem& p, const std::string& family,
    const std::array<uint64_t, 2>& groups, Plan& plan) {
  plan.add(kernel_of_type(family, names(p.mask_dtype), groups));
}

void add_mask_gradient_from_ds(
    const Problem& p, bool parts, const std::array<uint64_t, 2>& groups, Plan& plan) {
  const std::string family = "attention_backward_dmask_from_ds";
  KernelPlan kernel = named_kernel(family,
      join(family, "_", names(p.mask_dtype).torch, parts ? "_parts" : "",
          p.has_key_ranges ? "_ranges" : ""),
      join(parts ? "float" : mask_element(p), ", ", kSimdgroups, ", ", word(p.has_key_ranges)),
      groups);
  kernel.tile = join("blocks of ", ORCHARD_MAP_BLOCK, " queries and keys of the mask; ", groups[0],
      " x ", groups[1], " threadgroups of ", kernel.threads, " threads");
  plan.add(std::move(kernel));
}

void add_sink_gradient(const Problem& p, Plan& plan) {
  if (!p.has_sinks) return;
  const uint64_t heads = static_cast<uint64_t>(p.q.sizes[1]);
  KernelPlan kernel =
      named_kernel("attention_backward_dsinks", "attention_backward_dsinks", "1", {heads, 1});
  kernel.threads = ORCHARD_SIMD_WIDTH;
  kernel.tile = join("a simdgroup for each of ", heads, " query heads");
  plan.add(std::move(kernel));
}

}  // namespace orchard
