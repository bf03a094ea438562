// PTX backend: how a kernel finds its arguments.  Every kernel is a PTX entry of its Metal name
// with one parameter, msl::Arguments; a block has one dimension.
#pragma once

namespace msl {
// Filled by the host (in this order; unbound buffers are null).
struct Arguments {
  unsigned long buffers[31];
  unsigned groups[3];                      // threadgroups_per_grid
  unsigned group[3];                       // threads_per_threadgroup; all are whole
  unsigned threadgroup_argument_begin[8];  // in dynamic shared memory, bytes
};
extern threadgroup char dynamic_shared_memory[];

#define MSL_REGISTER(function, name)          \
  MSL_INLINE inline uint function() {         \
    uint r;                                   \
    asm("mov.u32 %0, %%" name ";" : "=r"(r)); \
    return r;                                 \
  }
MSL_REGISTER(block_x, "ctaid.x")
MSL_REGISTER(block_y, "ctaid.y")
MSL_REGISTER(block_z, "ctaid.z")
MSL_REGISTER(thread_of_block, "tid.x")
#undef MSL_REGISTER

// Answers the attributes of kernel parameters.
struct Invocation {
  const Arguments& a;
  MSL_INLINE void* buffer(int i) { return (void*)(device void*)a.buffers[i]; }
  MSL_INLINE void* threadgroup_argument(int i) {
    return (void*)(dynamic_shared_memory + a.threadgroup_argument_begin[i]);
  }
  MSL_INLINE uint3 threads_per_threadgroup() { return uint3{a.group[0], a.group[1], a.group[2]}; }
  MSL_INLINE uint3 dispatch_threads_per_threadgroup() { return threads_per_threadgroup(); }
  MSL_INLINE uint3 threadgroups_per_grid() { return uint3{a.groups[0], a.groups[1], a.groups[2]}; }
  MSL_INLINE uint3 threads_per_grid() {
    return threads_per_threadgroup() * threadgroups_per_grid();
  }
  MSL_INLINE uint3 threadgroup_position_in_grid() { return uint3{block_x(), block_y(), block_z()}; }
  MSL_INLINE uint thread_index_in_threadgroup() {
    uint i = thread_of_block();
    return (i & ~31u) | backend::to_metal_lane(i & 31);
  }
  MSL_INLINE uint3 thread_position_in_threadgroup() {
    uint i = thread_index_in_threadgroup();
    return uint3{i % a.group[0], i / a.group[0] % a.group[1], i / a.group[0] / a.group[1]};
  }
  MSL_INLINE uint3 thread_position_in_grid() {
    return threadgroup_position_in_grid() * threads_per_threadgroup() +
           thread_position_in_threadgroup();
  }
  MSL_INLINE uint thread_index_in_simdgroup() {
    return backend::to_metal_lane(thread_of_block() & 31);
  }
  MSL_INLINE uint thread_index_in_quadgroup() { return thread_index_in_threadgroup() % 4; }
  MSL_INLINE uint simdgroup_index_in_threadgroup() { return thread_of_block() / 32; }
  MSL_INLINE uint quadgroup_index_in_threadgroup() { return thread_index_in_threadgroup() / 4; }
  MSL_INLINE uint threads_per_simdgroup() { return 32; }
  MSL_INLINE uint thread_execution_width() { return 32; }
  MSL_INLINE uint simdgroups_per_threadgroup() {
    return (a.group[0] * a.group[1] * a.group[2] + 31) / 32;
  }
  MSL_INLINE uint quadgroups_per_threadgroup() {
    return (a.group[0] * a.group[1] * a.group[2] + 3) / 4;
  }
  MSL_INLINE uint dispatch_simdgroups_per_threadgroup() { return simdgroups_per_threadgroup(); }
};
}  // namespace msl

// Written by the pre-pass behind every kernel or instantiation.  ptx.py turns the variable into the
// entry's .maxntid.
#define MSL_ENTRY(id, name, max_threads, F, ...)                       \
  extern device const int id##_threads __asm__(name "_max_threads");   \
  __attribute__((used)) device const int id##_threads = (max_threads); \
  void id(::msl::Arguments) __asm__(name);                             \
  __attribute__((nvptx_kernel)) void id(::msl::Arguments arguments) {  \
    ::msl::Invocation invocation{arguments};                           \
    ::msl::caller<F, __VA_ARGS__>::call(invocation);                   \
  }
#define MSL_ENTRY_TABLE
// A threadgroup variable of a kernel: the pre-pass turns its declaration into a typedef and this.
#define MSL_THREADGROUP_VARIABLE(name, id) \
  static __attribute__((loader_uninitialized)) msl_type_of_##name name
