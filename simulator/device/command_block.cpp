#include "command_block.h"

#include <c10/util/Exception.h>

#include <atomic>
#include <mutex>
#include <vector>

namespace simulator {
namespace {

thread_local uint64_t this_threads_block = 0;
thread_local std::vector<at::Tensor> kept_tensors;

}  // namespace

bool in_command_block() { return this_threads_block != 0; }
uint64_t current_command_block() { return this_threads_block; }

void run_command_block(const std::function<void()>& body) {
  static std::mutex queue;
  static std::atomic<uint64_t> blocks{0};
  TORCH_CHECK(!in_command_block(),
      "simulator: runCommandBlock() inside a command block; on a Mac this deadlocks");
  struct FreeTensors {
    ~FreeTensors() { kept_tensors.clear(); }
  } after_the_turn;
  std::lock_guard<std::mutex> turn(queue);
  struct Scope {
    explicit Scope(uint64_t block) { this_threads_block = block; }
    ~Scope() { this_threads_block = 0; }
  } scope(++blocks);
  body();
}

void keep_until_block_ends(at::Tensor tensor) { kept_tensors.push_back(std::move(tensor)); }

}  // namespace simulator
