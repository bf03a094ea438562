// What torch.mps.compile_shader needs, as C functions for ctypes (see shaders.py). Mac builds of
// torch._C bind the Metal classes directly; this gives the same calls the same errors.
#include <ATen/native/mps/MetalShaderLibrary.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>

#include <string>

namespace {

using at::native::mps::DynamicMetalShaderLibrary;
using at::native::mps::MetalKernelFunction;

thread_local std::string last_error;

// The numbers are the contract with shaders.py.
enum Status { kOk, kRuntimeError, kSyntaxError, kValueError, kAcceleratorError };

template <typename Body>
int status_of(const Body& body) {
  const auto failed = [](Status status, const char* text) {
    last_error = text;
    return status;
  };
  try {
    body();
    return kOk;
  } catch (const c10::SyntaxError& error) {
    return failed(kSyntaxError, error.what_without_backtrace());
  } catch (const c10::ValueError& error) {
    return failed(kValueError, error.what_without_backtrace());
  } catch (const c10::AcceleratorError& error) {
    return failed(kAcceleratorError, error.what_without_backtrace());
  } catch (const c10::Error& error) {
    return failed(kRuntimeError, error.what_without_backtrace());
  } catch (const std::exception& error) {
    return failed(kRuntimeError, error.what());
  }
}

}  // namespace

extern "C" {

// Either a tensor or, if that is null, bytes.
struct SimulatorCallArgument {
  AtenTensorHandle tensor;
  const void* bytes;
  uint64_t nbytes;
};

const char* simulator_last_error() { return last_error.c_str(); }

int simulator_create_library(const char* source, void** library) {
  return status_of([&] { *library = new DynamicMetalShaderLibrary(source); });
}

void simulator_delete_library(void* library) {
  delete static_cast<DynamicMetalShaderLibrary*>(library);
}

// Names one a line; valid until the thread asks again.
const char* simulator_function_names(void* library) {
  thread_local std::string names;
  names.clear();
  for (const auto& name : static_cast<DynamicMetalShaderLibrary*>(library)->getFunctionNames()) {
    names += name + "\n";
  }
  return names.c_str();
}

// The kernel belongs to the library.
int simulator_get_kernel(void* library, const char* name, void** kernel) {
  return status_of([&] {
    *kernel = static_cast<DynamicMetalShaderLibrary*>(library)->getCachedKernelFunctionPtr(name);
  });
}

uint64_t simulator_max_threads(void* kernel) {
  return static_cast<MetalKernelFunction*>(kernel)->getMaxThreadsPerThreadgroup();
}

// `group` may be null: the size is then chosen as on a Mac. error_buffer: an index, or -1.
int simulator_call_kernel(void* kernel, const SimulatorCallArgument* arguments, size_t count,
    const uint64_t* threads, const uint64_t* group, size_t dimensions, int64_t error_buffer) {
  return status_of([&] {
    auto& function = *static_cast<MetalKernelFunction*>(kernel);
    function.runCommandBlock([&] {
      function.startEncoding();
      for (size_t i = 0; i < count; ++i) {
        const auto& argument = arguments[i];
        if (argument.tensor) {
          function.setArg(
              i, *torch::aot_inductor::tensor_handle_to_tensor_pointer(argument.tensor));
        } else {
          function.setArg(i, argument.bytes, argument.nbytes);
        }
      }
      if (error_buffer >= 0) function.setErrorBufferIndex(static_cast<unsigned>(error_buffer));
      if (dimensions == 1) {
        function.dispatch(threads[0], group ? std::optional<uint64_t>(group[0]) : std::nullopt);
      } else {
        c10::OptionalArrayRef<uint64_t> group_size;
        if (group) group_size = c10::ArrayRef<uint64_t>(group, dimensions);
        function.dispatch(c10::ArrayRef<uint64_t>(threads, dimensions), group_size);
      }
    });
  });
}

// The address a kernel would see, for lists of tensors passed as an array of pointers.
int simulator_gpu_address(AtenTensorHandle tensor, void** address) {
  return status_of([&] {
    *address = at::native::mps::get_tensor_gpu_address(
        *torch::aot_inductor::tensor_handle_to_tensor_pointer(tensor));
  });
}

}  // extern "C"
