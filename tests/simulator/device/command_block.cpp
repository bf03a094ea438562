#include "command_block.h"

#include <c10/util/Exception.h>

#include <atomic>
#include <mutex>

namespace simulator {
namespace {

thread_local uint64_t this_threads_block = 0;

}  // namespace

bool in_command_block() { return this_threads_block != 0; }
uint64_t current_command_block() { return this_threads_block; }

void run_command_block(const std::function<void()>& body) {
  static std::mutex queue;
  static std::atomic<uint64_t> blocks{0};
  TORCH_CHECK(!in_command_block(),
      "simulator: runCommandBlock() inside a command block; on a Mac this deadlocks");
  std::lock_guard<std::mutex> turn(queue);
  struct Scope {
    explicit Scope(uint64_t block) { this_threads_block = block; }
    ~Scope() { this_threads_block = 0; }
  } scope(++blocks);
  body();
}

}  // namespace simulator
