// The end of a process: what must be over before Python's interpreter goes.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/anomaly_mode.h>

#include <atomic>
#include <chrono>
#include <future>
#include <thread>

#include "exit.h"

namespace simulator {
namespace {

std::atomic<bool> worker_may_run{false};

// A small backward pass by the autograd worker of the device. When the worker takes it, whatever it
// did before is over and released.
void pass_through_autograd() {
  at::Tensor leaf = at::ones({}, at::TensorOptions(at::kMPS)).requires_grad_();
  leaf.view({1}).backward();
}

}  // namespace

void note_device_worker() { worker_may_run = true; }

}  // namespace simulator

// When backward() returns, autograd's worker still releases the finished graph, and with it Python
// objects. Should it ask for the interpreter while that is torn down, Python ends the thread, and
// C++ then the process: status 134. So this waits until the worker has released all. (A thread of
// its own: its state, which the graph keeps, has no Python objects that the worker would release.)
extern "C" void simulator_settle_autograd() {
  if (!simulator::worker_may_run) return;
  torch::autograd::AnomalyMode::set_enabled(false);  // it would keep Python's stack
  std::promise<void> passed;
  std::future<void> over = passed.get_future();
  std::thread([passed = std::move(passed)]() mutable {
    try {
      simulator::pass_through_autograd();
    } catch (...) {
      // After a fork, for instance: then this process has no worker.
    }
    passed.set_value();
  }).detach();
  // A worker that is stuck must not keep the process from its end.
  over.wait_for(std::chrono::seconds(10));
}
