// A kernel that reads a wild address or divides an integer by zero must not take the process down:
// the fault handler writes a report and leaves the threadgroup through its scheduler.  This is the
// only protection of plain mode, and it also catches overflows of a lane's stack (guard page).
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstring>
#include <mutex>

#include "runtime.h"

namespace msl {
namespace {

const int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE};
struct sigaction previous[3];
std::mutex install_mutex;

thread_local Worker* target_worker = nullptr;
thread_local Threadgroup* target_group = nullptr;
thread_local void* alternative_stack = nullptr;

void pass_on(int number, siginfo_t* info, void* context) {
  int i = number == SIGSEGV ? 0 : number == SIGBUS ? 1 : 2;
  const struct sigaction& old = previous[i];
  if (old.sa_flags & SA_SIGINFO) return old.sa_sigaction(number, info, context);
  if (old.sa_handler != SIG_DFL && old.sa_handler != SIG_IGN) return old.sa_handler(number);
  signal(number, SIG_DFL);  // the instruction faults again and ends the process as usual
}

void handle(int number, siginfo_t* info, void* raw) {
  auto* context = (ucontext_t*)raw;
  greg_t* registers = context->uc_mcontext.gregs;
  unsigned long sp = registers[REG_RSP];
  if (!target_group || !target_worker->owns(sp)) return pass_on(number, info, raw);
  Threadgroup* group = target_group;
  // A guard page lies at the low end of the stack that overflowed; step back into that stack.
  Lane* lane = lane_of(sp);
  void* pc = (char*)registers[REG_RIP] + 1;  // reports expect a return address
  bool in_stacks = target_worker->owns((unsigned long)info->si_addr);
  if (number == SIGFPE)
    report(group, lane, pc, "integer division by zero or overflow");
  else if (in_stacks)
    report(group, lane, pc, "stack overflow: a thread has %u bytes", kStackBytes - 4096);
  else
    report(group, lane, pc, "memory fault at address %p", info->si_addr);
  group->aborted = true;
  registers[REG_RSP] = (greg_t)group->scheduler_sp;
  registers[REG_RIP] = (greg_t)msl_resume;
}

void install() {
  std::lock_guard<std::mutex> lock(install_mutex);
  for (int i = 0; i < 3; i++) {
    struct sigaction current, ours;
    sigaction(kSignals[i], nullptr, &current);
    if ((current.sa_flags & SA_SIGINFO) && current.sa_sigaction == handle) continue;
    previous[i] = current;
    memset(&ours, 0, sizeof ours);
    ours.sa_sigaction = handle;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(kSignals[i], &ours, nullptr);
  }
}

}  // namespace

// The handler cannot run on the faulting stack, so each thread that runs kernels lends it another.
FaultGuard::FaultGuard() {
  install();
  const unsigned bytes = 1 << 16;
  alternative_stack =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  stack_t mine{}, old{};
  mine.ss_sp = alternative_stack;
  mine.ss_size = bytes;
  sigaltstack(&mine, &old);
  static_assert(sizeof(old) == sizeof(old_stack), "stack_t");
  memcpy(old_stack, &old, sizeof old);
}

FaultGuard::~FaultGuard() {
  stack_t old;
  memcpy(&old, old_stack, sizeof old);
  if (!old.ss_sp) old.ss_flags = SS_DISABLE;
  sigaltstack(&old, nullptr);
  munmap(alternative_stack, 1 << 16);
}

void set_fault_target(Worker* worker, Threadgroup* group) {
  target_worker = worker;
  target_group = group;
}

}  // namespace msl
