// The MPS kernels of orchard::flash_attn_fwd and orchard::flash_attn_bwd.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace orchard {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Signatures as the schemas in src/orchard_ops/_ops.py.
std::tuple<Tensor, Tensor> flash_attn_fwd(Tensor query, Tensor key, Tensor value,
    OptionalTensor attn_mask, OptionalTensor alibi_slopes, OptionalTensor sinks,
    OptionalTensor dropout_seed, double dropout_p, double scale, int64_t window_left,
    int64_t window_right, int64_t diagonal, double softcap, std::string impl);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> flash_attn_bwd(Tensor dout, OptionalTensor dlse,
    Tensor query, Tensor key, Tensor value, Tensor out, Tensor row_stats, OptionalTensor attn_mask,
    OptionalTensor alibi_slopes, OptionalTensor sinks, OptionalTensor dropout_seed,
    double dropout_p, double scale, int64_t window_left, int64_t window_right, int64_t diagonal,
    double softcap, bool mask_grad, std::string impl);

/// The plan of a forward and its backward as JSON, for explain(): runs nothing, reads no data.
std::string flash_attn_plan(Tensor query, Tensor key, Tensor value, OptionalTensor attn_mask,
    OptionalTensor alibi_slopes, OptionalTensor sinks, OptionalTensor dropout_seed,
    double dropout_p, double scale, int64_t window_left, int64_t window_right, int64_t diagonal,
    double softcap, std::string impl);

/// Calls that have run as Metal kernels: forward, backward.
std::tuple<int64_t, int64_t> metal_calls();

}  // namespace orchard
