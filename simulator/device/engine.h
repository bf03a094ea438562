// The border to the engine that compiles and executes Metal source. The engine is Python code, so
// three call-backs are installed at start-up; they take the interpreter lock themselves and may
// be called from any thread, autograd's included. No lock that Python code could wait for may be
// held around them, except the command queue's (see command_block.h).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

extern "C" {

// One bound [[buffer(n)]].
struct SimulatorArgument {
  uint32_t index;
  uint32_t is_tensor;  // 1: device memory, 0: bytes that the kernel may only read
  void* address;       // host address, storage offset applied
  uint64_t nbytes;     // bytes from address to the end of the storage
};

struct SimulatorDispatch {
  int64_t library;
  const char* kernel;
  const SimulatorArgument* arguments;
  uint64_t argument_count;
  uint64_t threads[3];  // the grid in threads, not in threadgroups
  uint64_t group[3];    // threads of one threadgroup
  uint32_t corrupt;     // 1: spoil whatever the kernel wrote (an injected fault)
};

// Each takes a `reply`, to be filled with simulator_reply(): the result in words or the error.
struct SimulatorEngine {
  // Returns the library's id (> 0), replying the kernel names one a line; 0: an error.
  int64_t (*compile)(const char* source, void* reply);
  // Returns the most threads a threadgroup of this kernel may have; 0: an error.
  int64_t (*max_threads)(int64_t library, const char* kernel, void* reply);
  // Returns 1; 0: an error.
  int64_t (*dispatch)(const SimulatorDispatch* dispatch, void* reply);
};

void simulator_install_engine(const SimulatorEngine* engine);
void simulator_reply(void* reply, const char* text);

}  // extern "C"

namespace simulator {

// What the Metal classes hold as MTLLibrary and MTLComputePipelineState. Both live as long as
// the process: a MetalKernelFunction may outlive the library it came from.
struct CompiledLibrary {
  int64_t id;
  std::vector<std::string> kernels;
};
struct Pipeline {
  const CompiledLibrary* library;
  std::string kernel;
  uint64_t max_threads;
};

// Raises c10::SyntaxError if the source does not compile, as PyTorch does on a Mac.
CompiledLibrary* compile_source(const std::string& source);
Pipeline* make_pipeline(const CompiledLibrary& library, const std::string& kernel);
void execute(const SimulatorDispatch& dispatch);

}  // namespace simulator
