// The environment variables, read anew by every call: programs change them as they run.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

namespace orchard {

/// What a call asks of the environment, taken from it in one pass: to look up each name would take
/// longer than all checks of the operands.
class Environment {
 public:
  Environment();

  /// ORCHARD_DEBUG or its older name.
  bool debug_enabled() const;

  /// ORCHARD_DISABLE_METAL.
  bool metal_disabled() const;

  /// ORCHARD_STRICT.
  bool strict() const;

  /// PYTORCH_MPS_FAST_MATH, which PyTorch reads. Anything but 0 or an empty value is taken to be
  /// on, since the opposite mistake would give wrong numbers.
  bool torch_fast_math() const;

  /// The memory that a backward may take for dS: the machine's share, unless the user says. 0 is
  /// the low-memory mode.
  int64_t scratch_bytes() const;

  /// The GPU's cores that a plan is made for: the machine's, unless a test says.
  int64_t gpu_cores() const;

  /// The tiles to take instead of the plan's. Only those of the forward can be chosen.
  const std::string& chosen_tiles() const;

 private:
  enum Variable : size_t {
    kDebug,
    kDebugOlder,
    kDisableMetal,
    kStrict,
    kFastMath,
    kScratch,
    kCores,
    kTiles,
    kCount
  };
  static const std::array<const char*, kCount> kNames;

  /// Whether a variable is on: 1, true, yes or on. Unset, empty, 0, false, no and off are off, and
  /// capitals and spaces around make no difference. Anything else raises.
  /// src/orchard_ops/environment.py has the same rule.
  bool switched_on(Variable variable) const;

  /// A variable as a number, if it is set and more than spaces; raises if it is no number of digits
  /// alone, less than `least`, or 2^40 or more. src/orchard_ops/environment.py has the same rule.
  std::optional<int64_t> whole_number(Variable variable, int64_t least, const char* wanted) const;

  std::array<std::string, kCount> values_;  // empty where a variable is not set
};

}  // namespace orchard
