// The aoti_torch_mps_* C functions of torch/csrc/inductor/aoti_torch/c/shim_mps.h: what code on
// the stable ABI calls. Thin wrappers around the Metal classes; an exception becomes a non-zero
// return code, and its text is in torch_exception_get_what().
#include <ATen/native/mps/MetalShaderLibrary.h>
#include <torch/csrc/inductor/aoti_torch/c/shim_mps.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>

#include <cstring>

#include "handle.h"
#include "memory.h"

namespace {

using at::native::mps::DynamicMetalShaderLibrary;
using at::native::mps::MetalKernelFunction;

MetalKernelFunction* kernel_of(AOTIMetalKernelFunctionHandle handle) {
  return reinterpret_cast<MetalKernelFunction*>(handle);
}
DynamicMetalShaderLibrary* library_of(AOTIMetalShaderLibraryHandle handle) {
  return reinterpret_cast<DynamicMetalShaderLibrary*>(handle);
}

}  // namespace

extern "C" {

// ---------------------------------------------------------------------------------- libraries

AOTITorchError aoti_torch_mps_create_shader_library(
    const char* source, AOTIMetalShaderLibraryHandle* library) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    *library =
        reinterpret_cast<AOTIMetalShaderLibraryHandle>(new DynamicMetalShaderLibrary(source));
  });
}

AOTITorchError aoti_torch_mps_delete_shader_library(AOTIMetalShaderLibraryHandle library) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({ delete library_of(library); });
}

AOTITorchError aoti_torch_mps_get_kernel_function(
    AOTIMetalShaderLibraryHandle library, const char* name, AOTIMetalKernelFunctionHandle* kernel) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    *kernel = reinterpret_cast<AOTIMetalKernelFunctionHandle>(
        library_of(library)->getCachedKernelFunctionPtr(name));
  });
}

// ------------------------------------------------------------------------- encode and dispatch

AOTITorchError aoti_torch_mps_run_command_block(AOTIMetalKernelFunctionHandle kernel,
    aoti_torch_mps_command_block_callback_t body, void* user_data) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE(
      { kernel_of(kernel)->runCommandBlock([&] { body(kernel, user_data); }); });
}

void aoti_torch_mps_shared_callback(AOTIMetalKernelFunctionHandle kernel, void* user_data) {
  (*static_cast<std::function<void(AOTIMetalKernelFunctionHandle)>*>(user_data))(kernel);
}

AOTITorchError aoti_torch_mps_start_encoding(AOTIMetalKernelFunctionHandle kernel) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({ kernel_of(kernel)->startEncoding(); });
}

AOTITorchError aoti_torch_mps_set_arg_tensor(
    AOTIMetalKernelFunctionHandle kernel, unsigned index, AtenTensorHandle tensor) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    kernel_of(kernel)->setArg(index, *torch::aot_inductor::tensor_handle_to_tensor_pointer(tensor));
  });
}

AOTITorchError aoti_torch_mps_set_arg_int(
    AOTIMetalKernelFunctionHandle kernel, unsigned index, int64_t value) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({ kernel_of(kernel)->setArg(index, value); });
}

AOTITorchError aoti_torch_mps_dispatch_single(
    AOTIMetalKernelFunctionHandle kernel, uint64_t length) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({ kernel_of(kernel)->dispatch(length); });
}

AOTITorchError aoti_torch_mps_dispatch_single_with_group_size(
    AOTIMetalKernelFunctionHandle kernel, uint64_t length, uint64_t group) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({ kernel_of(kernel)->dispatch(length, group); });
}

AOTITorchError aoti_torch_mps_dispatch_array(
    AOTIMetalKernelFunctionHandle kernel, const uint64_t* length, size_t length_size) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE(
      { kernel_of(kernel)->dispatch(c10::ArrayRef<uint64_t>(length, length_size)); });
}

AOTITorchError aoti_torch_mps_dispatch_array_with_group_size(AOTIMetalKernelFunctionHandle kernel,
    const uint64_t* length, size_t length_size, const uint64_t* group, size_t group_size) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    kernel_of(kernel)->dispatch(
        c10::ArrayRef<uint64_t>(length, length_size), c10::ArrayRef<uint64_t>(group, group_size));
  });
}

// -------------------------------------------------------------------------------- raw buffers

AOTITorchError aoti_torch_mps_malloc(void** buffer, size_t nbytes) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({ *buffer = simulator::allocate_buffer(nbytes); });
}

AOTITorchError aoti_torch_mps_free(void* buffer) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({ simulator::free_buffer(buffer); });
}

AOTITorchError aoti_torch_mps_memcpy(
    void* buffer, size_t offset, size_t bytes_read, size_t nbytes, uint8_t* source) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    auto* to = static_cast<char*>(simulator::host_of(buffer)) + offset;
    std::memcpy(to, source + bytes_read, nbytes);
  });
}

AOTITorchError aoti_torch_mps_copy_buffer(void* source, void* destination, size_t nbytes,
    size_t source_offset, size_t destination_offset) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    const auto* from = static_cast<char*>(simulator::host_of(source)) + source_offset;
    std::memcpy(
        static_cast<char*>(simulator::host_of(destination)) + destination_offset, from, nbytes);
  });
}

}  // extern "C"
