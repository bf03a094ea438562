#include "plan.h"

#include <algorithm>
#include <cmath>
#include <sstream>

namespace orchard {
namespace {

constexpr int kSimdgroups = 4;  // of a threadgroup, in every kernel

/// Tiles by padded head dim and element size. BK and BQ are rows staged at once; a forward or dq
/// threadgroup takes 8 * R * kSimdgroups query rows, a dk/dv threadgroup 8 * kSimdgroups keys.
struct TileRow {
  int max_head_dim;
  int element_size;
  int forward_r, forward_bk;
  int dq_r, dq_bk;
  int dkv_bq;
};

// Wide heads and float32 stage fewer rows so that several threadgroups share a core's 32 KiB or so.
constexpr TileRow kTiles[] = {
    {64, 2, 1, 32, 1, 16, 16},
    {128, 2, 1, 16, 1, 16, 16},
    {256, 2, 1, 8, 1, 8, 8},
    {64, 4, 1, 16, 1, 16, 16},
    {128, 4, 1, 8, 1, 8, 8},
    {256, 4, 1, 8, 1, 8, 8},
};

// A small closed set of widths, so that each variant is proven; others are padded with zeros.
constexpr int kHeadDims[] = {16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256};
constexpr int kMaxHeadDim = 256;

struct DTypeNames {
  const char* torch;
  const char* metal;
  /// Operand type of the matrix unit. The forward's weights lie in [0, 1] and fit half; the
  /// backward's score gradients may not. bfloat16 operands would round the weights to 8 bits.
  const char* forward_operand;
  const char* backward_operand;
  int size;
};

DTypeNames names(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return {"float16", "half", "half", "float", 2};
    case DType::kBFloat16:
      return {"bfloat16", "bfloat", "float", "float", 2};
    default:
      return {"float32", "float", "float", "float", 4};
  }
}

int padded_head_dim(int64_t head_dim) {
  return *std::lower_bound(std::begin(kHeadDims), std::end(kHeadDims), head_dim);
}

const TileRow& tiles(int head_dim, int element_size) {
  return *std::find_if(std::begin(kTiles), std::end(kTiles), [&](const TileRow& row) {
    return head_dim <= row.max_head_dim && element_size == row.element_size;
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
  auto because = [&](auto&&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    plan.refusal = text.str();
  };
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

struct Variant {
  const char* family;
  const char* operand;
  std::string tile_name;  // as in the kernel's name: r1_k32
  std::string tile_args;  // as in the template's arguments: 1, 32
  std::string tile_text;
};

KernelPlan make_kernel(
    const Problem& p, const Variant& variant, bool chunks, uint64_t heads, uint64_t blocks) {
  const DTypeNames dtype = names(p.dtype);
  const int bd = padded_head_dim(p.q.sizes[3]);
  const bool dropout = dropout_threshold(p.dropout_p) > 0;
  KernelPlan kernel;
  kernel.family = variant.family;
  std::ostringstream name, args, line, tile;
  name << variant.family << "_" << dtype.torch << "_d" << bd << "_" << variant.tile_name
       << (chunks ? "_chunks" : "_elements") << (dropout ? "_dropout" : "");
  kernel.name = name.str();
  args << variant.family << "<" << dtype.metal << ", " << variant.operand << ", " << bd << ", "
       << variant.tile_args << ", " << kSimdgroups << ", " << (chunks ? "true" : "false") << ", "
       << (dropout ? "true" : "false") << ">";
  line << "template [[host_name(\"" << kernel.name << "\")]] [[kernel]] decltype(" << args.str()
       << ") " << args.str() << ";\n";
  kernel.instantiation = line.str();
  tile << variant.tile_text << ", head_dim padded to " << bd << "; " << heads << " x " << blocks
       << " threadgroups of " << kSimdgroups * ORCHARD_SIMD_WIDTH << " threads";
  kernel.tile = tile.str();
  kernel.groups = {heads, blocks};
  kernel.threads = kSimdgroups * ORCHARD_SIMD_WIDTH;
  return kernel;
}

uint64_t blocks_of(int64_t length, int64_t block) {
  return static_cast<uint64_t>((length + block - 1) / block);
}

/// A kernel over query rows: forward or dq.
KernelPlan query_kernel(
    const Problem& p, const char* family, const char* operand, int r, int bk, bool chunks) {
  const int bq = 8 * r * kSimdgroups;
  std::ostringstream name, args, text;
  name << "r" << r << "_k" << bk;
  args << r << ", " << bk;
  text << "BQ " << bq << ", BK " << bk;
  return make_kernel(p, {family, operand, name.str(), args.str(), text.str()}, chunks,
      static_cast<uint64_t>(p.q.sizes[0] * p.q.sizes[1]), blocks_of(p.q.sizes[2], bq));
}

KernelPlan key_kernel(const Problem& p, const char* operand, int bq, bool chunks) {
  const int keys = 8 * kSimdgroups;
  std::ostringstream text;
  text << "BK " << keys << ", BQ " << bq;
  return make_kernel(p,
      {"attention_backward_dkv", operand, "q" + std::to_string(bq), std::to_string(bq), text.str()},
      chunks, static_cast<uint64_t>(p.k.sizes[0] * p.k.sizes[1]), blocks_of(p.k.sizes[2], keys));
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

Plan plan_forward(const Problem& p, const Layout& out) {
  Plan plan;
  refuse(p, plan);
  if (!plan.refusal.empty()) return plan;
  const DTypeNames dtype = names(p.dtype);
  const TileRow& tile = tiles(padded_head_dim(p.q.sizes[3]), dtype.size);
  bool chunks = true;
  for (const Layout* x : {&p.q, &p.k, &p.v, &out}) chunks &= allows_chunks(*x, dtype.size);
  fill_params(p, plan.params);
  plan.params.out = to_strides(out.strides);
  advise_on_layout(chunks, plan);
  plan.kernels.push_back(query_kernel(
      p, "attention_forward", dtype.forward_operand, tile.forward_r, tile.forward_bk, chunks));
  return plan;
}

Plan plan_backward(const Problem& p, const Layout& out, const Layout& dout) {
  Plan plan;
  refuse(p, plan);
  if (!plan.refusal.empty()) return plan;
  const DTypeNames dtype = names(p.dtype);
  const TileRow& tile = tiles(padded_head_dim(p.q.sizes[3]), dtype.size);
  bool chunks = true;
  for (const Layout* x : {&p.q, &p.k, &p.v, &out, &dout}) chunks &= allows_chunks(*x, dtype.size);
  fill_params(p, plan.params);
  plan.params.out = to_strides(out.strides);
  plan.params.dout = to_strides(dout.strides);
  advise_on_layout(chunks, plan);
  plan.kernels.push_back(query_kernel(
      p, "attention_backward_dq", dtype.backward_operand, tile.dq_r, tile.dq_bk, chunks));
  plan.kernels.push_back(key_kernel(p, dtype.backward_operand, tile.dkv_bq, chunks));
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
    out << "}";
  }
  out << "]}";
  return out.str();
}

}  // namespace orchard
