#include "decode.h"

#include <algorithm>
#include <string>

#include "join.h"
#include "params.h"
#include "plan.h"
#include "refusals.h"
#include "tiles.h"

namespace orchard {
namespace {

/// Wider heads leave no registers for a second fragment of rows.
constexpr int kWidestPair = 128;

/// Columns of a threadgroup of the merging kernel, of which each lane has a pair.
constexpr int kMergedColumns = 2 * ORCHARD_SIMD_WIDTH;

/// Threadgroups for the rows of a key/value head of a sequence that are enough for most: more of
/// them are more to merge, and more memory for their sums. Where there are many rows, the keys have
/// fewer parts.
constexpr int64_t kMostParts = 32;

/// A core holds more threadgroups where each has fewer bytes of a key and its value under way, and
/// where it has a second fragment of rows to multiply them with. There may be more of them then, if
/// each has kLongPart keys.
constexpr int64_t kManyBytes = 512;
constexpr int64_t kLongPart = 1024;

/// Each row of a threadgroup leaves its sums, which are read again to be merged: 1/64 of the bytes
/// of the threadgroup's keys and values, where it has so many keys a row, by an element's bytes.
constexpr int64_t kKeysOfRow = 128;

/// But a sequence has a threadgroup for each core first, and this many on a small GPU: few of them
/// at once do not keep its memory busy.
constexpr int64_t kLeastThreadgroups = 64;

const char* word(bool x) { return x ? "true" : "false"; }

/// From so many keys on, each simdgroup of a threadgroup has keys of its own. With fewer the decode
/// kernel has nothing that it divides better than the forward, and still a second kernel to run.
constexpr int64_t kManyKeys = ORCHARD_LEAST_PART * kSimdgroups;

/// More threadgroups than that would be more threads than 31 bits count.
constexpr int64_t kMostRows = INT32_MAX / (kSimdgroups * ORCHARD_SIMD_WIDTH);
static_assert(kMostRows == 16777215, "a reason below names it");

void refuse_cache(const CacheProblem& p, Plan& plan) {
  refuse(p.attention, plan);
  if (!plan.refusal.empty()) return;
  const int64_t rows = query_heads(p.attention) * p.attention.q.sizes[2];
  if (p.paged && p.page_size % ORCHARD_CACHE_BLOCK != 0) {
    plan.refusal = "the page size is not a multiple of 16";
    plan.detail = join("got ", p.page_size);
    plan.advice = "allocate pages of a multiple of 16 keys";
  } else if (rows > kMostRows) {
    plan.refusal = "batch times heads times queries is above 16777215";
    plan.detail = join("got ", rows);
    plan.advice = "split the batch into several calls: each part of the result stands alone";
  } else if (p.entries > INT32_MAX || p.added > ORCHARD_MAX_LENGTH) {
    plan.refusal = "the cache has too many entries, or the call adds too many keys";
    plan.detail = join("got ", p.entries, " entries and ", p.added, " keys");
    plan.advice = "split the batch into several calls: each part of the result stands alone";
  }
}

void fill_cache_params(const CacheProblem& p, CacheParams& cache) {
  cache.paged = p.paged;
  cache.entries = static_cast<int32_t>(p.entries);
  cache.page_size = static_cast<int32_t>(p.page_size);
  cache.capacity = static_cast<int32_t>(capacity_of(p));
  cache.added = static_cast<int32_t>(p.added);
}

/// The mask, as a template argument and as a kernel's name says it.
std::array<std::string, 2> mask_of(const Problem& p) {
  if (!p.has_mask) return {"NoMask", ""};
  if (p.mask_dtype == DType::kBool) return {"Mask<uchar, false>", "_mask_bool"};
  const DTypeNames dtype = names(p.mask_dtype);
  return {join("Mask<", dtype.metal, ", false>"), join("_mask_", dtype.torch)};
}

int row_fragments(const Problem& p, int64_t rows) {
  return rows > 8 && widest_head_dim(p) <= kWidestPair ? 2 : 1;
}

/// About as many parts as `parts`, so that `others` threadgroups for each of them are equally many
/// for all cores, or nearly. There is one for each core at least.
int64_t in_whole_rounds(int64_t parts, int64_t others, int64_t cores) {
  const int64_t rounds = (2 * parts * others + cores) / (2 * cores);
  return rounds * cores / others;
}

/// Threadgroups that share the keys of a sequence, where those of a key/value head have `rows`, in
/// `blocks` of `block_rows`, and up to `most` are of use to a head. Nothing here may depend on the
/// batch: a sequence has the same bits alone and beside others.
int64_t threadgroups_of_keys(
    const CacheProblem& p, int64_t rows, int64_t block_rows, int64_t blocks, int64_t most) {
  const int64_t capacity = capacity_of(p);
  const int64_t of_head =
      std::clamp(std::min(most, capacity / kLongPart), kMostParts, 2 * kMostParts);
  const int64_t of_row = kKeysOfRow / names(p.attention.dtype).size;
  const int64_t merged =
      blocks_of(capacity, std::max(kManyKeys, of_row * std::min(rows, block_rows)));
  const int64_t others = std::max<int64_t>(p.attention.k.sizes[1] * blocks, 1);
  const int64_t cores = std::max<int64_t>(p.attention.gpu_cores, 1);
  const int64_t one_a_core = blocks_of(cores, others);
  const int64_t filling = std::max(one_a_core, blocks_of(kLeastThreadgroups, others));
  const int64_t wanted = std::min(
      std::max(merged, filling), std::max(of_head / std::max<int64_t>(blocks, 1), one_a_core));
  // Where either of the two would no longer hold, some cores have one more than others.
  const int64_t even = in_whole_rounds(wanted, others, cores);
  const int64_t groups = even >= std::min(wanted, filling) && even <= merged ? even : wanted;
  return std::clamp<int64_t>(groups, 1, std::max<int64_t>(blocks_of(capacity, kManyKeys), 1));
}

int64_t group_heads(const Problem& p) { return p.q.sizes[1] / std::max<int64_t>(p.k.sizes[1], 1); }

/// Whether a mask is the same for all heads and queries of a sequence.
bool is_of_keys(const MaskLayout& mask) {
  return (mask.sizes[2] == 1 || mask.strides[2] == 0) &&
         (mask.sizes[3] == 1 || mask.strides[3] == 0);
}

KernelPlan kernel_of(const std::string& family, const std::string& name,
    const std::string& arguments, const std::array<uint64_t, 2>& groups) {
  KernelPlan kernel;
  kernel.family = family;
  kernel.name = name;
  const std::string args = join(family, "<", arguments, ">");
  kernel.instantiation =
      join("template [[host_name(\"", name, "\")]] [[kernel]] decltype(", args, ") ", args, ";\n");
  kernel.groups = groups;
  kernel.threads = kSimdgroups * ORCHARD_SIMD_WIDTH;
  kernel.tile = join(groups[0], " x ", groups[1], " threadgroups of ", kernel.threads, " threads");
  return kernel;
}

}  // namespace

int64_t capacity_of(const CacheProblem& p) { return p.paged ? p.pages * p.page_size : p.page_size; }

DecodePlan plan_append(const AppendProblem& p) {
  DecodePlan append;
  const DTypeNames dtype = names(p.dtype);
  const bool paged = p.params.paged != 0;
  const int64_t capacity = p.cache.sizes[2] * (paged ? p.pages : 1);
  const bool chunks = allows_chunks(p.added, dtype.size) && allows_chunks(p.cache, dtype.size);
  const int64_t element = chunks ? 16 / dtype.size : 1;
  const int64_t width = p.added.sizes[3] / element;
  const int64_t elements = p.added.sizes[0] * p.added.sizes[1] * p.added.sizes[2] * width;
  if (p.dtype == DType::kOther || p.dtype == DType::kBool) {
    append.plan.refusal = "the dtype is not float16, bfloat16 or float32";
    append.plan.advice = "keep the cache in one of these";
  } else if (std::max({elements, p.cache.sizes[0]}) >
                 INT32_MAX - kSimdgroups * ORCHARD_SIMD_WIDTH ||
             std::max({capacity, p.offset, p.added.sizes[2]}) > ORCHARD_MAX_LENGTH) {
    append.plan.refusal = "a length is above 2^28, or there are too many numbers for one call";
    append.plan.detail = join("got ", capacity, " and ", elements);
    append.plan.advice = "append the keys in several calls";
  }
  if (!append.plan.refusal.empty()) return append;
  const auto in_elements = [&](const Layout& x) {
    const auto& s = x.strides;
    return TensorStrides{s[0] / element, s[1] / element, s[2] / element, s[3]};  // 1 of chunks
  };
  AttentionParams& params = append.params.attention;
  params.k = in_elements(p.added);
  params.out = in_elements(p.cache);
  params.batch = static_cast<int32_t>(p.added.sizes[0]);
  params.num_kv_heads = static_cast<int32_t>(p.added.sizes[1]);
  params.q_len = static_cast<int32_t>(p.added.sizes[2]);
  params.head_dim = static_cast<int32_t>(width);
  append.params.cache = p.params;
  append.params.cache.entries = static_cast<int32_t>(p.cache.sizes[0]);
  append.params.cache.page_size = static_cast<int32_t>(p.cache.sizes[2]);
  append.params.cache.capacity = static_cast<int32_t>(capacity);
  append.params.cache.added = static_cast<int32_t>(p.offset);
  const char* type = chunks ? "uint4" : dtype.size == 2 ? "ushort" : "uint";
  append.plan.add(
      kernel_of("attention_append", join("attention_append_", type), join(type, ", ", kSimdgroups),
          {static_cast<uint64_t>(blocks_of(elements, kSimdgroups * ORCHARD_SIMD_WIDTH)), 1}));
  return append;
}

DecodePlan plan_decode(const CacheProblem& p, const Layout& out) {
  DecodePlan decode;
  refuse_cache(p, decode.plan);
  if (!decode.plan.refusal.empty()) return decode;
  const Problem& attention = p.attention;
  const DTypeNames dtype = names(attention.dtype);
  const int bd = padded_head_dim(attention.q.sizes[3]);
  const int vd = padded_head_dim(attention.v.sizes[3]);
  const int64_t rows = group_heads(attention) * attention.q.sizes[2];
  const int fragments = row_fragments(attention, rows);
  const bool chunks =
      allows_chunks(attention.k, dtype.size) && allows_chunks(attention.v, dtype.size);
  const int64_t blocks = blocks_of(rows, 8 * fragments);
  const int64_t most =
      fragments == 2 ? kMostParts * 3 / 2 : kMostParts * kManyBytes / ((bd + vd) * dtype.size);
  const int64_t groups = threadgroups_of_keys(p, rows, 8 * fragments, blocks, most);
  DecodeParams& params = decode.params;
  fill_params(attention, params.attention);
  params.attention.out = to_strides(out.strides);
  params.cache = p.cache;
  fill_cache_params(p, params.cache);
  params.block_rows = 8 * fragments;
  params.blocks = static_cast<int32_t>(blocks);
  params.parts = static_cast<int32_t>(groups);
  params.part_stride = vd;
  const int64_t row_blocks = attention.q.sizes[0] * attention.k.sizes[1] * params.blocks;
  decode.part_rows = row_blocks * params.parts * params.block_rows;
  advise_on_layout(chunks, decode.plan);
  const bool softcap = attention.softcap > 0.0, alibi = attention.has_alibi;
  const bool ranges = attention.has_key_ranges;
  const auto [mask, mask_name] = mask_of(attention);
  decode.plan.add(kernel_of("attention_decode",
      join("attention_decode_", dtype.torch, "_d", bd, "_v", vd, "_r", fragments,
          chunks ? "_chunks" : "_elements", p.paged ? "_paged" : "", softcap ? "_softcap" : "",
          alibi ? "_alibi" : "", mask_name, ranges ? "_ranges" : ""),
      join(dtype.metal, ", ", dtype.operand, ", ", bd, ", ", vd, ", ", fragments, ", ", kSimdgroups,
          ", ", word(chunks), ", ", word(p.paged), ", ", word(softcap), ", ", word(alibi), ", ",
          mask, ", ", word(ranges)),
      {static_cast<uint64_t>(row_blocks), static_cast<uint64_t>(groups)}));
  const int64_t out_rows = query_heads(attention) * attention.q.sizes[2];
  const uint64_t merged = static_cast<uint64_t>(blocks_of(vd, kMergedColumns));
  decode.plan.add(kernel_of("attention_decode_merge", join("attention_decode_merge_", dtype.torch),
      join(dtype.metal, ", ", kSimdgroups), {static_cast<uint64_t>(out_rows), merged}));
  return decode;
}

bool prefers_decode(const Problem& p) {
  const int64_t q_len = p.q.sizes[2];
  if (query_heads(p) == 0 || q_len == 0) return false;
  if (p.k.sizes[2] < kManyKeys || dropout_threshold(p.dropout_p) > 0) return false;
  if (p.has_mask && !is_of_keys(p.mask)) return false;
  // What the ranges of several rows leave between them would be read as if it were seen.
  if (p.has_key_ranges && (q_len > 1 || p.ranges_head != 0)) return false;
  if (p.tiles.find("attention_forward=") != std::string::npos) return false;
  // The forward reads the keys once for each head, this kernel once for each block of rows. So it
  // takes up to 16 queries (MOST_QUERIES of src/orchard_ops/cache.py), or 8 of wide heads.
  const int64_t rows = group_heads(p) * q_len;
  return blocks_of(rows, 8 * row_fragments(p, rows)) <= group_heads(p);
}

DecodePlan plan_forward_as_decode(const Problem& p, const Layout& out) {
  CacheProblem cache;
  cache.attention = p;
  cache.page_size = cache.added = p.k.sizes[2];
  cache.entries = p.k.sizes[0];
  // Queries stand where the ranges say, or as far from the last keys as the diagonal does.
  if (!p.has_key_ranges) cache.attention.diagonal += p.q.sizes[2] - p.k.sizes[2];
  DecodePlan decode = plan_decode(cache, out);
  decode.params.row_stats = true;
  decode.params.powers_of_2 = has_plain_logits(p);
  return decode;
}

}  // namespace orchard
