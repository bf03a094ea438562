// CPU backend: how a kernel finds its arguments, and the table that the Python side reads.
#pragma once

namespace msl {
MSL_INLINE inline uint3 load3(const unsigned* v) { return uint3{v[0], v[1], v[2]}; }

// Answers the attributes of kernel parameters for one lane.  In the threadgroups at the edge of the
// grid the actual size (threads_per_threadgroup) is smaller than the dispatched one.
struct Invocation {
  Lane* lane;
  MSL_INLINE Threadgroup* group() { return lane->group; }
  MSL_INLINE Launch* launch() { return lane->group->launch; }
  MSL_INLINE void* buffer(int i) { return launch()->buffers[i]; }
  MSL_INLINE void* threadgroup_argument(int i) { return group()->arguments[i]; }
  MSL_INLINE uint3 threads_per_threadgroup() { return load3(group()->size); }
  MSL_INLINE uint3 dispatch_threads_per_threadgroup() { return load3(launch()->group); }
  MSL_INLINE uint3 threadgroups_per_grid() { return load3(launch()->groups); }
  MSL_INLINE uint3 threads_per_grid() { return load3(launch()->threads); }
  MSL_INLINE uint3 threadgroup_position_in_grid() { return load3(group()->position); }
  __attribute__((no_sanitize("undefined"))) MSL_INLINE uint3 thread_position_in_threadgroup() {
    unsigned* n = group()->size;
    return uint3{lane->index % n[0], lane->index / n[0] % n[1], lane->index / n[0] / n[1]};
  }
  MSL_INLINE uint3 thread_position_in_grid() {
    return threadgroup_position_in_grid() * dispatch_threads_per_threadgroup() +
           thread_position_in_threadgroup();
  }
  MSL_INLINE uint thread_index_in_threadgroup() { return lane->index; }
  MSL_INLINE uint thread_index_in_simdgroup() { return lane->lane; }
  MSL_INLINE uint thread_index_in_quadgroup() { return lane->index % 4; }
  MSL_INLINE uint simdgroup_index_in_threadgroup() { return lane->index / 32; }
  MSL_INLINE uint quadgroup_index_in_threadgroup() { return lane->index / 4; }
  MSL_INLINE uint threads_per_simdgroup() { return 32; }
  MSL_INLINE uint thread_execution_width() { return 32; }
  MSL_INLINE uint simdgroups_per_threadgroup() { return group()->simdgroup_count; }
  MSL_INLINE uint quadgroups_per_threadgroup() { return (group()->threads + 3) / 4; }
  MSL_INLINE uint dispatch_simdgroups_per_threadgroup() {
    unsigned* n = launch()->group;
    return (n[0] * n[1] * n[2] + 31) / 32;
  }
};
}  // namespace msl

// Written by the pre-pass behind every kernel or instantiation.  The rows gather in a linker
// section of their own, because kernels may stand in any namespace.
#define MSL_ENTRY(id, name, max_threads, F, ...)                                            \
  namespace {                                                                               \
  struct id {                                                                               \
    typedef ::msl::caller<F, __VA_ARGS__> caller;                                           \
    static void run(::msl::Lane* lane) {                                                    \
      ::msl::Invocation invocation{lane};                                                   \
      caller::call(invocation);                                                             \
    }                                                                                       \
  };                                                                                        \
  __attribute__((used, section("msl_entries"))) const ::msl::Entry id##_row = {             \
      name, id::run, (unsigned)(max_threads), id::caller::declared, id::caller::read_only}; \
  }
// Written by the pre-pass at the end of the program.
#define MSL_ENTRY_TABLE                                                                         \
  extern "C" {                                                                                  \
  extern __attribute__((weak, visibility("hidden"))) const ::msl::Entry __start_msl_entries[];  \
  extern __attribute__((weak, visibility("hidden"))) const ::msl::Entry __stop_msl_entries[];   \
  __attribute__((used)) const ::msl::Entry* msl_entries_begin() { return __start_msl_entries; } \
  __attribute__((used)) const ::msl::Entry* msl_entries_end() { return __stop_msl_entries; }    \
  }
// A threadgroup variable of a kernel: the pre-pass turns its declaration into a typedef and this.
#define MSL_THREADGROUP_VARIABLE(name, id)                                   \
  msl_type_of_##name& name = *(msl_type_of_##name*)msl_threadgroup_variable( \
      ::msl::self(), sizeof(msl_type_of_##name), alignof(msl_type_of_##name), id, #name)
