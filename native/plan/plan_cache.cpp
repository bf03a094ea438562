#include "plan_cache.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <mutex>
#include <string>
#include <unordered_map>

namespace orchard {
namespace {

/// When as many are held, all are forgotten: lengths that change with every call would else fill
/// the memory.
constexpr size_t kMaxPlans = 256;

/// Which function computes a plan, and so which type it has.
enum class Kind : int64_t { kForward, kBackward, kForwardAsDecode, kDecode, kAppend };

/// Everything that a plan depends on.
class Key {
 public:
  /// `last` is the layout of dout, or that of what a call appends to.
  Key(Kind kind, const Problem& problem, const Layout& out, const Layout& last) {
    // Names every field, so that a new one does not compile until it is part of the key.
    const auto& [dtype, q, k, v, has_mask, mask_grad, mask_dtype, mask, has_alibi, has_sinks,
        per_head_float32, alibi_batch, alibi_head, has_key_ranges, ranges_batch, ranges_head,
        key_span, dropout_p, scale, window_left, window_right, diagonal, softcap, scratch_bytes,
        gpu_cores, tiles] = problem;
    fields_ = {{q, k, v, out, last}, mask,
        {static_cast<int64_t>(kind), static_cast<int64_t>(dtype), has_mask, mask_grad,
            static_cast<int64_t>(mask_dtype), has_alibi, has_sinks, per_head_float32, alibi_batch,
            alibi_head, has_key_ranges, ranges_batch, ranges_head, key_span, window_left,
            window_right, diagonal, scratch_bytes, gpu_cores},
        {}, {dropout_p, scale, softcap}};
    tiles_ = tiles;
  }

  Key(const CacheProblem& problem, const Layout& out)
      : Key(Kind::kDecode, problem.attention, out, {}) {
    const auto& [attention, cache, paged, pages, page_size, entries, added] = problem;
    set_cache(cache, paged, pages, page_size, entries, added);
  }

  explicit Key(const AppendProblem& problem)
      : Key(Kind::kAppend, {}, problem.added, problem.cache) {
    const auto& [dtype, added, into, cache, pages, offset] = problem;
    fields_.integers[1] = static_cast<int64_t>(dtype);
    set_cache(cache, cache.paged != 0, pages, 0, 0, offset);
  }

  bool operator==(const Key& other) const {
    return std::memcmp(&fields_, &other.fields_, sizeof fields_) == 0 && tiles_ == other.tiles_;
  }

  struct Hash {
    size_t operator()(const Key& key) const {
      // What out, dout and the mask are follows from the rest as a rule. A step waits for the one
      // before it, so the operands are mixed side by side.
      const auto& [layouts, mask, integers, cache, numbers] = key.fields_;
      uint64_t q = 0, k = 0, v = 0;
      for (size_t d = 0; d < 4; d++) {
        q = mixed(mixed(q ^ bits(layouts[0].sizes[d])) ^ bits(layouts[0].strides[d]));
        k = mixed(mixed(k ^ bits(layouts[1].sizes[d])) ^ bits(layouts[1].strides[d]));
        v = mixed(mixed(v ^ bits(layouts[2].sizes[d])) ^ bits(layouts[2].strides[d]));
      }
      uint64_t other = 0, number = 0;
      for (int64_t x : integers) other = mixed(other ^ bits(x));
      if (key.has_cache_) {
        for (int64_t x : cache) other = mixed(other ^ bits(x));
      }
      for (double x : numbers) number = mixed(number ^ bits(x));
      for (size_t i = 0; i < 3; i++) number = mixed(number ^ bits(layouts[i].offset));
      return mixed(mixed(mixed(mixed(q) ^ k) ^ v) ^ other) ^ number;
    }
  };

 private:
  /// `added` counts up from call to call: a plan depends on it only where it is refused for it.
  void set_cache(const CacheParams& cache, bool paged, int64_t pages, int64_t page_size,
      int64_t entries, int64_t added) {
    const int64_t flags = paged + 2 * (cache.has_lengths != 0) + 4 * (cache.has_starts != 0) +
                          8 * (cache.has_entries != 0);
    has_cache_ = true;
    const int64_t fields[6] = {
        flags, cache.table_row, pages, page_size, entries, added > ORCHARD_MAX_LENGTH ? added : 0};
    std::copy_n(fields, 6, fields_.cache);
  }

  template <typename Number>
  static uint64_t bits(Number number) {
    static_assert(sizeof(Number) == sizeof(uint64_t));
    uint64_t word = 0;
    std::memcpy(&word, &number, sizeof word);
    return word;
  }

  static uint64_t mixed(uint64_t word) {
    word *= 0x9E3779B97F4A7C15u;
    return word ^ (word >> 29);
  }

  struct Fields {
    Layout layouts[5];
    MaskLayout mask;
    int64_t integers[19];
    int64_t cache[6];
    double numbers[3];
  };
  static_assert(sizeof(Fields) == (5 * 9 + 12 + 19 + 6 + 3) * sizeof(uint64_t) &&
                    sizeof(Layout) == 9 * sizeof(uint64_t) &&
                    sizeof(MaskLayout) == 12 * sizeof(uint64_t),
      "a key has no bytes that nobody writes");

  Fields fields_;
  bool has_cache_ = false;  // follows from the kind
  std::string tiles_;       // not hashed: all but always empty
};

std::atomic<int64_t> computed{0};

struct Memory {
  std::mutex mutex;
  std::unordered_map<Key, std::shared_ptr<const void>, Key::Hash> plans;
};

Memory& memory() {
  // Never destroyed: threads may still run kernels while the process exits.
  static auto& instance = *new Memory;
  return instance;
}

template <typename Compute>
auto remembered(const Key& key, const Compute& compute) {
  using Computed = const decltype(compute());  // by the key's kind the type of what is found
  auto& [mutex, plans] = memory();
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (const auto found = plans.find(key); found != plans.end()) {
      return std::static_pointer_cast<Computed>(found->second);
    }
  }
  auto plan = std::make_shared<Computed>(compute());
  computed++;
  const std::lock_guard<std::mutex> lock(mutex);
  if (plans.size() >= kMaxPlans) plans.clear();
  plans[key] = plan;
  return plan;
}

}  // namespace

std::shared_ptr<const Plan> cached_plan_forward(const Problem& problem, const Layout& out) {
  return remembered(
      Key(Kind::kForward, problem, out, {}), [&] { return plan_forward(problem, out); });
}

std::shared_ptr<const Plan> cached_plan_backward(
    const Problem& problem, const Layout& out, const Layout& dout) {
  return remembered(
      Key(Kind::kBackward, problem, out, dout), [&] { return plan_backward(problem, out, dout); });
}

std::shared_ptr<const DecodePlan> cached_plan_forward_as_decode(
    const Problem& problem, const Layout& out) {
  return remembered(Key(Kind::kForwardAsDecode, problem, out, {}),
      [&] { return plan_forward_as_decode(problem, out); });
}

std::shared_ptr<const DecodePlan> cached_plan_decode(
    const CacheProblem& problem, const Layout& out) {
  return remembered(Key(problem, out), [&] { return plan_decode(problem, out); });
}

std::shared_ptr<const DecodePlan> cached_plan_append(const AppendProblem& problem) {
  return remembered(Key(problem), [&] { return plan_append(problem); });
}

int64_t plans_computed() { return computed; }

int64_t plans_remembered() {
  auto& [mutex, plans] = memory();
  const std::lock_guard<std::mutex> lock(mutex);
  return static_cast<int64_t>(plans.size());
}

}  // namespace orchard
