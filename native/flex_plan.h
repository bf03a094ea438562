// The plan of attention whose scores are given as functions: that of the same call with a boolean
// mask, or with none, whose kernels have the functions in the score's place.
#pragma once

#include <memory>

#include "../shaders/flex_params.h"
#include "plan/plan.h"

namespace orchard {

/// The functions of a call, as Metal (shaders/flex_scores.h).
struct Mods {
  std::string score;  ///< struct ScoreMod; empty: a score is the scaled product
  std::string mask;   ///< struct MaskMod; empty: every pair is seen, where block_states let it
  bool has_states = false;

  bool has_map() const { return has_states || !mask.empty(); }
};

/// Whether what mask_mod says may differ by batch, or by head: whether its text names the argument.
bool differs_by_batch(const Mods& mods);
bool differs_by_head(const Mods& mods);

/// Makes `problem`, which has neither a mask nor anything else that adds to scores, the one whose
/// plan the kernels are of. `batches` and `heads` are those of what is seen.
void mask_as_mods_do(const Mods& mods, int64_t batches, int64_t heads, Problem& problem);

/// Fills what a plan fills, for a problem that mask_as_mods_do has made. From memory the second
/// time. Thread-safe.
std::shared_ptr<const Plan> flex_plan_forward(
    const Problem& problem, const Mods& mods, const Layout& out);
std::shared_ptr<const Plan> flex_plan_backward(
    const Problem& problem, const Mods& mods, const Layout& out, const Layout& dout);

}  // namespace orchard
