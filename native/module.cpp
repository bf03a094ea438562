// Registration. Python (src/orchard_ops/_ops.py) owns the schemas of the two ops.
#include <torch/csrc/stable/library.h>

#include "attention.h"
#include "plan_cache.h"

STABLE_TORCH_LIBRARY_IMPL(orchard, MPS, m) {
  m.impl("flash_attn_fwd", TORCH_BOX(&orchard::flash_attn_fwd));
  m.impl("flash_attn_bwd", TORCH_BOX(&orchard::flash_attn_bwd));
}

STABLE_TORCH_LIBRARY_FRAGMENT(orchard, m) {
  m.def(
      "flash_attn_plan(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, "
      "Tensor? alibi_slopes, Tensor? sinks, Tensor? dropout_seed, float dropout_p, float scale, "
      "int window_left, int window_right, int diagonal, float softcap, str impl) -> str");
  m.def("plans_computed() -> int");
  m.def("plans_remembered() -> int");
  m.def("metal_calls() -> (int forward, int backward)");
}

STABLE_TORCH_LIBRARY_IMPL(orchard, CompositeExplicitAutograd, m) {
  m.impl("flash_attn_plan", TORCH_BOX(&orchard::flash_attn_plan));
  m.impl("plans_computed", TORCH_BOX(&orchard::plans_computed));
  m.impl("plans_remembered", TORCH_BOX(&orchard::plans_remembered));
  m.impl("metal_calls", TORCH_BOX(&orchard::metal_calls));
}
