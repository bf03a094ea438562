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

/// Everything that a plan depends on, as words.
class Key {
 public:
  Key(bool backward, const Problem& problem, const Layout& out, const Layout& dout) {
    // Names every field, so that a new one does not compile until it is part of the key.
    const auto& [dtype, q, k, v, has_mask, has_alibi, has_sinks, dropout_p, scale, window_left,
        window_right, diagonal, softcap, scratch_bytes, tiles] = problem;
    for (const Layout* layout : {&q, &k, &v, &out, &dout}) append(*layout);
    for (int64_t word :
        {int64_t{backward}, static_cast<int64_t>(dtype), int64_t{has_mask}, int64_t{has_alibi},
            int64_t{has_sinks}, window_left, window_right, diagonal, scratch_bytes}) {
      append(word);
    }
    for (double number : {dropout_p, scale, softcap}) append(bits(number));
    tiles_ = tiles;
  }

  bool operator==(const Key& other) const {
    return words_ == other.words_ && tiles_ == other.tiles_;
  }

  struct Hash {
    size_t operator()(const Key& key) const {
      uint64_t hash = 0;
      for (int64_t word : key.words_) {
        hash = (hash ^ static_cast<uint64_t>(word)) * 0x9E3779B97F4A7C15u;
        hash ^= hash >> 29;
      }
      return hash;
    }
  };

 private:
  void append(int64_t word) { words_.at(used_++) = word; }
  void append(const Layout& layout) {
    const auto& [sizes, strides, offset] = layout;
    for (int64_t size : sizes) append(size);
    for (int64_t stride : strides) append(stride);
    append(offset);
  }
  static int64_t bits(double number) {
    int64_t word = 0;
    std::memcpy(&word, &number, sizeof word);
    return word;
  }

  std::array<int64_t, 57> words_{};
  std::string tiles_;  // not hashed: all but always empty
  size_t used_ = 0;
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
