// Scalar and vector types.
#pragma once

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef unsigned long uintptr_t;
typedef _Float16 half;
typedef __bf16 bfloat;

// packed_T3 is missing: clang's three-element vectors occupy four elements.
#define MSL_VECTORS(T)                                                                  \
  typedef T T##2 __attribute__((ext_vector_type(2)));                                   \
  typedef T T##3 __attribute__((ext_vector_type(3)));                                   \
  typedef T T##4 __attribute__((ext_vector_type(4)));                                   \
  typedef T packed_##T##2 __attribute__((ext_vector_type(2), aligned(__alignof__(T)))); \
  typedef T packed_##T##4 __attribute__((ext_vector_type(4), aligned(__alignof__(T))));
MSL_VECTORS(char)
MSL_VECTORS(uchar)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(long)
MSL_VECTORS(ulong)
MSL_VECTORS(half)
MSL_VECTORS(bfloat)
MSL_VECTORS(float)
#undef MSL_VECTORS
typedef bool bool2 __attribute__((ext_vector_type(2)));
typedef bool bool3 __attribute__((ext_vector_type(3)));
typedef bool bool4 __attribute__((ext_vector_type(4)));

namespace metal {
using ::bfloat;
using ::float2;
using ::float3;
using ::float4;
using ::half;
using ::half2;
using ::half4;
using ::size_t;
using ::uchar;
using ::uint;
using ::uint2;
using ::uint3;
using ::uint4;
using ::ulong;
using ::ushort;

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

template <class T, size_t N>
struct array {
  T __e[N];
  METAL_FUNC constexpr T& operator[](size_t i) { return __e[i]; }
  METAL_FUNC constexpr const T& operator[](size_t i) const { return __e[i]; }
  static constexpr size_t size() { return N; }
};

enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
  mem_object_data = 16
};
METAL_FUNC constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(uint(a) | uint(b));
}

enum memory_order { memory_order_relaxed };
enum thread_scope {
  thread_scope_thread,
  thread_scope_simdgroup,
  thread_scope_threadgroup,
  thread_scope_device
};

// <metal_uniform>: a promise to the compiler, without effect here.
template <class T>
using uniform = T;
template <class T>
METAL_FUNC T make_uniform(T x) {
  return x;
}

// <metal_logging>: accepted and ignored.
struct os_log {
  constexpr os_log(const constant char*, const constant char*) {}
  template <class... A>
  METAL_FUNC void log_debug(const constant char*, A...) const {}
};
}  // namespace metal
