// Text from parts.
#pragma once

#include <sstream>
#include <string>

namespace orchard {

template <typename... Parts>
std::string join(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace orchard
