// Runs one threadgroup: a lane runs until it waits at a simdgroup operation or a threadgroup
// barrier, then another one that can run is chosen: the next lane of the same simdgroup if
// possible, or any (random schedule).  Every wait is a stack switch, so nothing here needs a lock.
#include <cstring>
#include <mutex>

#include "runtime.h"

namespace msl {
namespace {

std::mutex counters_mutex;

unsigned next_random(Threadgroup* group) {
  unsigned x = group->random;
  x ^= x << 13;
  x ^= x >> 17;
  x ^= x << 5;
  return group->random = x;
}

unsigned runnable(const Simdgroup* s) { return s->live & ~s->arrived & ~s->at_barrier; }

Lane* choose(Threadgroup* group, Simdgroup* s, unsigned candidates, unsigned after) {
  unsigned first = group->launch->random_schedule ? next_random(group) & 31 : after + 1;
  unsigned preferred = first > 31 ? 0 : candidates >> first << first;
  return s->lanes[__builtin_ctz(preferred ? preferred : candidates)];
}

// Somewhere in the program where a lane of the threadgroup waits.
void* waiting_place(const Threadgroup* group) {
  for (unsigned i = 0; i < group->simdgroup_count; i++) {
    const Simdgroup& s = group->simdgroups[i];
    if (unsigned lanes = s.arrived | s.at_barrier) return s.lanes[__builtin_ctz(lanes)]->wait_pc;
  }
  return nullptr;
}

[[noreturn]] void fail_waiting(Threadgroup* group, Lane* lane, const char* what) {
  char waiting[800];
  describe_waiting(group, waiting, sizeof waiting);
  void* pc = lane->wait_pc ? lane->wait_pc : waiting_place(group);
  report(group, lane, pc, "%s%s", what, waiting);
  abort_threadgroup(group);
}

// The current lane cannot go on; its stack pointer is saved at *save.
void reschedule(Lane* lane, void** save) {
  Threadgroup* group = lane->group;
  Simdgroup* own = lane->simdgroup;
  group->counters.switches++;
  if (unsigned candidates = runnable(own)) {
    msl_swap(save, choose(group, own, candidates, lane->lane)->sp);
    return;
  }
  if (own->arrived && own->arrived != own->live) {
    if (!allows_divergence(own->operation))
      fail_waiting(group, lane,
          "divergence: a simdgroup operation is not reached by all lanes of its simdgroup");
    // The other lanes wait at a threadgroup barrier, so the operation is one of these lanes alone.
    group->counters.divergent_simd_ops++;
    own->completes = 1;
    Lane* first = own->lanes[__builtin_ctz(own->arrived)];
    if (first != lane) msl_swap(save, first->sp);
    return;
  }
  unsigned first = group->launch->random_schedule ? next_random(group) : own->index + 1;
  for (unsigned k = 0; k < group->simdgroup_count; k++) {
    Simdgroup* s = &group->simdgroups[(first + k) % group->simdgroup_count];
    if (unsigned candidates = runnable(s)) {
      msl_swap(save, choose(group, s, candidates, 31)->sp);
      return;
    }
  }
  fail_waiting(group, lane, "deadlock: no thread can run");
}

unsigned all_lanes(const Threadgroup* group, unsigned simdgroup) {
  unsigned first = simdgroup * kSimdWidth, n = group->threads - first;
  return n >= kSimdWidth ? ~0u : (1u << n) - 1;
}

void release_barrier(Threadgroup* group) {
  bool orders = group->barrier_flags & kMemThreadgroup;
  for (unsigned i = 0; i < group->simdgroup_count; i++) {
    group->simdgroups[i].at_barrier = 0;
    if (orders) group->simdgroups[i].epoch++;
  }
  group->simdgroups_at_barrier = group->threads_at_barrier = 0;
  if (orders) group->epoch++;
}

// ---- setting a threadgroup up

void place(Worker& worker, Launch* launch, unsigned number, Threadgroup* group) {
  const unsigned* n = launch->groups;
  group->position[0] = number % n[0];
  group->position[1] = number / n[0] % n[1];
  group->position[2] = number / n[0] / n[1];
  group->threads = 1;
  for (int i = 0; i < 3; i++) {
    unsigned rest = launch->threads[i] - group->position[i] * launch->group[i];
    group->size[i] = rest < launch->group[i] ? rest : launch->group[i];
    group->threads *= group->size[i];
  }
  group->simdgroup_count = group->live_simdgroups = (group->threads + kSimdWidth - 1) / kSimdWidth;
  group->launch = launch;
  group->arena = worker.arena;
  group->simdgroups = worker.simdgroups;
  group->random = (launch->seed * 2654435761u + number * 40503u) | 1;
  group->epoch = 1;
}

// Fills the arena with NaN and forgets the history of its bytes.
void reset_memory(Worker& worker, Launch* launch, Threadgroup* group) {
  unsigned peak = __atomic_load_n(&launch->arena_peak, __ATOMIC_RELAXED);
  unsigned used = peak ? peak + 4096 : kArenaBytes;
  memset(worker.arena, 0xFF, used < kArenaBytes ? used : kArenaBytes);
  if (!launch->check) return;
  group->shadow = worker.shadow;
  memset((void*)worker.shadow, 0, worker.shadow_used * sizeof(ByteHistory));
  worker.shadow_used = 0;
}

// 64 bytes between variables belong to nobody, so that check mode notices an overrun.
unsigned char* allocate(
    Threadgroup* group, unsigned bytes, unsigned align, unsigned id, const char* name) {
  if (align < 16) align = 16;
  unsigned begin = (group->arena_used + align - 1) & ~(align - 1);
  group->memory_bytes += (bytes + 15) & ~15u;
  if (group->memory_bytes > kThreadgroupMemoryLimit) return nullptr;
  if (group->variable_count == kMaxThreadgroupVariables) return nullptr;
  group->variables[group->variable_count++] = {name, id, begin, begin + bytes};
  group->arena_used = begin + bytes + 64;
  return group->arena + begin;
}

bool place_arguments(Launch* launch, Threadgroup* group) {
  for (unsigned i = 0; i < kMaxBuffers; i++) {
    if (!launch->threadgroup_bytes[i]) continue;
    group->arguments[i] = allocate(group, launch->threadgroup_bytes[i], 16, i, nullptr);
    if (!group->arguments[i]) return false;
  }
  return true;
}

void make_lanes(Worker& worker, Threadgroup* group) {
  for (unsigned i = 0; i < group->threads; i++) {
    Lane* lane = worker.lane(i);
    unsigned l = i % kSimdWidth, quad = l / 4;
    Simdgroup* s = &worker.simdgroups[i / kSimdWidth];
    if (l == 0) {
      s->live = s->arrived = s->at_barrier = s->completes = s->epoch = 0;
      s->index = i / kSimdWidth;
      s->group = group;
    }
    s->live |= 1u << l;
    s->lanes[l] = lane;
    // Apple's layout of an 8x8 matrix, as MLX and PyTorch compute it.
    unsigned row = (quad & 4) + l / 2 % 4, column = (quad & 2) * 2 + l % 2 * 2;
    *lane = {nullptr, s, group, &group->counters, nullptr, l, i, row * 8 + column};
    lane->sp = initial_stack(lane);
  }
}

void add_counters(Launch* launch, Threadgroup* group) {
  std::lock_guard<std::mutex> lock(counters_mutex);
  auto* total = (unsigned long*)&launch->counters;
  auto* mine = (const unsigned long*)&group->counters;
  for (unsigned i = 0; i < sizeof(Counters) / sizeof(long); i++) total[i] += mine[i];
  if (launch->memory_bytes < group->memory_bytes) launch->memory_bytes = group->memory_bytes;
  if (launch->arena_peak < group->arena_used)
    __atomic_store_n(&launch->arena_peak, group->arena_used, __ATOMIC_RELAXED);
}

}  // namespace

void abort_threadgroup(Threadgroup* group) {
  void* abandoned;
  group->aborted = true;
  msl_swap(&abandoned, group->scheduler_sp);
  __builtin_unreachable();
}

void run_threadgroup(Worker& worker, Launch* launch, unsigned number) {
  Threadgroup group;
  memset(&group, 0, sizeof group);
  place(worker, launch, number, &group);
  reset_memory(worker, launch, &group);
  if (place_arguments(launch, &group)) {
    make_lanes(worker, &group);
    set_fault_target(&worker, &group);
    unsigned first = launch->random_schedule ? next_random(&group) % group.simdgroup_count : 0;
    Simdgroup* s = &worker.simdgroups[first];
    msl_swap(&group.scheduler_sp, choose(&group, s, s->live, 31)->sp);
    set_fault_target(nullptr, nullptr);
  } else {
    report(&group, nullptr, nullptr, "threadgroup memory above %u bytes", kThreadgroupMemoryLimit);
  }
  unsigned dirty = group.arena_used + 64;
  if (launch->check) worker.shadow_used = dirty < kArenaBytes ? dirty : kArenaBytes;
  group.counters.threadgroups = 1;
  group.counters.threads = group.threads;
  add_counters(launch, &group);
}

}  // namespace msl

using namespace msl;

extern "C" {

void msl_wait(Lane* lane) { reschedule(lane, &lane->sp); }

void msl_threadgroup_barrier(Lane* lane, unsigned flags) {
  Threadgroup* group = lane->group;
  Simdgroup* s = lane->simdgroup;
  void* pc = lane->wait_pc = __builtin_return_address(0);
  group->counters.threadgroup_barriers++;
  if (group->threads_at_barrier++ == 0)
    group->barrier_flags = flags;
  else if (group->barrier_flags != flags)
    msl_fail(lane, pc, "threads meet at different threadgroup_barriers (mem_flags %u and %u)",
        flags, group->barrier_flags);
  s->at_barrier |= 1u << lane->lane;
  if (s->at_barrier == s->live && ++group->simdgroups_at_barrier == group->live_simdgroups) {
    if (group->live_simdgroups != group->simdgroup_count || s->live != all_lanes(group, s->index))
      msl_fail(lane, pc, "threadgroup_barrier: some threads have already returned");
    release_barrier(group);
    return;
  }
  reschedule(lane, &lane->sp);
}

void* msl_threadgroup_variable(
    Lane* lane, unsigned bytes, unsigned align, unsigned id, const char* name) {
  Threadgroup* group = lane->group;
  for (unsigned i = 0; i < group->variable_count; i++) {
    ThreadgroupVariable& v = group->variables[i];
    if (v.name && v.id == id && v.end - v.begin == bytes) return group->arena + v.begin;
  }
  void* storage = allocate(group, bytes, align, id, name);
  if (!storage)
    msl_fail(lane, __builtin_return_address(0),
        "threadgroup memory: %u bytes with '%s'; the limit is %u bytes (and %u variables)",
        group->memory_bytes, name, kThreadgroupMemoryLimit, kMaxThreadgroupVariables);
  return storage;
}

// A lane's life.  When it returns, the others may have been waiting only for it.
void msl_lane_main(Lane* lane) {
  Threadgroup* group = lane->group;
  Simdgroup* s = lane->simdgroup;
  void* dead;
  group->launch->entry(lane);
  s->live &= ~(1u << lane->lane);
  lane->wait_pc = nullptr;
  if (s->arrived &&
      s->arrived == s->live) {  // it was the last: another one carries the operation out
    s->completes = 1;
    group->counters.switches++;
    msl_swap(&dead, s->lanes[__builtin_ctz(s->live)]->sp);
    __builtin_unreachable();
  }
  if (!s->live && --group->live_simdgroups == 0) {
    msl_swap(&dead, group->scheduler_sp);
    __builtin_unreachable();
  }
  bool group_waits = !s->live && group->simdgroups_at_barrier == group->live_simdgroups;
  bool simdgroup_waits = s->live && s->at_barrier == s->live;
  if (group_waits || simdgroup_waits)
    fail_waiting(group, lane, "threadgroup_barrier: this thread has returned without reaching it");
  reschedule(lane, &dead);
  __builtin_unreachable();
}

}  // extern "C"
