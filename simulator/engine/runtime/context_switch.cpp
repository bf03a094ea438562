// Fiber switch for x86-64 (System V ABI): ten instructions, no signal mask.
#include "runtime.h"

asm(R"(
.text
.globl msl_swap
.type msl_swap,@function
msl_swap:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp,(%rdi)
  mov %rsi,%rsp
.globl msl_resume
.type msl_resume,@function
msl_resume:
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret

.globl msl_first_entry
.type msl_first_entry,@function
msl_first_entry:
  mov %rbx,%rdi
  call msl_lane_main
  ud2
)");

namespace msl {

// Lays out a new lane's stack so that the first switch to it enters msl_lane_main(lane).
void* initial_stack(Lane* lane) {
  void** sp = (void**)((unsigned long)lane & ~63ul) - 9;  // r15 r14 r13 r12 rbx rbp, return address
  for (int i = 0; i < 9; i++) sp[i] = nullptr;
  sp[4] = lane;
  sp[6] = (void*)msl_first_entry;
  return sp;
}

}  // namespace msl
