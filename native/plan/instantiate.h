// A kernel's name and the one line of Metal that makes its variant.
#pragma once

#include "tiles.h"

namespace orchard {

/// What a kernel is compiled for besides its tile (Variant in shaders/loader.h).
struct Variant {
  std::string type;    ///< as the template's argument
  std::string suffix;  ///< of the kernel's name
};

/// What of the problem a kernel distinguishes. `chunks`: whether rows load in chunks of 16 bytes.
Variant full_variant(const Problem& problem, bool chunks);
/// `parts`: whether a threadgroup leaves the sums of a share of the keys.
Variant variant_of_forward(const Problem& problem, bool chunks, bool parts);
/// Besides its loads only whether there is a mask.
Variant variant_of_visibility(const Problem& problem, bool chunks);
/// Besides that only whether there are sinks, and the units of scores where there are.
Variant variant_of_sinks(const Problem& problem, bool chunks);

/// `parts`: whether a threadgroup takes a part of a group's query heads (shaders/dkv_parts.h).
Variant variant_of_keys(const Problem& problem, bool chunks, bool parts);

/// `parts`: whether the threadgroups that share an element of the mask's gradient store floats.
Variant variant_of_mask_gradient(const Problem& problem, bool chunks, bool parts);

/// `length`: of the queries, or keys, that the threadgroups of a head share.
KernelPlan make_kernel(const Problem& problem, const std::string& family, const TileChoice& tile,
    const Variant& variant, int64_t heads, int64_t length);

/// Plans the kernel that makes a forward's results of its parts.
void add_forward_merge(const Problem& problem, int64_t parts, Plan& plan);

/// Gives the kernel that makes a mask's map its threadgroups: so many heads of the map, and groups
/// of its blocks.
void set_map_groups(int64_t heads, int64_t blocks, KernelPlan& kernel);

/// Plans the map of what the mask lets through, where there is a mask.
void add_mask_map(const Problem& problem, Plan& plan);

/// The kernel that sums up the parts of dk and dv.
KernelPlan make_key_sums(const Problem& problem);

/// Plans a kernel that knows of the problem only the mask's dtype.
void add_mask_kernel(const Problem& problem, const std::string& family,
    const std::array<uint64_t, 2>& groups, Plan& plan);

/// Plans the mask's gradient from stored dS. `parts`: whether the threadgroups that share a block
/// store floats.
void add_mask_gradient_from_ds(
    const Problem& problem, bool parts, const std::array<uint64_t, 2>& groups, Plan& plan);

/// Plans the sum of the sinks' gradients, where there are sinks.
void add_sink_gradient(const Problem& problem, Plan& plan);

}  // namespace orchard
