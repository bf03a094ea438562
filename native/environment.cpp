#include "environment.h"

#include <cctype>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>

#include "machine.h"
#include "plan/join.h"

#ifdef __APPLE__
extern "C" char*** _NSGetEnviron(void);
#else
extern "C" char** environ;
#endif

namespace orchard {
namespace {

bool begins_with(const char* text, const char* prefix) {
  while (*prefix != '\0' && *text == *prefix) text++, prefix++;
  return *prefix == '\0';
}

/// "NAME=value" each, and a null pointer behind the last.
char** entries() {
#ifdef __APPLE__
  return *_NSGetEnviron();  // a library has no `environ` there
#else
  return environ;
#endif
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

const std::array<const char*, Environment::kCount> Environment::kNames = {"ORCHARD_DEBUG",
    "ORCHARD_DEBUG_FLASHATN", "ORCHARD_DISABLE_METAL", "ORCHARD_STRICT", "PYTORCH_MPS_FAST_MATH",
    "ORCHARD_BACKWARD_SCRATCH_MB", "ORCHARD_GPU_CORES", "ORCHARD_TILES"};

Environment::Environment() {
  for (char** entry = entries(); entry != nullptr && *entry != nullptr; entry++) {
    const char* text = *entry;
    if (text[0] != 'O' && text[0] != 'P') continue;  // the least that passes over the others
    if (!begins_with(text, "ORCHARD_") && !begins_with(text, "PYTORCH_MPS_")) continue;
    for (size_t i = 0; i < kCount; i++) {
      const size_t length = std::strlen(kNames[i]);
      if (std::strncmp(text, kNames[i], length) != 0 || text[length] != '=') continue;
      if (values_[i].empty()) values_[i] = text + length + 1;
    }
  }
}

bool Environment::switched_on(Variable variable) const {
  const std::string& value = values_[variable];
  if (value.empty()) return false;
  const std::string word = trimmed_lower(value);
  for (const char* on : {"1", "true", "yes", "on"}) {
    if (word == on) return true;
  }
  for (const char* off : {"", "0", "false", "no", "off"}) {
    if (word == off) return false;
  }
  refuse(kNames[variable], "1, true, yes or on, or 0, false, no or off", value);
}

std::optional<int64_t> Environment::whole_number(
    Variable variable, int64_t least, const char* wanted) const {
  const std::string digits = trimmed_lower(values_[variable]);
  if (digits.empty()) return std::nullopt;
  const bool decimal = digits.find_first_not_of("0123456789") == std::string::npos;
  const long long number = decimal ? std::strtoll(digits.c_str(), nullptr, 10) : -1;
  if (number < least || number >= (1LL << 40)) refuse(kNames[variable], wanted, values_[variable]);
  return number;
}

bool Environment::debug_enabled() const { return switched_on(kDebug) || switched_on(kDebugOlder); }

bool Environment::metal_disabled() const { return switched_on(kDisableMetal); }

bool Environment::strict() const { return switched_on(kStrict); }

bool Environment::torch_fast_math() const {
  const std::string& value = values_[kFastMath];
  return !value.empty() && value != "0";
}

int64_t Environment::scratch_bytes() const {
  const auto megabytes = whole_number(kScratch, 0, "a whole number of MiB, from 0 to below 2^40");
  return megabytes.has_value() ? *megabytes << 20 : machine().scratch_bytes;
}

int64_t Environment::gpu_cores() const {
  const auto cores = whole_number(kCores, 1, "a whole number, from 1 to below 2^40");
  return cores.value_or(machine().gpu_cores);
}

const std::string& Environment::chosen_tiles() const {
  const std::string& text = values_[kTiles];
  if (text.empty()) return text;  // a stream would cost more than all checks
  std::istringstream entries(text);
  for (std::string entry; std::getline(entries, entry, ',');) {
    if (entry.rfind("attention_forward=", 0) != 0) {
      refuse(kNames[kTiles], "attention_forward=TILE", text);
    }
  }
  return text;
}

}  // namespace orchard
