// Internal interface between the files of the runtime.
#pragma once
#include "../include/msl/executor.h"
#include "race_shadow.h"

extern "C" {
void msl_resume();       // tail of msl_swap: restores a fiber from the stack pointer
void msl_first_entry();  // first return address of a fiber
[[noreturn]] void msl_lane_main(msl::Lane* lane);
int msl_launch(msl::Launch* launch);
}

namespace msl {

// ---- context_switch.cpp
void* initial_stack(Lane* lane);

inline Lane* current_lane() {
  unsigned long sp;
  asm volatile("mov %%rsp, %0" : "=r"(sp));
  return lane_of(sp);
}

// ---- workers.cpp: what one operating system thread needs to run threadgroups.
struct Worker {
  char* stacks;  // kMaxThreads stacks, each with a guard page
  unsigned char* arena;
  Simdgroup* simdgroups;
  ByteHistory* shadow;
  unsigned shadow_used;  // bytes of the arena whose history is dirty

  Lane* lane(unsigned i) { return lane_of((unsigned long)stacks + (unsigned long)i * kStackBytes); }
  bool owns(unsigned long address) {
    return address - (unsigned long)stacks < (unsigned long)kMaxThreads * kStackBytes;
  }
};
Worker* borrow_worker();
void return_worker(Worker* worker);

// Kinds of simdgroup operations, the low four bits of Simdgroup::operation (msl/cpu_simd.h).
enum : unsigned {
  kShuffle = 1,
  kReduce = 2,
  kSimdgroupBarrier = 3,
  kMatrixProduct = 4,
  kMatrixMemory = 5,
  kScan = 6
};
// Whether Metal defines it for a part of the lanes.
inline bool allows_divergence(unsigned operation) {
  unsigned kind = operation & 15;
  return kind == kShuffle || kind == kReduce || kind == kScan;
}

// ---- report.cpp
enum : unsigned { kMaxReports = 16 };  // further threadgroups are not started
void report(Threadgroup* group, Lane* lane, void* pc, const char* format, ...);
void describe_waiting(Threadgroup* group, char* text, unsigned capacity);

// ---- scheduler.cpp
[[noreturn]] void abort_threadgroup(Threadgroup* group);
void run_threadgroup(Worker& worker, Launch* launch, unsigned number);

// ---- faults.cpp: memory faults and integer traps of kernels become reports.
struct FaultGuard {
  FaultGuard();
  ~FaultGuard();
  void* old_stack[3];  // the thread's previous alternative signal stack
};
void set_fault_target(Worker* worker, Threadgroup* group);

}  // namespace msl
