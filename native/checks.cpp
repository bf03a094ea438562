#include "checks.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <limits>

namespace orchard {
namespace {

/// Names what is wrong. Users read the message of the Python checks, or this one if there is none.
void check(bool condition, const char* what) {
  if (!condition) throw Mistake(std::string("the native library takes no such ") + what);
}

void check_device(const Tensor& x, const Tensor& query) {
  check(device_type_of(x) == device_type_of(query), "mixture of devices");
}

bool has_rows_of(const Tensor& x, const Tensor& q) {
  return x.size(0) == q.size(0) && x.size(1) == q.size(1) && x.size(2) == q.size(2) &&
         dtype_code(x) == aoti_torch_dtype_float32();
}

}  // namespace

int32_t device_type_of(const Tensor& x) {
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  return device_type;
}

int32_t dtype_code(const Tensor& x) {
  int32_t code = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &code));
  return code;
}

void check_operands(const Operands& operands) {
  const auto& [query, key, value] = operands;
  const int32_t device = device_type_of(query), dtype = dtype_code(query);
  for (const Tensor* x : {&query, &key, &value}) {
    check(device_type_of(*x) == device, "mixture of devices");
    check(x->dim() == 4, "number of dimensions");
    check(dtype_code(*x) == dtype, "mixture of dtypes");
  }
  const auto q = query.sizes(), k = key.sizes(), v = value.sizes();
  check(k[0] == q[0] && v[0] == q[0], "mixture of batch sizes");
  check(k[3] == q[3], "mixture of head_dims");
  check(v[1] == k[1] && v[2] == k[2], "mixture of key and value shapes");
  check(q[3] > 0 && v[3] > 0, "head_dim");
  check(q[1] == k[1] || (k[1] > 0 && q[1] % k[1] == 0), "number of heads");
}

void check_scalars(const Scoring& s, const std::string& impl) {
  check(impl == "auto" || impl == "metal" || impl == "reference", "impl");
  check(s.window_left >= -1 && s.window_right >= -1, "window");
  check(s.key_span >= kNoBackward, "key_span");
  constexpr int64_t kMaxDiagonal = int64_t{1} << 40;
  check(s.diagonal >= -kMaxDiagonal && s.diagonal <= kMaxDiagonal, "diagonal");
  constexpr double kLargest = std::numeric_limits<float>::max();
  constexpr double kSmallest = std::numeric_limits<float>::min();
  check(s.scale >= -kLargest && s.scale <= kLargest, "scale");
  check(s.softcap == 0.0 || (s.softcap >= kSmallest && s.softcap <= kLargest), "softcap");
}

void check_additions(const Scoring& s, const Operands& operands) {
  const auto& [q, k, v] = operands;
  if (s.attn_mask.has_value()) {
    const Tensor& mask = *s.attn_mask;
    check_device(mask, q);
    const int64_t dims = mask.dim();
    check(dims == 4 || dims == 5, "number of dimensions of attn_mask");
    const int64_t full[] = {q.size(1), q.size(2), k.size(2)};
    for (int d = 0; d < 3; d++) {
      const int64_t size = mask.size(dims - 3 + d);
      check(size == 1 || size == full[d], "shape of attn_mask");
    }
    const int64_t batch = q.size(0), outer = mask.size(0);
    if (dims == 4) {
      check(outer == 1 || outer == batch, "shape of attn_mask");
    } else {
      const int64_t inner = mask.size(1), entries = outer * inner;
      check(
          (outer == 1 || inner == 1) && entries > 0 && batch % entries == 0, "shape of attn_mask");
    }
  }
  if (s.alibi_slopes.has_value()) {
    const Tensor& slopes = *s.alibi_slopes;
    check_device(slopes, q);
    check((slopes.dim() == 1 && slopes.size(0) == q.size(1)) ||
              (slopes.dim() == 2 && slopes.size(0) == q.size(0) && slopes.size(1) == q.size(1)),
        "shape of alibi_slopes");
  }
  if (s.key_ranges.has_value()) {
    const Tensor& ranges = *s.key_ranges;
    check_device(ranges, q);
    check(
        ranges.dim() == 4 && dtype_code(ranges) == aoti_torch_dtype_int32(), "dtype of key_ranges");
    check((ranges.size(0) == 1 || ranges.size(0) == q.size(0)) &&
              (ranges.size(1) == 1 || ranges.size(1) == q.size(1)) && ranges.size(2) == q.size(2) &&
              ranges.size(3) == 4,
        "shape of key_ranges");
    check(s.diagonal == 0, "diagonal beside key_ranges");
  }
  if (s.sinks.has_value()) {
    check_device(*s.sinks, q);
    check(s.sinks->dim() == 1 && s.sinks->size(0) == q.size(1), "shape of sinks");
  }
}

uint64_t checked_seed(const Scoring& s) {
  check(s.dropout_p >= 0.0 && s.dropout_p < 1.0, "dropout_p");
  if (s.dropout_p == 0.0) return 0;
  check(s.dropout_seed.has_value(), "absence of dropout_seed");
  const Tensor& seed = *s.dropout_seed;
  check(seed.dim() == 0 && seed.is_cpu() && dtype_code(seed) == aoti_torch_dtype_int64(),
      "dropout_seed");
  return static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
}

void check_like_out(const Tensor& x, const Operands& operands) {
  const auto& [query, key, value] = operands;
  check_device(x, query);
  check(x.dim() == 4 && dtype_code(x) == dtype_code(query), "out or dout");
  const auto sizes = x.sizes(), q = query.sizes();
  check(sizes[0] == q[0] && sizes[1] == q[1] && sizes[2] == q[2] && sizes[3] == value.size(3),
      "out or dout");
}

Tensor dense_rows(const Tensor& x, const Tensor& q) {
  check_device(x, q);
  check(x.dim() == 3 && has_rows_of(x, q), "dlse");
  const auto strides = x.strides();
  const bool dense =
      strides[2] == 1 && strides[1] == q.size(2) && strides[0] == q.size(1) * q.size(2);
  return dense ? x : torch::stable::contiguous(x);  // the usual case needs no dispatcher
}

Tensor dense_row_stats(const Tensor& x, const Tensor& q) {
  check_device(x, q);
  check(x.dim() == 4 && has_rows_of(x, q) && x.size(3) == 2, "row_stats");
  const auto strides = x.strides();
  const bool dense = strides[3] == 1 && strides[2] == 2 && strides[1] == 2 * q.size(2) &&
                     strides[0] == 2 * q.size(1) * q.size(2);
  return dense ? x : torch::stable::contiguous(x);
}

}  // namespace orchard
