#include "plan.h"

#include <algorithm>
#include <cmath>
#include <sstream>

namespace orchard {
namespace {

constexpr int kSimdgroups = 4;  // of a threadgroup, in every kernel

template <typename... Parts>
std::string join(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

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
  DqTile dq, dq_from_ds;
};

// Chosen by benchmarks/apple_model (docs/performance.md): below 32 KiB or so of threadgroup memory
// and 100 registers, so that a core holds 12 to 16 simdgroups. Blocks of more than 64 products may
// cost more than the model knows; docs/performance.md says where that was risked. No choice depends
// on the GPU's generation or the problem's size until one has been measured.
constexpr TileRow kTiles[] = {
    {32, 2, {2, 32, 2}, {32, 1}, {1, 32}, {2, 32}},
    {64, 2, {1, 32, 2}, {16, 1}, {1, 16}, {2, 32}},
    {96, 2, {1, 32, 1}, {16, 1}, {1, 16}, {2, 32}},
    {128, 2, {1, 32, 1}, {16, 2}, {1, 16}, {2, 16}},
    {256, 2, {1, 8, 2}, {8, 2}, {1, 8}, {1, 8}},
    {32, 4, {2, 32, 1}, {32, 1}, {1, 32}, {2, 32}},
    {64, 4, {1, 32, 1}, {16, 1}, {1, 16}, {2, 32}},
    {80, 4, {1, 32, 1}, {8, 1}, {1, 16}, {2, 32}},
    {96, 4, {1, 32, 1}, {16, 2}, {1, 16}, {2, 32}},
    {128, 4, {1, 16, 1}, {8, 2}, {1, 8}, {2, 16}},
    {256, 4, {1, 8, 1}, {8, 2}, {1, 8}, {1, 8}},
};

// From this padded head dim on, storing dS costs less than the two products that it saves.
constexpr int kDsHeadDim = 64;
constexpr int64_t kThreadgroupMemory = 32768;

// A small closed set of widths, so that each variant is proven; others are padded with zeros.
constexpr int kHeadDims[] = {16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256};
constexpr int kMaxHeadDim = 256;

struct DTypeNames {
  const char* torch;
  const char* metal;
  /// Operand type of the matrix unit. bfloat16 operands would round the weights to 8 bits.
  const char* operand;
  int size;
};

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

int padded_head_dim(int64_t head_dim) {
  return *std::lower_bound(std::begin(kHeadDims), std::end(kHeadDims), head_dim);
}

int size_of(const std::string& operand) { return operand == "half" ? 2 : 4; }

const TileRow& tiles(int head_dim, int operand_size) {
  return *std::find_if(std::begin(kTiles), std::end(kTiles), [&](const TileRow& row) {
    return head_dim <= row.max_head_dim && operand_size == row.operand_size;
  });
}

/// Rows start at multiples of 16 bytes, columns are adjacent and fill whole 16-byte chunks.
bool allows_chunks(const Layout& x, int element_size) {
  const int64_t chunk = 16 / element_size;
  if (x.sizes[3] % chunk != 0 || x.strides[3] != 1 || x.offset % chunk != 0) return false;
  for (int d = 0; d < 3; d++) {
    if (x.sizes[d] > 1 && x.strides[d] % chunk != 0) return false;
  }
  return true;
}

/// Every refusal of the Metal kernels, with advice: the table that explain() and the docs show.
void refuse(const Problem& p, Plan& plan) {
  auto because = [&](const auto&... parts) { plan.refusal = join(parts...); };
  const int64_t head_dim = p.q.sizes[3];
  const int64_t longest = std::max(p.q.sizes[2], p.k.sizes[2]);
  if (p.dtype == DType::kOther) {
    because("the dtype is not float16, bfloat16 or float32");
    plan.advice = "cast query, key and value";
  } else if (head_dim > kMaxHeadDim) {
    because("head_dim must be at most ", kMaxHeadDim, "; got ", head_dim);
    plan.advice = "split the heads";
  } else if (p.v.sizes[3] != head_dim) {
    because("value's head_dim must equal query's ", head_dim, "; got ", p.v.sizes[3]);
    plan.advice = "pad the narrower of the two with zeros";
  } else if (p.has_mask) {
    because("attn_mask is given");
    plan.advice = "use is_causal or a window where they say the same";
  } else if (p.has_alibi) {
    because("alibi_slopes are given");
  } else if (p.has_sinks) {
    because("sinks are given");
  } else if (p.softcap > 0.0) {
    because("softcap is ", p.softcap);
  } else if (longest > ORCHARD_MAX_LENGTH || std::abs(p.diagonal) > ORCHARD_MAX_LENGTH) {
    because("lengths and diagonals must be at most ", ORCHARD_MAX_LENGTH, "; got ",
        std::max(longest, std::abs(p.diagonal)));
  } else if (p.q.sizes[0] * p.q.sizes[1] > INT32_MAX / (kSimdgroups * ORCHARD_SIMD_WIDTH)) {
    because("batch times heads must be at most ", INT32_MAX / (kSimdgroups * ORCHARD_SIMD_WIDTH),
        "; got ", p.q.sizes[0] * p.q.sizes[1]);
  }
}

TensorStrides to_strides(const std::array<int64_t, 4>& s) { return {s[0], s[1], s[2], s[3]}; }

int32_t clamp_window(int64_t window) {
  return static_cast<int32_t>(
      window < 0 ? ORCHARD_WINDOW_OPEN : std::min<int64_t>(window, ORCHARD_WINDOW_OPEN));
}

void fill_params(const Problem& p, AttentionParams& params) {
  params.q = to_strides(p.q.strides);
  params.k = to_strides(p.k.strides);
  params.v = to_strides(p.v.strides);
  params.num_heads = static_cast<int32_t>(p.q.sizes[1]);
  params.num_kv_heads = static_cast<int32_t>(p.k.sizes[1]);
  params.q_len = static_cast<int32_t>(p.q.sizes[2]);
  params.kv_len = static_cast<int32_t>(p.k.sizes[2]);
  params.head_dim = static_cast<int32_t>(p.q.sizes[3]);
  params.diagonal = static_cast<int32_t>(p.diagonal);
  params.window_left = clamp_window(p.window_left);
  params.window_right = clamp_window(p.window_right);
  params.scale = static_cast<float>(p.scale);
  params.scale_log2 = static_cast<float>(p.scale * 1.4426950408889634);
  params.dropout_threshold = dropout_threshold(p.dropout_p);
  params.dropout_rescale = 65536.0f / static_cast<float>(65536 - params.dropout_threshold);
}

/// One degree of freedom of a kernel: its tile and operand type.
struct TileChoice {
  std::string name;  // as in the kernel's name: r1_k32_b2
  std::string args;  // as in the template's arguments, before the number of simdgroups: 1, 32, 2
  std::string text;
  std::string operand;
  int rows = 0;  // of queries, or keys, that a threadgroup takes
};

int query_rows(int r) { return 8 * r * kSimdgroups; }

/// Bytes of a block of staged rows.
int64_t staged_bytes(int rows, int head_dim, const std::string& operand) {
  return int64_t{rows} * (head_dim * size_of(operand) + 16);
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

/// Operand types that a dtype may be multiplied in, the usual one first.
std::vector<std::string> operands(const DTypeNames& dtype) {
  if (size_of(dtype.operand) == 2) return {dtype.operand, "float"};
  return {dtype.operand};
}

/// Every tile of the forward that fits, for sweeps on a device.
std::vector<TileChoice> forward_choices(int bd, const DTypeNames& dtype) {
  std::vector<TileChoice> choices;
  for (const std::string& operand : operands(dtype)) {
    for (int r : {1, 2}) {
      for (int bk : {8, 16, 32}) {
        for (int buffers : {0, 1, 2}) {
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

std::vector<std::string> names_of(const std::vector<TileChoice>& choices) {
  std::vector<std::string> names;
  for (const TileChoice& choice : choices) names.push_back(choice.name);
  return names;
}

/// What Problem::tiles asks for this family; empty if nothing.
std::string asked_tile(const Problem& p, const std::string& family) {
  std::istringstream entries(p.tiles);
  for (std::string entry; std::getline(entries, entry, ',');) {
    if (entry.rfind(family + "=", 0) == 0) return entry.substr(family.size() + 1);
  }
  return "";
}

int64_t blocks_of(int64_t length, int64_t block) { return (length + block - 1) / block; }

/// `length`: of the queries, or keys, that the threadgroups of a head share.
KernelPlan make_kernel(const Problem& p, const std::string& family, const TileChoice& tile,
    const std::vector<const char*>& flags, int64_t heads, int64_t length) {
  const DTypeNames dtype = names(p.dtype);
  const int bd = padded_head_dim(p.q.sizes[3]);
  const int64_t blocks = blocks_of(length, tile.rows);
  KernelPlan kernel;
  kernel.family = family;
  kernel.tile_name = tile.name;
  kernel.name = join(family, "_", dtype.torch, "_d", bd, tile.name.empty() ? "" : "_", tile.name);
  const char* chunks = "false";
  const char* dropout = "false";
  for (const std::string flag : flags) {
    // A kernel's name says which loads it uses either way, and dropout only if it is on.
    if (flag == "!chunks") kernel.name += "_elements";
    if (flag[0] != '!') kernel.name += "_" + flag;
    if (flag == "chunks") chunks = "true";
    if (flag == "dropout") dropout = "true";
  }
  const std::string args = join(family, "<", dtype.metal, ", ",
      tile.operand.empty() ? "" : tile.operand + ", ", bd, ", ", tile.args,
      tile.args.empty() ? "" : ", ", kSimdgroups, ", Variant<", chunks, ", ", dropout, ">>");
  kernel.instantiation = join("template [[host_name(\"", kernel.name, "\")]] [[kernel]] decltype(",
      args, ") ", args, ";\n");
  kernel.tile = join(tile.text, tile.text.empty() ? "" : ", ", "head_dim padded to ", bd, "; ",
      heads, " x ", blocks, " threadgroups of ", kSimdgroups * ORCHARD_SIMD_WIDTH, " threads");
  kernel.groups = {static_cast<uint64_t>(heads), static_cast<uint64_t>(blocks)};
  kernel.threads = kSimdgroups * ORCHARD_SIMD_WIDTH;
  return kernel;
}

int64_t query_heads(const Problem& p) { return p.q.sizes[0] * p.q.sizes[1]; }

int64_t kv_heads(const Problem& p) { return p.k.sizes[0] * p.k.sizes[1]; }

/// How a backward that stores dS is divided: so many of the batch * num_kv_heads key/value heads,
/// with their query heads, and so many keys share the buffer at once.
struct DsDivision {
  int64_t kv_heads;
  int64_t keys;
  int64_t tile_elements;  // of the buffer, before the sums of dq; 0: dS is not stored
  int64_t sum_elements;   // behind them
};

// Keys are divided only into parts of so many threadgroups: fewer would leave a large GPU idle (an
// M1 Max holds some 128 of them at once).
constexpr int64_t kGroupsToFill = 96;

DsDivision divide_ds(const Problem& p, int bd, int keys_of_group) {
  const int64_t q_len = p.q.sizes[2], kv_len = p.k.sizes[2];
  const DsDivision undivided{kv_heads(p), kv_len, 0, 0};
  const int64_t query_heads_of_one = kv_heads(p) > 0 ? query_heads(p) / kv_heads(p) : 0;
  const int64_t rows = query_heads_of_one * 8 * blocks_of(q_len, 8);
  const int64_t budget = p.scratch_bytes / int64_t{sizeof(float)};
  if (bd < kDsHeadDim || rows == 0 || kv_len == 0) return undivided;
  const int64_t of_one = rows * 8 * blocks_of(kv_len, 8);
  if (of_one <= budget) {
    const int64_t fitting = std::min(budget / of_one, kv_heads(p));
    return {fitting, kv_len, fitting * of_one, 0};
  }
  const int64_t sums = query_heads_of_one * q_len * bd;
  const int64_t fitting = std::max<int64_t>(budget - sums, 0) / rows;
  const int64_t keys = fitting / ORCHARD_KEY_CHUNK * ORCHARD_KEY_CHUNK;
  if (keys < kGroupsToFill * keys_of_group) return undivided;
  return {1, keys, rows * keys, sums};
}

/// What Variant (shaders/loader.h) says: VEC and DROPOUT.
std::vector<const char*> switches(const Problem& p, bool chunks) {
  return {
      chunks ? "chunks" : "!chunks", dropout_threshold(p.dropout_p) > 0 ? "dropout" : "!dropout"};
}

void advise_on_layout(bool chunks, Plan& plan) {
  if (!chunks) {
    plan.advice =
        "rows that start at multiples of 16 bytes with adjacent columns (and a head_dim of whole "
        "16-byte chunks) load faster than the element-wise loads this call needs";
  }
}

void append_json(std::ostringstream& out, const std::string& text) {
  out << '"';
  for (char c : text) {
    if (c == '"' || c == '\\') out << '\\';
    if (c == '\n') {
      out << "\\n";
    } else {
      out << c;
    }
  }
  out << '"';
}

}  // namespace

uint32_t dropout_threshold(double dropout_p) {
  // nearbyint rounds halves to even, as Python's round does.
  return static_cast<uint32_t>(std::min(std::nearbyint(dropout_p * 65536.0), 65535.0));
}

std::array<int64_t, 4> strides_in_order_of(
    const std::array<int64_t, 4>& like, const std::array<int64_t, 4>& sizes) {
  std::array<int, 3> order{0, 1, 2};
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return like[a] > like[b]; });
  std::array<int64_t, 4> strides{0, 0, 0, 1};
  int64_t next = std::max<int64_t>(sizes[3], 1);
  for (int i = 2; i >= 0; i--) {
    strides[order[i]] = next;
    next *= std::max<int64_t>(sizes[order[i]], 1);
  }
  return strides;
}

void KernelLaunch::set(AttentionParams& params) const {
  params.first_kv_head = first_kv_head;
  params.key_begin = key_begin;
  params.key_end = key_end;
}

Plan plan_forward(const Problem& p, const Layout& out) {
  Plan plan;
  refuse(p, plan);
  if (!plan.refusal.empty()) return plan;
  const DTypeNames dtype = names(p.dtype);
  const int bd = padded_head_dim(p.q.sizes[3]);
  TileChoice choice = forward_choice(tiles(bd, size_of(dtype.operand)).forward, dtype.operand);
  const std::vector<TileChoice> choices = forward_choices(bd, dtype);
  const std::string asked = asked_tile(p, "attention_forward");
  if (!asked.empty()) {
    const auto found = std::find_if(choices.begin(), choices.end(),
        [&](const TileChoice& candidate) { return candidate.name == asked; });
    if (found == choices.end()) {
      plan.refusal = join("attention_forward has no tile ", asked, " for this call");
      plan.advice = "see the alternatives of flash_attn_plan";
      return plan;
    }
    choice = *found;
  }
  bool chunks = true;
  for (const Layout* x : {&p.q, &p.k, &p.v, &out}) chunks &= allows_chunks(*x, dtype.size);
  fill_params(p, plan.params);
  plan.params.out = to_strides(out.strides);
  advise_on_layout(chunks, plan);
  plan.kernels.push_back(make_kernel(
      p, "attention_forward", choice, switches(p, chunks), query_heads(p), p.q.sizes[2]));
  plan.kernels[0].alternatives = names_of(choices);
  plan.launches = {{0, plan.kernels[0].groups, 0, 0, plan.params.kv_len}};
  return plan;
}

Plan plan_backward(const Problem& p, const Layout& out, const Layout& dout) {
  Plan plan;
  refuse(p, plan);
  if (!plan.refusal.empty()) return plan;
  const DTypeNames dtype = names(p.dtype);
  const int bd = padded_head_dim(p.q.sizes[3]);
  const TileRow& row = tiles(bd, size_of(dtype.operand));
  bool chunks = true;
  for (const Layout* x : {&p.q, &p.k, &p.v, &out, &dout}) chunks &= allows_chunks(*x, dtype.size);
  fill_params(p, plan.params);
  plan.params.out = to_strides(out.strides);
  plan.params.dout = to_strides(dout.strides);
  advise_on_layout(chunks, plan);

  const int keys = keys_of_group(row.dkv);
  const DsDivision ds = divide_ds(p, bd, keys);
  const bool store_ds = ds.tile_elements > 0;
  plan.ds_elements = ds.tile_elements + ds.sum_elements;
  plan.params.dq_sums = ds.tile_elements;
  TileChoice delta;
  delta.rows = query_rows(1);
  plan.kernels.push_back(make_kernel(p, "attention_backward_delta", delta,
      {chunks ? "chunks" : "!chunks"}, query_heads(p), p.q.sizes[2]));
  plan.kernels.push_back(
      make_kernel(p, dkv_family(row.dkv), dkv_choice(row.dkv, store_ds, dtype.operand),
          switches(p, chunks), kv_heads(p), p.k.sizes[2]));
  if (store_ds) {
    plan.kernels.push_back(
        make_kernel(p, "attention_backward_dq_from_ds", dq_choice(row.dq_from_ds, "float"),
            {chunks ? "chunks" : "!chunks"}, query_heads(p), p.q.sizes[2]));
  } else {
    plan.kernels.push_back(make_kernel(p, "attention_backward_dq", dq_choice(row.dq, dtype.operand),
        switches(p, chunks), query_heads(p), p.q.sizes[2]));
  }
  plan.launches.push_back({0, plan.kernels[0].groups, 0, 0, plan.params.kv_len});
  const uint64_t query_heads_of_one =
      kv_heads(p) > 0 ? static_cast<uint64_t>(query_heads(p) / kv_heads(p)) : 0;
  for (int64_t head = 0; head < kv_heads(p); head += ds.kv_heads) {
    for (int64_t key = 0; key < p.k.sizes[2]; key += ds.keys) {
      const uint64_t heads = static_cast<uint64_t>(std::min(ds.kv_heads, kv_heads(p) - head));
      const int64_t key_end = std::min(key + ds.keys, p.k.sizes[2]);
      KernelLaunch launch{1, {heads, static_cast<uint64_t>(blocks_of(key_end - key, keys))},
          static_cast<int32_t>(head), static_cast<int32_t>(key), static_cast<int32_t>(key_end)};
      plan.launches.push_back(launch);
      launch.kernel = 2;
      launch.groups = {heads * query_heads_of_one, plan.kernels[2].groups[1]};
      plan.launches.push_back(launch);
    }
  }
  return plan;
}

std::string to_json(const Plan& plan) {
  std::ostringstream out;
  out << "{\"refusal\": ";
  append_json(out, plan.refusal);
  out << ", \"advice\": ";
  append_json(out, plan.advice);
  out << ", \"kernels\": [";
  for (size_t i = 0; i < plan.kernels.size(); i++) {
    out << (i ? ", " : "") << "{\"name\": ";
    append_json(out, plan.kernels[i].name);
    out << ", \"family\": ";
    append_json(out, plan.kernels[i].family);
    out << ", \"instantiation\": ";
    append_json(out, plan.kernels[i].instantiation);
    out << ", \"tile\": ";
    append_json(out, plan.kernels[i].tile);
    out << ", \"tile_name\": ";
    append_json(out, plan.kernels[i].tile_name);
    out << ", \"alternatives\": [";
    for (size_t j = 0; j < plan.kernels[i].alternatives.size(); j++) {
      out << (j ? ", " : "");
      append_json(out, plan.kernels[i].alternatives[j]);
    }
    out << "]}";
  }
  out << "], \"launches\": [";
  for (size_t i = 0; i < plan.launches.size(); i++) {
    const KernelLaunch& launch = plan.launches[i];
    out << (i ? ", [" : "[") << launch.kernel << ", " << launch.groups[0] << ", "
        << launch.groups[1] << ", " << launch.first_kv_head << ", " << launch.key_begin << ", "
        << launch.key_end << "]";
  }
  out << "], \"scratch_bytes\": " << plan.ds_elements * sizeof(float) << "}";
  return out.str();
}

}  // namespace orchard
