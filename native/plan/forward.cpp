#include <algorithm>

#include "forward_parts.h"
#include "instantiate.h"
#include "join.h"
#include "params.h"
#include "plan.h"
#include "refusals.h"

namespace orchard {
namespace {

std::vector<std::string> names_of(const std::vector<TileChoice>& choices) {
  std::vector<std::string> names;
  for (const TileChoice& choice : choices) names.push_back(choice.name);
  return names;
}

}  // namespace

Plan plan_forward(const Problem& p, const Layout& out) {
  Plan plan;
  refuse(p, plan);
  if (!plan.refusal.empty()) return plan;
  const DTypeNames dtype = names(p.dtype);
  const int bd = padded_head_dim(widest_head_dim(p));
  TileChoice choice = forward_choice(tiles(bd, dtype).forward, dtype.operand);
  const std::vector<TileChoice> choices = forward_choices(bd, dtype, p.has_mask);
  const std::string asked = asked_tile(p, "attention_forward");
  if (!asked.empty()) {
    const auto found = std::find_if(choices.begin(), choices.end(),
        [&](const TileChoice& candidate) { return candidate.name == asked; });
    if (found == choices.end()) {
      plan.refusal = "ORCHARD_TILES names a tile that attention_forward does not have here";
      plan.detail = join("got ", asked);
      plan.advice = "`python -m orchard_ops bench --tiles` measures those that there are";
      return plan;
    }
    choice = *found;
  }
  bool chunks = true;
  for (const Layout* x : {&p.q, &p.k, &p.v, &out}) chunks &= allows_chunks(*x, dtype.size);
  fill_params(p, plan.params);
  plan.params.out = to_strides(out.strides);
  advise_on_layout(chunks, plan);
  add_mask_map(p, plan);
  const int64_t parts = forward_parts(p, choice.rows);
  const int64_t blocks = blocks_of(p.q.sizes[2], choice.rows);
  KernelPlan kernel = make_kernel(p, "attention_forward", choice,
      variant_of_forward(p, chunks, parts > 1), query_heads(p), parts * blocks * choice.rows);
  kernel.alternatives = names_of(choices);
  plan.add(std::move(kernel));
  if (parts > 1) add_forward_merge(p, parts, plan);
  return plan;
}

}  // namespace orchard
