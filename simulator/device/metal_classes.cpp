// The classes of ATen/native/mps/MetalShaderLibrary.h. Linux libtorch declares them and does not
// define them; extensions find these definitions when the library is loaded RTLD_GLOBAL.
#include <ATen/core/Tensor.h>
#include <ATen/native/mps/MetalShaderLibrary.h>
#include <c10/metal/error.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <memory>

#include "command_block.h"
#include "engine.h"
#include "handle.h"

namespace simulator {
namespace {

constexpr unsigned kMaxBuffers = 31;        // Metal's argument table
constexpr uint64_t kMaxInlineBytes = 4096;  // Metal's limit for setBytes
constexpr uint64_t kSimdWidth = 32;

// What MetalKernelFunction holds as its command encoder: the arguments bound so far. They stay
// bound from one dispatch to the next. startEncoding() begins with none, which is stricter than
// Metal, where a kernel inherits whatever an earlier one left bound in the same encoder.
struct Encoder {
  struct Bound {
    SimulatorArgument argument{};
    std::vector<char> bytes;  // the copy that setBytes makes
  };
  std::map<unsigned, Bound> bound;
  uint64_t block = current_command_block();
  // For kernels that report errors in words (c10/metal/error.h).
  std::unique_ptr<c10::metal::ErrorMessages> errors;
};

Encoder& open_encoder(void* encoder) {
  auto* open = static_cast<Encoder*>(encoder);
  TORCH_CHECK(open && in_command_block() && open->block == current_command_block(),
      "simulator: setArg() and dispatch() need startEncoding() in the same "
      "runCommandBlock()");
  return *open;
}

Encoder::Bound& slot(Encoder& encoder, unsigned index) {
  TORCH_CHECK(
      index < kMaxBuffers, "simulator: buffer index ", index, ", but Metal has ", kMaxBuffers);
  return encoder.bound[index] = Encoder::Bound{};
}

const Pipeline& pipeline_of(void* state) { return *static_cast<Pipeline*>(state); }

void raise_reported_errors(Encoder& encoder) {
  if (!encoder.errors || encoder.errors->count == 0) return;
  const auto& first = encoder.errors->msg[0];
  const auto text =
      c10::str(first.func, ": ", first.message, " (", first.file, ":", first.line, ")");
  encoder.errors->count = 0;
  // On a Mac this comes at the next synchronisation; here every dispatch is followed by one.
  throw c10::AcceleratorError({__func__, __FILE__, __LINE__}, 1, text);
}

using Size3 = std::array<uint64_t, 3>;

void dispatch_threads(const Pipeline& pipeline, Encoder& encoder, Size3 threads, Size3 group) {
  TORCH_CHECK_VALUE(group[0] * group[1] * group[2] <= pipeline.max_threads,
      "Threadgroup size exceeds ", pipeline.max_threads, " limit");
  for (int i = 0; i < 3; ++i) {
    TORCH_CHECK(
        threads[i] > 0 && group[i] > 0, "simulator: dispatch of size zero, ", pipeline.kernel);
  }
  std::vector<SimulatorArgument> arguments;
  for (auto& [index, bound] : encoder.bound) arguments.push_back(bound.argument);
  SimulatorDispatch dispatch{};
  dispatch.library = pipeline.library->id;
  dispatch.kernel = pipeline.kernel.c_str();
  dispatch.arguments = arguments.data();
  dispatch.argument_count = arguments.size();
  std::copy(threads.begin(), threads.end(), dispatch.threads);
  std::copy(group.begin(), group.end(), dispatch.group);
  execute(dispatch);
  raise_reported_errors(encoder);
}

// PyTorch writes library templates in fmt's notation: {}, {0}, and {{ }} for braces.
std::string substitute(const std::string& text, const std::vector<std::string>& parameters) {
  std::string result;
  size_t next = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const bool brace = text[i] == '{' || text[i] == '}';
    if (brace && i + 1 < text.size() && text[i + 1] == text[i]) {
      result += text[i++];
    } else if (text[i] == '{') {
      const size_t close = text.find('}', i);
      const auto position = text.substr(i + 1, close - i - 1);
      result += parameters.at(position.empty() ? next++ : std::stoul(position));
      i = close;
    } else {
      result += text[i];
    }
  }
  return result;
}

}  // namespace
}  // namespace simulator

namespace at::native::mps {

using namespace simulator;

void* get_tensor_gpu_address(const at::TensorBase& tensor) {
  TORCH_CHECK(tensor.is_mps());
  return host_of(tensor.const_data_ptr());
}

// --------------------------------------------------------------------------- MetalKernelFunction

MetalKernelFunction::MetalKernelFunction(MTLComputePipelineState_t state, MTLFunction_t function)
    : cps(state), func(function) {}
MetalKernelFunction::~MetalKernelFunction() { delete static_cast<Encoder*>(encoder); }

uint64_t MetalKernelFunction::getMaxThreadsPerThreadgroup() const {
  return pipeline_of(cps).max_threads;
}
uint64_t MetalKernelFunction::getThreadExecutionWidth() const { return kSimdWidth; }
uint64_t MetalKernelFunction::getStaticThreadGroupMemoryLength() const { return 0; }

void MetalKernelFunction::runCommandBlock(std::function<void(void)> body) {
  run_command_block(body);
}

void MetalKernelFunction::startEncoding() {
  TORCH_CHECK(in_command_block(), "simulator: startEncoding() outside runCommandBlock()");
  delete static_cast<Encoder*>(encoder);
  encoder = new Encoder();
}

void MetalKernelFunction::setArg(unsigned index, const at::TensorBase& tensor) {
  auto& open = open_encoder(encoder);
  if (tensor.is_cpu()) {  // a number in a 0-dim CPU tensor travels as bytes
    TORCH_CHECK(tensor.dim() == 0, "Passed CPU tensor to MPS op");
    if (tensor.scalar_type() == at::kDouble) {
      const auto narrowed = static_cast<float>(*tensor.const_data_ptr<double>());
      return setArg(index, &narrowed, sizeof narrowed);
    }
    return setArg(index, tensor.const_data_ptr(), tensor.element_size());
  }
  TORCH_CHECK(tensor.is_mps(), "Placeholder storage has not been allocated on MPS device!");
  auto& bound = slot(open, index);
  keep_until_block_ends(at::Tensor(tensor));
  bound.argument = {index, /*is_tensor=*/1, nullptr, 0};
  const auto& storage = tensor.storage();
  const auto offset = static_cast<size_t>(tensor.storage_offset()) * tensor.element_size();
  if (storage.nbytes() > offset) {
    bound.argument.address = static_cast<char*>(host_of(storage.data())) + offset;
    bound.argument.nbytes = storage.nbytes() - offset;
  }
}

void MetalKernelFunction::setArg(unsigned index, const void* data, uint64_t size) {
  auto& open = open_encoder(encoder);
  TORCH_CHECK(size > 0, "simulator: setBytes of no bytes");
  TORCH_CHECK(size <= kMaxInlineBytes, "simulator: setBytes of ", size, " bytes; Metal allows ",
      kMaxInlineBytes);
  auto& bound = slot(open, index);
  bound.bytes.assign(static_cast<const char*>(data), static_cast<const char*>(data) + size);
  bound.argument = {index, /*is_tensor=*/0, bound.bytes.data(), size};
}

void MetalKernelFunction::setErrorBufferIndex(unsigned index) {
  auto& open = open_encoder(encoder);
  if (!open.errors) open.errors = std::make_unique<c10::metal::ErrorMessages>();
  slot(open, index).argument = {index, /*is_tensor=*/1, open.errors.get(), sizeof(*open.errors)};
}

void MetalKernelFunction::dispatch(uint64_t length, std::optional<uint64_t> group) {
  const auto& pipeline = pipeline_of(cps);
  dispatch_threads(pipeline, open_encoder(encoder), {length, 1, 1},
      {group.value_or(std::min(length, pipeline.max_threads)), 1, 1});
}

void MetalKernelFunction::dispatch(
    c10::ArrayRef<uint64_t> length, c10::OptionalArrayRef<uint64_t> group) {
  TORCH_CHECK(!length.empty() && length.size() < 4,
      "Dispatch dimensions must be less than 3 and non-empty");
  TORCH_CHECK(!group.has_value() || group->size() == length.size(),
      "size and group_size must have same number of dimensions");
  const auto& pipeline = pipeline_of(cps);
  const auto three = [](c10::ArrayRef<uint64_t> sizes) {
    Size3 all{1, 1, 1};
    std::copy(sizes.begin(), sizes.end(), all.begin());
    return all;
  };
  dispatch_threads(pipeline, open_encoder(encoder), three(length),
      group.has_value() ? three(*group) : Size3{pipeline.max_threads, 1, 1});
}

// ---------------------------------------------------------------------------- MetalShaderLibrary

MetalShaderLibrary::~MetalShaderLibrary() = default;
DynamicMetalShaderLibrary::~DynamicMetalShaderLibrary() = default;

MetalShaderLibrary& MetalShaderLibrary::getBundledLibrary() {
  TORCH_CHECK(false, "simulator: the Metal kernels bundled with PyTorch are not simulated");
}

MTLLibrary_t MetalShaderLibrary::compileLibrary(const std::string& source) {
  return compile_source(source);
}

MTLLibrary_t MetalShaderLibrary::getLibrary() {
  TORCH_INTERNAL_ASSERT(nparams == 0);
  if (!library) library = compileLibrary(shaderSource);
  return library;
}

MTLLibrary_t MetalShaderLibrary::getLibrary(const std::initializer_list<std::string>& parameters) {
  TORCH_INTERNAL_ASSERT(nparams == parameters.size());
  std::string key;
  for (const auto& parameter : parameters) key += ":" + parameter;
  auto& compiled = libMap[key];
  if (!compiled) compiled = compileLibrary(substitute(shaderSource, parameters));
  return compiled;
}

std::pair<MTLComputePipelineState_t, MTLFunction_t> MetalShaderLibrary::getLibraryPipelineState(
    MTLLibrary_t from, const std::string& name) {
  const auto& compiled = *static_cast<CompiledLibrary*>(from);
  const auto key = std::to_string(compiled.id) + ":" + name;
  if (const auto found = cplMap.find(key); found != cplMap.end()) return found->second;
  void* pipeline = make_pipeline(compiled, name);
  return cplMap[key] = {pipeline, pipeline};
}

std::vector<std::string> MetalShaderLibrary::getFunctionNames() {
  return static_cast<CompiledLibrary*>(getLibrary())->kernels;
}

bool MetalShaderLibrary::hasFunction(const std::string& name) {
  const auto names = getFunctionNames();
  return std::find(names.begin(), names.end(), name) != names.end();
}

std::shared_ptr<MetalKernelFunction> MetalShaderLibrary::getKernelFunction(
    const std::string& name) {
  auto [state, function] = getLibraryPipelineState(getLibrary(), name);
  return std::make_shared<MetalKernelFunction>(state, function);
}

MetalKernelFunction* MetalShaderLibrary::getCachedKernelFunctionPtr(const std::string& name) {
  if (const auto found = kernelCache.find(name); found != kernelCache.end()) {
    return found->second.get();
  }
  auto [state, function] = getLibraryPipelineState(getLibrary(), name);
  return (kernelCache[name] = std::make_unique<MetalKernelFunction>(state, function)).get();
}

}  // namespace at::native::mps
