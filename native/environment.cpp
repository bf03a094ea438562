#include "environment.h"

#include <cctype>
#include <cstdlib>
#include <sstream>
#include <stdexcept>

#include "plan/join.h"

namespace orchard {
namespace {

std::string env_text(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

[[noreturn]] void refuse(const char* name, const char* wanted, const std::string& got) {
  throw std::runtime_error(
      join("orchard::flash_attn: ", name, " must be ", wanted, "; got '", got, "'"));
}

bool is_space(char c) { return std::isspace(static_cast<unsigned char>(c)) != 0; }

std::string trimmed_lower(const std::string& text) {
  size_t begin = 0, end = text.size();
  while (begin < end && is_space(text[begin])) begin++;
  while (begin < end && is_space(text[end - 1])) end--;
  std::string word = text.substr(begin, end - begin);
  for (char& c : word) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return word;
}

}  // namespace

bool switched_on(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr || *value == '\0') return false;
  const std::string word = trimmed_lower(value);
  for (const char* on : {"1", "true", "yes", "on"}) {
    if (word == on) return true;
  }
  for (const char* off : {"", "0", "false", "no", "off"}) {
    if (word == off) return false;
  }
  refuse(name, "1, true, yes or on, or 0, false, no or off", value);
}

bool debug_enabled() {
  return switched_on("ORCHARD_DEBUG") || switched_on("ORCHARD_DEBUG_FLASHATN");
}

bool torch_fast_math() {
  const std::string value = env_text("PYTORCH_MPS_FAST_MATH");
  return !value.empty() && value != "0";
}

int64_t scratch_bytes() {
  constexpr int64_t kDefaultMiB = 256;
  const std::string text = env_text("ORCHARD_BACKWARD_SCRATCH_MB");
  if (text.empty()) return kDefaultMiB << 20;
  char* end = nullptr;
  const long long mib = std::strtoll(text.c_str(), &end, 10);
  if (*end != '\0' || mib < 0 || mib >= (1LL << 40)) {
    refuse("ORCHARD_BACKWARD_SCRATCH_MB", "a whole number of MiB, 0 or more", text);
  }
  return static_cast<int64_t>(mib) << 20;
}

std::string chosen_tiles() {
  const std::string text = env_text("ORCHARD_TILES");
  if (text.empty()) return text;  // a stream would cost more than all checks
  std::istringstream entries(text);
  for (std::string entry; std::getline(entries, entry, ',');) {
    if (entry.rfind("attention_forward=", 0) != 0) {
      refuse("ORCHARD_TILES", "attention_forward=TILE", text);
    }
  }
  return text;
}

}  // namespace orchard
