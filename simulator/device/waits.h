// What the CPU of a Mac would wait for: this device is always finished, so waits are counted.
#pragma once

#include <string_view>

namespace simulator {

enum class Wait { kSynchronize, kCopy, kRead };

void count_wait(Wait wait);

// Operators whose result, on the CPU, depends on the data of a tensor.
bool reads_data(std::string_view operator_name);

}  // namespace simulator
