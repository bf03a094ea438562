#include "faults.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <vector>

namespace simulator {
namespace {

struct FaultRule {
  int64_t id;
  Fault kind;
  int64_t nth;   // fail the nth event since the rule was armed; 0: every event
  int64_t seen;  // events of this kind since then
};

std::mutex fault_mutex;
std::vector<FaultRule> fault_rules;
int64_t next_fault_id = 1;
std::atomic<bool> any_fault_armed{false};  // keeps the usual case free of the lock

}  // namespace

bool fault_is_due(Fault kind) {
  if (!any_fault_armed.load(std::memory_order_relaxed)) return false;
  std::lock_guard<std::mutex> lock(fault_mutex);
  bool due = false;
  for (auto& rule : fault_rules) {
    if (rule.kind != kind) continue;
    ++rule.seen;
    due |= rule.nth == 0 || rule.seen == rule.nth;
  }
  return due;
}

}  // namespace simulator

extern "C" {

int64_t simulator_arm_fault(int32_t kind, int64_t nth) {
  using namespace simulator;
  std::lock_guard<std::mutex> lock(fault_mutex);
  fault_rules.push_back({next_fault_id, static_cast<Fault>(kind), nth, 0});
  any_fault_armed = true;
  return next_fault_id++;
}

void simulator_disarm_fault(int64_t id) {
  using namespace simulator;
  std::lock_guard<std::mutex> lock(fault_mutex);
  std::erase_if(fault_rules, [&](const FaultRule& rule) { return rule.id == id; });
  any_fault_armed = !fault_rules.empty();
}

}  // extern "C"
