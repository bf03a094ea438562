// Data shared by compiled kernels and the executor (runtime/): one GPU thread is one fiber
// ("lane"), 32 lanes are a simdgroup, and one operating system thread runs a whole threadgroup.
//
// Included both by kernels (freestanding) and by the runtime: no standard headers here.
#pragma once

namespace msl {

enum : unsigned {
  kStackLog = 17,
  kStackBytes = 1u << kStackLog,
  kMaxThreads = 1024,  // threads of a threadgroup
  kSimdWidth = 32,
  kMaxSimdgroups = kMaxThreads / kSimdWidth,
  kMaxBuffers = 31,
  kMaxThreadgroupVariables = 64,
  kThreadgroupMemoryLimit = 32768,  // bytes, as Metal refuses a pipeline above it
  kArenaBytes = 1u << 16,           // threadgroup memory plus the gaps between variables
};

// Bits of metal::mem_flags that the executor looks at.
enum : unsigned { kMemDevice = 1, kMemThreadgroup = 2 };

// Dynamic counts of a launch.  Python reads this struct: library.py lists the same fields in order.
// Loads and stores are counted in check mode only.
struct Counters {
  unsigned long mma;                   // counted once per lane
  unsigned long mma_half, mma_bfloat;  // of these, both operands half or bfloat
  unsigned long simd_ops, simd_barriers, threadgroup_barriers;
  unsigned long divergent_simd_ops;
  unsigned long exps, logs;
  unsigned long device_bytes_read, device_bytes_written;
  unsigned long threadgroup_bytes_read, threadgroup_bytes_written;
  unsigned long constant_bytes_read;
  unsigned long device_reads, device_writes, threadgroup_reads, threadgroup_writes;
  unsigned long threads, threadgroups, switches;
};

struct Simdgroup;
struct Threadgroup;
struct Launch;

// The record of one GPU thread.  It lies at the top of its own stack, see lane_of().
struct Lane {
  void* sp;  // saved stack pointer while the lane does not run
  Simdgroup* simdgroup;
  Threadgroup* group;
  Counters* counters;
  void* wait_pc;      // where the lane waits, for reports
  unsigned lane;      // thread_index_in_simdgroup
  unsigned index;     // thread_index_in_threadgroup
  unsigned fragment;  // row * 8 + column of this lane's two elements of a simdgroup matrix
};

// Finds the lane that owns a stack address, so that no thread-local variable is needed.  The record
// is shifted by a colour taken from the stack's number: otherwise the tops of all stacks of a
// threadgroup would fall into the same few cache sets.
inline __attribute__((always_inline)) Lane* lane_of(unsigned long sp) {
  unsigned long colour = (sp >> kStackLog) & 63;
  return (Lane*)((sp | (kStackBytes - 1)) + 1 - 64 - colour * 1088);
}

// A rendezvous of up to 32 lanes: every lane writes its operands, the last one to arrive computes.
struct Simdgroup {
  alignas(64) float a[64], b[64], c[64], d[64];  // 8x8 matrices
  alignas(64) unsigned char in[32][32];
  alignas(64) unsigned char out[32][32];
  unsigned source[32];    // shuffle: lane to read from
  unsigned live;          // bit per lane that has not returned
  unsigned arrived;       // bit per lane waiting at a simdgroup operation
  unsigned at_barrier;    // bit per lane waiting at a threadgroup barrier
  unsigned operation;     // which simdgroup operation the lanes in `arrived` wait at
  void* site;             // and where in the program
  unsigned participants;  // lanes of the shuffle that was carried out last
  unsigned completes;     // no further lane will come: the woken one carries the operation out
  unsigned epoch;         // simdgroup barriers passed that order threadgroup memory
  unsigned index;         // simdgroup_index_in_threadgroup
  Lane* lanes[32];
  Threadgroup* group;
};

// A range of the threadgroup memory arena with the variable that occupies it.
struct ThreadgroupVariable {
  const char* name;  // null: a [[threadgroup(n)]] argument
  unsigned id;       // number of the declaration in the program, or n
  unsigned begin, end;
};

struct ByteHistory;  // runtime/race_shadow.h

struct Threadgroup {
  Launch* launch;
  unsigned position[3];  // threadgroup_position_in_grid
  unsigned size[3];      // actual size: smaller than the nominal one at the grid's edges
  unsigned threads, simdgroup_count;
  unsigned live_simdgroups, simdgroups_at_barrier, threads_at_barrier;
  unsigned barrier_flags;
  unsigned epoch;  // barriers passed that order threadgroup memory
  bool aborted;
  void* scheduler_sp;  // the operating system thread's own stack
  unsigned char* arena;
  unsigned arena_used;
  unsigned memory_bytes;  // what Metal would count: without the gaps
  unsigned variable_count;
  ThreadgroupVariable variables[kMaxThreadgroupVariables];
  void* arguments[kMaxBuffers];  // [[threadgroup(n)]]
  Simdgroup* simdgroups;
  unsigned random;
  ByteHistory* shadow;  // check mode only
  Counters counters;
};

// One dispatch.  Python fills it (library.py declares the same fields in the same order).
struct Launch {
  void (*entry)(Lane*);
  unsigned threads[3];  // the grid in threads
  unsigned group[3];    // nominal threadgroup size
  void* buffers[kMaxBuffers];
  unsigned long buffer_bytes[kMaxBuffers];
  unsigned bound;     // bit per buffer index that is bound
  unsigned writable;  // bit per buffer index that may be written
  unsigned declared;  // bit per buffer index that the kernel declares
  unsigned threadgroup_bytes[kMaxBuffers];
  unsigned check, random_schedule, seed, workers;
  unsigned long* block_counts;  // executions of each basic block, or null
  unsigned block_count;
  char* report_text;
  unsigned report_capacity;
  // Results.
  unsigned reports;
  unsigned memory_bytes;  // largest static plus dynamic threadgroup memory of a threadgroup
  Counters counters;
  // Set by the executor.
  unsigned groups[3];  // threadgroups_per_grid
  unsigned arena_peak;
  const char *image_begin, *image_end;  // the kernel library, where program-scope constants live
};

// One row of a kernel library's table.
struct Entry {
  const char* name;
  void (*run)(Lane*);
  unsigned max_threads;
  unsigned declared;   // bit per buffer index
  unsigned read_only;  // bit per buffer index declared const device or constant
};

}  // namespace msl

extern "C" {
// Switches to the fiber whose stack pointer is `load`; the current one continues at *save.
void msl_swap(void** save, void* load);
// The current lane has arrived at a simdgroup operation and is not the last one.
void msl_wait(msl::Lane* lane);
void msl_threadgroup_barrier(msl::Lane* lane, unsigned flags);
// Storage of a threadgroup variable; the first lane to come allocates it.
void* msl_threadgroup_variable(
    msl::Lane* lane, unsigned bytes, unsigned align, unsigned id, const char* name);
// Reports a fault of the current lane and ends its threadgroup.
[[noreturn]] void msl_fail(msl::Lane* lane, void* pc, const char* format, ...);
// Check mode: an atomic operation on device (1) or threadgroup (3) memory.
void msl_check_atomic(const void* address, unsigned bytes, unsigned address_space);
}
