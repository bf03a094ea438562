// Plans remembered by problem: a training run, or a generation, asks for the same few thousands of
// times.
#pragma once

#include <cstdint>
#include <memory>

#include "decode.h"
#include "plan.h"

namespace orchard {

/// As plan_forward and plan_backward, which are pure functions: the second time from memory.
/// Thread-safe.
std::shared_ptr<const Plan> cached_plan_forward(const Problem& problem, const Layout& out);
std::shared_ptr<const Plan> cached_plan_backward(
    const Problem& problem, const Layout& out, const Layout& dout);

/// As plan_decode and plan_append, but for what changes with every token: the caller sets
/// params.cache.added, which is `added` and `offset` of these problems.
std::shared_ptr<const DecodePlan> cached_plan_decode(
    const CacheProblem& problem, const Layout& out);
std::shared_ptr<const DecodePlan> cached_plan_append(const AppendProblem& problem);

/// As plan_forward_as_decode.
std::shared_ptr<const DecodePlan> cached_plan_forward_as_decode(
    const Problem& problem, const Layout& out);

/// Plans that were computed, not remembered, in this process.
int64_t plans_computed();

/// Plans held now: at most 256.
int64_t plans_remembered();

}  // namespace orchard
