#include "unexecuted.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <deque>
#include <mutex>
#include <string>
#include <vector>

namespace simulator {
namespace {

// A long run keeps the last ones.
constexpr size_t kMaxRecorded = 10'000;

struct Recorded {
  const char* kernel;  // the pipeline's, which lives as long as the process
  std::array<uint64_t, 3> threads, group;
  std::vector<SimulatorArgument> arguments;
};

std::atomic<bool> recording_on{false};
std::mutex recorded_mutex;
std::deque<Recorded> recorded_launches;

}  // namespace

bool only_recording() { return recording_on.load(std::memory_order_relaxed); }

void record(const SimulatorDispatch& dispatch) {
  Recorded launch{
      dispatch.kernel, {}, {}, {dispatch.arguments, dispatch.arguments + dispatch.argument_count}};
  std::copy_n(dispatch.threads, 3, launch.threads.begin());
  std::copy_n(dispatch.group, 3, launch.group.begin());
  std::lock_guard<std::mutex> lock(recorded_mutex);
  if (recorded_launches.size() == kMaxRecorded) recorded_launches.pop_front();
  recorded_launches.push_back(std::move(launch));
}

}  // namespace simulator

extern "C" {

// 1: record and do not execute; 0: execute again.
void simulator_set_only_recording(int32_t wanted) { simulator::recording_on = wanted != 0; }

// The recorded dispatches, one a line, and forgets them: kernel, six sizes, then
// index:nbytes:is_tensor for each argument. Valid until the thread asks again.
const char* simulator_take_recorded() {
  thread_local std::string text;
  text.clear();
  std::lock_guard<std::mutex> lock(simulator::recorded_mutex);
  for (const auto& launch : simulator::recorded_launches) {
    text += launch.kernel;
    for (auto size : launch.threads) text += " " + std::to_string(size);
    for (auto size : launch.group) text += " " + std::to_string(size);
    for (const auto& argument : launch.arguments) {
      text += " " + std::to_string(argument.index) + ":" + std::to_string(argument.nbytes) + ":" +
              std::to_string(argument.is_tensor);
    }
    text += "\n";
  }
  simulator::recorded_launches.clear();
  return text.c_str();
}

}  // extern "C"
