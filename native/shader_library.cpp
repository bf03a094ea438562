#include "shader_library.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim_mps.h>
#include <unistd.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>

#include "shader_text.h"

namespace orchard {
namespace {

using Function = AOTIMetalKernelFunctionHandle;
using SetArgBytes = AOTITorchError (*)(Function, unsigned, const void*, uint64_t);

// torch 2.10 ... 2.13 export the C++ method that the later C shim wraps; the handle is its object.
#ifdef __APPLE__
constexpr const char* kSetArgMethod = "_ZN2at6native3mps19MetalKernelFunction6setArgEjPKvy";
#else
constexpr const char* kSetArgMethod = "_ZN2at6native3mps19MetalKernelFunction6setArgEjPKvm";
#endif
using SetArgMethod = void (*)(Function, unsigned, const void*, uint64_t);

SetArgMethod set_arg_method() {
  static const auto method = reinterpret_cast<SetArgMethod>(dlsym(RTLD_DEFAULT, kSetArgMethod));
  return method;
}

/// The way in which this torch passes a struct to a kernel, which is looked up once.
SetArgBytes set_arg_bytes() {
  static const SetArgBytes route = [] {
    auto shim = reinterpret_cast<SetArgBytes>(dlsym(RTLD_DEFAULT, "torch_mps_set_arg_bytes"));
    if (shim != nullptr) return shim;
    if (set_arg_method() == nullptr) return SetArgBytes{nullptr};
    return SetArgBytes{[](Function f, unsigned index, const void* data, uint64_t size) {
      try {
        set_arg_method()(f, index, data, size);
        return AOTITorchError{AOTI_TORCH_SUCCESS};
      } catch (...) {
        return AOTITorchError{AOTI_TORCH_FAILURE};
      }
    }};
  }();
  return route;
}

/// A compiled variant, or the reason why it does not compile. That is not tried again.
struct Pipeline {
  std::once_flag compiled;
  Function function = nullptr;
  std::string failure;
  std::atomic<bool> done{false};
  std::mutex encoding;  // torch's function object holds the encoder: one thread at a time
};

void compile(const KernelPlan& kernel, Pipeline& pipeline) {
  const std::string source = shader_text(kernel.family) + kernel.instantiation;
  AOTIMetalShaderLibraryHandle library = nullptr;  // kept for the life of the process
  if (aoti_torch_mps_create_shader_library(source.c_str(), &library) != AOTI_TORCH_SUCCESS) {
    pipeline.failure = "the shader " + kernel.name + " does not compile: " + last_error();
  } else if (aoti_torch_mps_get_kernel_function(library, kernel.name.c_str(), &pipeline.function) !=
             AOTI_TORCH_SUCCESS) {
    pipeline.failure = "the kernel " + kernel.name + " cannot be created: " + last_error();
  }
}

/// The variant's entry; its fields are valid once `compiled` is done.
Pipeline& entry_of(const KernelPlan& kernel) {
  // Never destroyed: threads may still run kernels while the process exits.
  static auto& mutex = *new std::mutex;
  static auto& pipelines = *new std::map<std::string, std::unique_ptr<Pipeline>>;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& entry = pipelines[kernel.name];
  if (entry == nullptr) entry = std::make_unique<Pipeline>();
  return *entry;
}

/// Compiles on first use; meanwhile other threads wait only if they want the same variant.
Pipeline& pipeline_of(const KernelPlan& kernel) {
  Pipeline& pipeline = entry_of(kernel);
  std::call_once(pipeline.compiled, [&] {
    compile(kernel, pipeline);
    pipeline.done = true;
  });
  return pipeline;
}

/// What the command block's callback needs and reports. No exception may leave the callback.
struct Launch {
  const KernelPlan& kernel;
  const std::array<uint64_t, 2>& groups;
  const Bindings& tensors;
  const void* params;
  uint64_t size;
  std::string failure;
};

void encode(Function function, void* user_data) {
  auto& launch = *static_cast<Launch*>(user_data);
  auto ok = [&](AOTITorchError code, const char* step) {
    if (code != AOTI_TORCH_SUCCESS && launch.failure.empty()) {
      launch.failure = std::string(step) + " failed: " + last_error();
    }
    return launch.failure.empty();
  };
  if (!ok(aoti_torch_mps_start_encoding(function), "starting the encoder")) return;
  for (const auto& [index, tensor] : launch.tensors) {
    if (!ok(aoti_torch_mps_set_arg_tensor(function, index, tensor), "binding a tensor")) return;
  }
  if (!ok(set_arg_bytes()(function, kBufferParams, launch.params, launch.size),
          "passing the parameters")) {
    return;
  }
  // The shim counts threads, not threadgroups.
  const uint64_t threads[] = {launch.groups[0] * launch.kernel.threads, launch.groups[1], 1};
  const uint64_t group[] = {launch.kernel.threads, 1, 1};
  ok(aoti_torch_mps_dispatch_array_with_group_size(function, threads, 3, group, 3), "the dispatch");
}

}  // namespace

std::string known_failure(const KernelPlan& kernel) {
  const Pipeline& pipeline = entry_of(kernel);
  return pipeline.done ? pipeline.failure : "";
}

std::string last_error() {
  using What = const char* (*)();
  static const auto what =
      reinterpret_cast<What>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  const char* text = what == nullptr ? nullptr : what();
  return text == nullptr || *text == '\0' ? "torch printed the message on stderr" : text;
}

void dispatch_bytes(const KernelPlan& kernel, const std::array<uint64_t, 2>& groups,
    const Bindings& tensors, const void* params, uint64_t size) {
  static const pid_t owner = getpid();
  if (getpid() != owner) {
    throw std::runtime_error(
        "orchard::flash_attn: this process was forked after the GPU had been used, which Metal "
        "does not survive; start workers with multiprocessing's \"spawn\" method");
  }
  if (set_arg_bytes() == nullptr) {
    throw MetalError("this torch offers no way to pass a struct to a Metal kernel");
  }
  Pipeline& pipeline = pipeline_of(kernel);
  if (!pipeline.failure.empty()) throw MetalError(pipeline.failure);
  Launch launch{kernel, groups, tensors, params, size, {}};
  const std::lock_guard<std::mutex> lock(pipeline.encoding);
  const AOTITorchError code = aoti_torch_mps_run_command_block(pipeline.function, &encode, &launch);
  if (code != AOTI_TORCH_SUCCESS && launch.failure.empty()) {
    launch.failure = "the command block failed: " + last_error();
  }
  if (!launch.failure.empty()) throw MetalError(kernel.name + ": " + launch.failure);
}

}  // namespace orchard
