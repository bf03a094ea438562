// Fault injection: tests arm rules ("the 3rd dispatch fails"), the device asks before each step.
#pragma once

#include <cstdint>

namespace simulator {

// The numbers are the contract with faults.py.
enum class Fault : int32_t {
  kCompile = 0,          // compiling a shader library
  kFunction = 1,         // making a pipeline from one of its functions
  kDispatch = 2,         // dispatching a kernel
  kAllocate = 3,         // allocating device memory
  kCorruptDispatch = 4,  // a dispatch that reports success and leaves garbage
};

// Counts one event of this kind for every armed rule; true if a rule wants this event to fail.
bool fault_is_due(Fault kind);

}  // namespace simulator
