// torch_mps_set_arg_bytes, the stable C shim that torch 2.14 added. A library of its own, loaded
// on request, so that both generations of torch can be acted out on torch 2.13.
#include <ATen/native/mps/MetalShaderLibrary.h>
#include <torch/csrc/inductor/aoti_torch/c/shim_mps.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>

extern "C" AOTITorchError torch_mps_set_arg_bytes(
    AOTIMetalKernelFunctionHandle kernel, unsigned index, const void* data, uint64_t size) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    reinterpret_cast<at::native::mps::MetalKernelFunction*>(kernel)->setArg(index, data, size);
  });
}
