#include "flex_plan.h"

#include <cctype>
#include <map>
#include <mutex>
#include <tuple>

#include "plan/instantiate.h"
#include "plan/join.h"
#include "plan/plan_cache.h"
#include "plan/tiles.h"

namespace orchard {
namespace {

/// Plans that are remembered: when as many are held, all are forgotten.
constexpr size_t kMostPlans = 256;

const char* const kPlain = "PlainScore";
const char* const kMasked = "Score<false, false, Mask<uchar, false>>";
const char* const kMap = "Mask<uchar, false>";

bool is_word(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_'; }

/// How often a word stands in a text.
int count_word(const std::string& text, const std::string& word) {
  int count = 0;
  for (size_t at = text.find(word); at != std::string::npos; at = text.find(word, at + 1)) {
    const size_t end = at + word.size();
    const bool begins = at == 0 || !is_word(text[at - 1]);
    count += begins && (end == text.size() || !is_word(text[end]));
  }
  return count;
}

/// The name is once in the argument list. Other names than the ones that are agreed upon may stand
/// for anything.
bool names_argument(const std::string& mask, const std::string& argument) {
  return !mask.empty() && count_word(mask, argument) != 1;
}

std::string hexadecimal(uint64_t number, int digits) {
  std::string text(digits, '0');
  for (int i = digits - 1; i >= 0; i--, number /= 16) text[i] = "0123456789abcdef"[number % 16];
  return text;
}

/// FNV-1a.
uint64_t hash_of(const std::string& text) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (unsigned char c : text) hash = (hash ^ c) * 0x100000001b3u;
  return hash;
}

/// A name for a text, its own in this process: compiled kernels are kept by name.
std::string name_of(const std::string& text) {
  static auto& mutex = *new std::mutex;  // never destroyed, as where kernels are kept
  static auto& texts = *new std::map<std::string, std::string>;
  const std::string hash = hexadecimal(hash_of(text) >> 16, 12);
  const std::lock_guard<std::mutex> lock(mutex);
  for (int next = 1;; next++) {
    const std::string name = next == 1 ? hash : join(hash, "_", next);
    if (texts.emplace(name, text).first->second == text) return name;
  }
}

/// Replaces what must be there.
void replace(std::string& text, const std::string& before, const std::string& after) {
  text.replace(text.find(before), before.size(), after);
}

/// What an ordinary kernel becomes. Those that form no score stay as they are.
void give(const Mods& mods, const std::string& name, KernelPlan& kernel) {
  const bool is_map = kernel.role == KernelRole::kMap;
  const bool forms_scores = kernel.family == "attention_forward" ||
                            kernel.family == "attention_backward_dq" ||
                            kernel.role == KernelRole::kKeys;
  if (!is_map && !forms_scores) return;
  const std::string ordinary = kernel.name;
  const char* mask_mod = mods.mask.empty() ? "NoMaskMod" : "MaskMod";
  if (is_map) {
    kernel.family = "attention_flex_map";
    kernel.name = join(kernel.family, "_", name);
    const std::string type = join(kernel.family, "<", mask_mod, ", ", kSimdgroups, ">");
    kernel.instantiation = join(mods.mask, "\ntemplate [[host_name(\"", kernel.name,
        "\")]] [[kernel]] decltype(", type, ") ", type, ";\n");
    return;
  }
  if (mods.has_map()) replace(kernel.name, "_mask_bool", "");
  kernel.name += "_flex_" + name;
  const std::string score = join("FlexScore<", mods.score.empty() ? "NoScoreMod" : "ScoreMod", ", ",
      mask_mod, ", ", mods.has_map() ? kMap : "NoMask", ">");
  replace(kernel.instantiation, ordinary, kernel.name);
  for (int i = 0; i < 2; i++) {  // the type, and the type that it has
    replace(kernel.instantiation, mods.has_map() ? kMasked : kPlain, score);
  }
  kernel.instantiation = join(mods.score, "\n", mods.mask, "\n", kernel.instantiation);
  kernel.family += "_flex";
}

/// Gives the map's kernel its threadgroups: a simdgroup takes ORCHARD_MAP_RUN blocks of a row,
/// where that of an ordinary map takes one.
void divide_map(Plan& plan) {
  const int64_t rows = blocks_of(plan.params.q_len, ORCHARD_MAP_BLOCK);
  const int64_t cols = blocks_of(plan.params.kv_len, ORCHARD_MAP_BLOCK);
  const int64_t blocks = rows * blocks_of(cols, kSimdgroups * ORCHARD_MAP_RUN);
  for (KernelPlan& kernel : plan.kernels) {
    if (kernel.role != KernelRole::kMap) continue;
    set_map_groups(static_cast<int64_t>(kernel.groups[0]), blocks, kernel);
  }
  for (KernelLaunch& launch : plan.launches) {
    const KernelPlan& kernel = plan.kernels[launch.kernel];
    if (kernel.role == KernelRole::kMap) launch.groups = kernel.groups;
  }
}

/// The ordinary plan, and the one with the functions. The first is kept so that its address stays
/// its own.
struct Known {
  std::shared_ptr<const Plan> ordinary, plan;
};

std::shared_ptr<const Plan> with(const Mods& mods, std::shared_ptr<const Plan> ordinary) {
  if (!mods.has_map() && mods.score.empty()) return ordinary;
  using Key = std::tuple<const Plan*, std::string, std::string, bool>;
  static auto& mutex = *new std::mutex;
  static auto& plans = *new std::map<Key, Known>;
  const Key key{ordinary.get(), mods.score, mods.mask, mods.has_states};
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = plans.find(key); found != plans.end()) return found->second.plan;
  auto plan = std::make_shared<Plan>(*ordinary);
  const std::string name = name_of(join(mods.score, "\n", mods.mask, "\n", mods.has_map()));
  for (KernelPlan& kernel : plan->kernels) give(mods, name, kernel);
  divide_map(*plan);
  if (plans.size() >= kMostPlans) plans.clear();
  plans[key] = {std::move(ordinary), plan};
  return plan;
}

}  // namespace

bool differs_by_batch(const Mods& mods) { return names_argument(mods.mask, "b"); }
bool differs_by_head(const Mods& mods) { return names_argument(mods.mask, "h"); }

void mask_as_mods_do(const Mods& mods, int64_t batches, int64_t heads, Problem& problem) {
  if (!mods.has_map()) return;
  problem.has_mask = true;
  problem.mask_dtype = DType::kBool;
  problem.mask.sizes = {batches, 1, heads, problem.q.sizes[2], problem.k.sizes[2]};
  problem.mask.strides = {1, 1, 1, 1, 1};  // the mask is nowhere, but not the same for all
  problem.mask.offset = 1;                 // nor does it have pairs of elements
  problem.mask.inner = 1;
}

std::shared_ptr<const Plan> flex_plan_forward(
    const Problem& problem, const Mods& mods, const Layout& out) {
  Problem undivided = problem;
  undivided.gpu_cores = kUndivided;  // no kernel here merges parts
  return with(mods, cached_plan_forward(undivided, out));
}

std::shared_ptr<const Plan> flex_plan_backward(
    const Problem& problem, const Mods& mods, const Layout& out, const Layout& dout) {
  return with(mods, cached_plan_backward(problem, out, dout));
}

}  // namespace orchard
