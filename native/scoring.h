// The arguments of the ops, each written once: their schemas, how a kernel takes them from the
// dispatcher's stack, and how a call puts them on it. src/orchard_ops has the same list in Python.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace orchard {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// An integer that may vary from call to call in one compiled graph.
struct SymInt {
  int64_t value = 0;
  operator int64_t() const { return value; }
};

/// The arguments besides the operands that decide the weights, in the order of the schemas.
#define ORCHARD_SCORING(X)        \
  X(OptionalTensor, attn_mask)    \
  X(OptionalTensor, alibi_slopes) \
  X(OptionalTensor, sinks)        \
  X(OptionalTensor, dropout_seed) \
  X(double, dropout_p)            \
  X(double, scale)                \
  X(int64_t, window_left)         \
  X(int64_t, window_right)        \
  X(SymInt, diagonal)             \
  X(double, softcap)              \
  X(int64_t, key_span)            \
  X(OptionalTensor, key_ranges)

#define ORCHARD_OPERANDS(X) \
  X(Tensor, query)          \
  X(Tensor, key)            \
  X(Tensor, value)

/// The arguments that a backward has besides the forward's operands and scoring, before the
/// operands and behind them.
#define ORCHARD_GRADIENTS(X) \
  X(Tensor, dout)            \
  X(OptionalTensor, dlse)
#define ORCHARD_RESULTS(X) \
  X(Tensor, out)           \
  X(Tensor, row_stats)

#define ORCHARD_FIELD(Type, name) Type name;

struct Operands {
  ORCHARD_OPERANDS(ORCHARD_FIELD)
};

struct Scoring {
  ORCHARD_SCORING(ORCHARD_FIELD)
};

/// The key_span of a forward that no backward follows (NO_BACKWARD in Python).
constexpr int64_t kNoBackward = -1;

/// The arguments of orchard::flash_attn_fwd and orchard::flash_attn_plan.
struct ForwardCall {
  Operands operands;
  Scoring scoring;
  std::string impl;
};

/// The arguments of orchard::flash_attn_bwd.
struct BackwardCall {
  ORCHARD_GRADIENTS(ORCHARD_FIELD)
  Operands operands;
  ORCHARD_RESULTS(ORCHARD_FIELD)
  Scoring scoring;
  bool mask_grad;
  std::string impl;
};

#undef ORCHARD_FIELD

#define ORCHARD_COUNT(Type, name) +1
constexpr uint64_t kNumForwardArguments =
    0 ORCHARD_OPERANDS(ORCHARD_COUNT) ORCHARD_SCORING(ORCHARD_COUNT) + 1;
constexpr uint64_t kNumBackwardArguments =
    kNumForwardArguments ORCHARD_GRADIENTS(ORCHARD_COUNT) ORCHARD_RESULTS(ORCHARD_COUNT) + 1;
#undef ORCHARD_COUNT

/// The dispatcher's stack with arguments on it. Each is taken once, in order, and belongs to its
/// taker.
class Arguments {
 public:
  explicit Arguments(const StableIValue* stack) : next_(stack) {}

  template <typename T>
  T take() {
    return torch::stable::detail::to<T>(*next_++);
  }

 private:
  const StableIValue* next_;
};

/// Converts without the copy that torch's own conversion leaves behind.
template <>
inline std::string Arguments::take<std::string>() {
  const auto handle = torch::stable::detail::to<StringHandle>(*next_++);
  size_t length = 0;
  const char* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string text(data, length);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

template <>
inline SymInt Arguments::take<SymInt>() {
  return {take<int64_t>()};
}

#define ORCHARD_TAKE(Type, name) arguments.take<Type>(),

// The parts of an initializer in braces are evaluated in order.
template <>
inline Operands Arguments::take<Operands>() {
  Arguments& arguments = *this;
  return {ORCHARD_OPERANDS(ORCHARD_TAKE)};
}

template <>
inline Scoring Arguments::take<Scoring>() {
  Arguments& arguments = *this;
  return {ORCHARD_SCORING(ORCHARD_TAKE)};
}

template <>
inline ForwardCall Arguments::take<ForwardCall>() {
  return {take<Operands>(), take<Scoring>(), take<std::string>()};
}

template <>
inline BackwardCall Arguments::take<BackwardCall>() {
  Arguments& arguments = *this;
  return {ORCHARD_GRADIENTS(ORCHARD_TAKE) take<Operands>(),
      ORCHARD_RESULTS(ORCHARD_TAKE) take<Scoring>(), take<bool>(), take<std::string>()};
}

#undef ORCHARD_TAKE

/// A stack for a call of another op, which takes what is put on it.
class Stack {
 public:
  template <typename T>
  void put(const T& x) {
    values_.push_back(torch::stable::detail::from(x));
  }

  /// Room for results, which come where the arguments were.
  std::vector<StableIValue>& with_room_for(size_t results) {
    if (values_.size() < results) values_.resize(results);
    return values_;
  }

 private:
  std::vector<StableIValue> values_;
};

template <>
inline void Stack::put(const SymInt& x) {
  put(x.value);
}

#define ORCHARD_PUT(Type, name) put(x.name);

template <>
inline void Stack::put(const Operands& x) {
  ORCHARD_OPERANDS(ORCHARD_PUT)
}

template <>
inline void Stack::put(const Scoring& x) {
  ORCHARD_SCORING(ORCHARD_PUT)
}

template <>
inline void Stack::put(const ForwardCall& x) {
  put(x.operands);
  put(x.scoring);
  put(x.impl);
}

template <>
inline void Stack::put(const BackwardCall& x) {
  ORCHARD_GRADIENTS(ORCHARD_PUT)
  put(x.operands);
  ORCHARD_RESULTS(ORCHARD_PUT)
  put(x.scoring);
  put(x.mask_grad);
  put(x.impl);
}

#undef ORCHARD_PUT

/// A type as a schema writes it.
template <typename T>
constexpr const char* schema_type();
template <>
constexpr const char* schema_type<Tensor>() {
  return "Tensor ";
}
template <>
constexpr const char* schema_type<OptionalTensor>() {
  return "Tensor? ";
}
template <>
constexpr const char* schema_type<double>() {
  return "float ";
}
template <>
constexpr const char* schema_type<int64_t>() {
  return "int ";
}

template <>
constexpr const char* schema_type<SymInt>() {
  return "SymInt ";
}

#define ORCHARD_SCHEMA(Type, name) +schema_type<Type>() + #name ", "

inline std::string forward_arguments() {
  return std::string() ORCHARD_OPERANDS(ORCHARD_SCHEMA) ORCHARD_SCORING(ORCHARD_SCHEMA) +
         "str impl";
}

inline std::string backward_arguments() {
  return std::string() ORCHARD_GRADIENTS(ORCHARD_SCHEMA) ORCHARD_OPERANDS(ORCHARD_SCHEMA)
             ORCHARD_RESULTS(ORCHARD_SCHEMA) ORCHARD_SCORING(ORCHARD_SCHEMA) +
         "bool mask_grad, str impl";
}

#undef ORCHARD_SCHEMA

}  // namespace orchard
