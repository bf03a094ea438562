#include "plan_cache.h"

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

/// Everything that a plan depends on.
class Key {
 public:
  Key(bool backward, const Problem& problem, const Layout& out, const Layout& dout) {
    // Names every field, so that a new one does not compile until it is part of the key.
    const auto& [dtype, q, k, v, has_mask, mask_grad, mask_dtype, mask, has_alibi, has_sinks,
        per_head_float32, alibi_batch, alibi_head, has_key_ranges, ranges_batch, ranges_head,
        key_span, dropout_p, scale, window_left, window_right, diagonal, softcap, scratch_bytes,
        tiles] = problem;
    fields_ = {{q, k, v, out, dout}, mask,
        {backward, static_cast<int64_t>(dtype), has_mask, mask_grad,
            static_cast<int64_t>(mask_dtype), has_alibi, has_sinks, per_head_float32, alibi_batch,
            alibi_head, has_key_ranges, ranges_batch, ranges_head, key_span, window_left,
            window_right, diagonal, scratch_bytes},
        {dropout_p, scale, softcap}};
    tiles_ = tiles;
  }

  bool operator==(const Key& other) const {
    return std::memcmp(&fields_, &other.fields_, sizeof fields_) == 0 && tiles_ == other.tiles_;
  }

  struct Hash {
    size_t operator()(const Key& key) const {
      // What out, dout and the mask are follows from the rest as a rule. A step waits for the one
      // before it, so the operands are mixed side by side.
      const auto& [layouts, mask, integers, numbers] = key.fields_;
      uint64_t q = 0, k = 0, v = 0;
      for (size_t d = 0; d < 4; d++) {
        q = mixed(mixed(q ^ bits(layouts[0].sizes[d])) ^ bits(layouts[0].strides[d]));
        k = mixed(mixed(k ^ bits(layouts[1].sizes[d])) ^ bits(layouts[1].strides[d]));
        v = mixed(mixed(v ^ bits(layouts[2].sizes[d])) ^ bits(layouts[2].strides[d]));
      }
      uint64_t other = 0, number = 0;
      for (int64_t x : integers) other = mixed(other ^ bits(x));
      for (double x : numbers) number = mixed(number ^ bits(x));
      for (size_t i = 0; i < 3; i++) number = mixed(number ^ bits(layouts[i].offset));
      return mixed(mixed(mixed(mixed(q) ^ k) ^ v) ^ other) ^ number;
    }
  };

 private:
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
    int64_t integers[18];
    double numbers[3];
  };
  static_assert(sizeof(Fields) == (5 * 9 + 12 + 18 + 3) * sizeof(uint64_t) &&
                    sizeof(Layout) == 9 * sizeof(uint64_t) &&
                    sizeof(MaskLayout) == 12 * sizeof(uint64_t),
      "a key has no bytes that nobody writes");

  Fields fields_;
  std::string tiles_;  // not hashed: all but always empty
};

std::atomic<int64_t> computed{0};

struct Memory {
  std::mutex mutex;
  std::unordered_map<Key, std::shared_ptr<const Plan>, Key::Hash> plans;
};

Memory& memory() {
  // Never destroyed: threads may still run kernels while the process exits.
  static auto& instance = *new Memory;
  return instance;
}

template <typename Compute>
std::shared_ptr<const Plan> remembered(const Key& key, const Compute& compute) {
  auto& [mutex, plans] = memory();
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (const auto found = plans.find(key); found != plans.end()) return found->second;
  }
  auto plan = std::make_shared<const Plan>(compute());
  computed++;
  const std::lock_guard<std::mutex> lock(mutex);
  if (plans.size() >= kMaxPlans) plans.clear();
  plans[key] = plan;
  return plan;
}

}  // namespace

std::shared_ptr<const Plan> cached_plan_forward(const Problem& problem, const Layout& out) {
  return remembered(Key(false, problem, out, {}), [&] { return plan_forward(problem, out); });
}

std::shared_ptr<const Plan> cached_plan_backward(
    const Problem& problem, const Layout& out, const Layout& dout) {
  return remembered(
      Key(true, problem, out, dout), [&] { return plan_backward(problem, out, dout); });
}

int64_t plans_computed() { return computed; }

int64_t plans_remembered() {
  auto& [mutex, plans] = memory();
  const std::lock_guard<std::mutex> lock(mutex);
  return static_cast<int64_t>(plans.size());
}

}  // namespace orchard
