// The plan: which kernels a call runs, with which tiles and grid, or why Metal cannot run it.
// Pure C++: no torch, no Metal. The one source for the MPS kernels and for explain().
#pragma once

#include "problem.h"

namespace orchard {

/// Forward: fills params but for `out` strides and the dropout seed.
Plan plan_forward(const Problem& problem, const Layout& out);

/// Backward: fills params but for the strides of dq, dk, dv and the dropout seed.
Plan plan_backward(const Problem& problem, const Layout& out, const Layout& dout);

/// The widths that kernels are made in; a head_dim between them is padded to the next.
std::vector<int64_t> kernel_head_dims();

/// Memory order of an output, as src/orchard_ops/layout.py has it: strides of a dense tensor of
/// these sizes whose B, H, L run in the order of `like`'s strides, with D innermost.
std::array<int64_t, 4> strides_in_order_of(
    const std::array<int64_t, 4>& like, const std::array<int64_t, 4>& sizes);

/// Fraction of 65536 dropped, as src/orchard_ops/dropout.py rounds it.
uint32_t dropout_threshold(double dropout_p);

}  // namespace orchard
