// Reports.  A line is "@<offset in the kernel library> <text>"; Python resolves the offset to file
// and line (library.py).
#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>

#include "runtime.h"

namespace msl {
namespace {

std::mutex report_mutex;

void append(Launch* launch, const char* line) {
  unsigned used = strlen(launch->report_text);
  if (used + strlen(line) + 1 < launch->report_capacity) strcpy(launch->report_text + used, line);
}

unsigned long image_offset(Launch* launch, void* pc) {
  bool inside = (const char*)pc >= launch->image_begin && (const char*)pc < launch->image_end;
  return inside ? (const char*)pc - launch->image_begin : 0;
}

void vreport(Threadgroup* group, Lane* lane, void* pc, const char* format, va_list arguments) {
  std::lock_guard<std::mutex> lock(report_mutex);
  Launch* launch = group->launch;
  if (__atomic_fetch_add(&launch->reports, 1, __ATOMIC_RELAXED) >= kMaxReports) return;
  char message[1024], line[1536], who[64] = "";
  vsnprintf(message, sizeof message, format, arguments);
  if (lane) {
    unsigned i = lane->index, *n = group->size;
    snprintf(who, sizeof who, "thread (%u,%u,%u) of ", i % n[0], i / n[0] % n[1], i / n[0] / n[1]);
  }
  snprintf(line, sizeof line, "@0x%lx %sthreadgroup (%u,%u,%u): %s\n", image_offset(launch, pc),
      who, group->position[0], group->position[1], group->position[2], message);
  append(launch, line);
}

const char* operation_name(unsigned operation) {
  switch (operation & 15) {
    case kShuffle:
      return "a shuffle";
    case kReduce:
      return "a reduction";
    case kSimdgroupBarrier:
      return "simdgroup_barrier";
    case kMatrixProduct:
      return "a simdgroup matrix product";
    case kMatrixMemory:
      return "simdgroup_load or simdgroup_store";
    case kScan:
      return "a prefix sum or product";
  }
  return "a simdgroup operation";
}

}  // namespace

void report(Threadgroup* group, Lane* lane, void* pc, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vreport(group, lane, pc, format, arguments);
  va_end(arguments);
}

// Where the lanes of each simdgroup wait, as "@offset" again; for divergence and deadlock reports.
void describe_waiting(Threadgroup* group, char* text, unsigned capacity) {
  unsigned used = 0;
  text[0] = 0;
  for (unsigned i = 0; i < group->simdgroup_count && used + 200 < capacity; i++) {
    Simdgroup& s = group->simdgroups[i];
    for (unsigned at_barrier = 0; at_barrier < 2; at_barrier++) {
      unsigned lanes = at_barrier ? s.at_barrier : s.arrived;
      if (!lanes || used + 200 >= capacity) continue;
      void* pc = s.lanes[__builtin_ctz(lanes)]->wait_pc;
      used +=
          snprintf(text + used, capacity - used, "; simdgroup %u: lanes %08x wait at %s (@0x%lx)",
              i, lanes, at_barrier ? "threadgroup_barrier" : operation_name(s.operation),
              image_offset(group->launch, pc));
    }
  }
}

}  // namespace msl

extern "C" void msl_fail(msl::Lane* lane, void* pc, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  msl::vreport(lane->group, lane, pc, format, arguments);
  va_end(arguments);
  msl::abort_threadgroup(lane->group);
}
