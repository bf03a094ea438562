// The text of the kernels, embedded by embed_shaders.py.
#pragma once

#include <string>

namespace orchard {

/// Self-contained Metal source of a kernel family (its header with every include inlined).
const std::string& shader_text(const std::string& family);

}  // namespace orchard
