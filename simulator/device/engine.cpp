#include "engine.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <deque>
#include <mutex>
#include <sstream>

#include "faults.h"
#include "unexecuted.h"

namespace simulator {
namespace {

SimulatorEngine engine{};

// Only for the two lists below; never held around a call-back.
std::mutex lists_mutex;

const SimulatorEngine& installed_engine() {
  TORCH_CHECK(engine.compile, "simulator: no engine is installed (call simulator.enable())");
  return engine;
}

// deque: growing it moves nothing.
CompiledLibrary* keep(CompiledLibrary library) {
  static std::deque<CompiledLibrary> libraries;
  std::lock_guard<std::mutex> lock(lists_mutex);
  return &libraries.emplace_back(std::move(library));
}

Pipeline* keep(Pipeline pipeline) {
  static std::deque<Pipeline> pipelines;
  std::lock_guard<std::mutex> lock(lists_mutex);
  return &pipelines.emplace_back(std::move(pipeline));
}

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) lines.push_back(line);
  return lines;
}

}  // namespace

CompiledLibrary* compile_source(const std::string& source) {
  // PyTorch hands the text to Metal with NSASCIIStringEncoding; be sure that it survives.
  const bool ascii =
      std::all_of(source.begin(), source.end(), [](unsigned char c) { return c < 128; });
  TORCH_CHECK(ascii, "simulator: the Metal source is not ASCII");
  if (fault_is_due(Fault::kCompile)) {
    throw c10::SyntaxError({__func__, __FILE__, __LINE__},
        "program_source:1:1: error: compilation failed (simulator: injected fault)");
  }
  std::string reply;
  const int64_t id = installed_engine().compile(source.c_str(), &reply);
  if (id == 0) throw c10::SyntaxError({__func__, __FILE__, __LINE__}, reply);
  return keep(CompiledLibrary{id, lines_of(reply)});
}

Pipeline* make_pipeline(const CompiledLibrary& library, const std::string& kernel) {
  const auto& names = library.kernels;
  TORCH_CHECK(std::find(names.begin(), names.end(), kernel) != names.end(),
      "Failed to create function state object for: ", kernel);
  TORCH_CHECK(!fault_is_due(Fault::kFunction), "Failed to created pipeline state object, error: ",
      "Compiler encountered an internal error (simulator: injected fault)");
  std::string reply;
  const int64_t max_threads = installed_engine().max_threads(library.id, kernel.c_str(), &reply);
  TORCH_CHECK(max_threads > 0, "Failed to created pipeline state object, error: ", reply);
  return keep(Pipeline{&library, kernel, static_cast<uint64_t>(max_threads)});
}

void execute(const SimulatorDispatch& dispatch) {
  TORCH_CHECK(!fault_is_due(Fault::kDispatch),
      "MPS: command buffer exited with error status, while running ", dispatch.kernel,
      ": Internal Error (0000000e:Internal Error) (simulator: injected fault)");
  if (only_recording()) return record(dispatch);
  SimulatorDispatch order = dispatch;
  order.corrupt = fault_is_due(Fault::kCorruptDispatch) ? 1 : 0;
  std::string reply;
  TORCH_CHECK(installed_engine().dispatch(&order, &reply) == 1, reply);
}

}  // namespace simulator

extern "C" {

void simulator_install_engine(const SimulatorEngine* engine) { simulator::engine = *engine; }

void simulator_reply(void* reply, const char* text) { *static_cast<std::string*>(reply) = text; }

}  // extern "C"
