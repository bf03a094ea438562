// <metal_atomic>: relaxed 32-bit operations on device and threadgroup memory.
#pragma once

namespace metal {
template <class T>
struct _atomic {
  T __v;
};
template <class T>
using atomic = _atomic<T>;
typedef _atomic<int> atomic_int;
typedef _atomic<uint> atomic_uint;
typedef _atomic<float> atomic_float;
typedef _atomic<bool> atomic_bool;

#define MSL_ATOMIC_FETCH(SPACE, NUMBER, name, operation)                    \
  template <class T>                                                        \
  METAL_FUNC T atomic_##name##_explicit(                                    \
      volatile SPACE _atomic<T>* p, ::msl::identity_t<T> v, memory_order) { \
    return ::msl::backend::atomic_##operation<NUMBER>(&p->__v, (T)v);       \
  }
#define MSL_ATOMICS(SPACE, NUMBER)                                                         \
  MSL_ATOMIC_FETCH(SPACE, NUMBER, fetch_add, add)                                          \
  MSL_ATOMIC_FETCH(SPACE, NUMBER, fetch_sub, sub)                                          \
  MSL_ATOMIC_FETCH(SPACE, NUMBER, fetch_min, min)                                          \
  MSL_ATOMIC_FETCH(SPACE, NUMBER, fetch_max, max)                                          \
  MSL_ATOMIC_FETCH(SPACE, NUMBER, fetch_and, and)                                          \
  MSL_ATOMIC_FETCH(SPACE, NUMBER, fetch_or, or)                                            \
  MSL_ATOMIC_FETCH(SPACE, NUMBER, fetch_xor, xor)                                          \
  MSL_ATOMIC_FETCH(SPACE, NUMBER, exchange, exchange)                                      \
  template <class T>                                                                       \
  METAL_FUNC T atomic_load_explicit(const volatile SPACE _atomic<T>* p, memory_order) {    \
    return ::msl::backend::atomic_load<NUMBER>(&p->__v);                                   \
  }                                                                                        \
  template <class T>                                                                       \
  METAL_FUNC void atomic_store_explicit(                                                   \
      volatile SPACE _atomic<T>* p, ::msl::identity_t<T> v, memory_order) {                \
    ::msl::backend::atomic_exchange<NUMBER>(&p->__v, (T)v);                                \
  }                                                                                        \
  template <class T>                                                                       \
  METAL_FUNC bool atomic_compare_exchange_weak_explicit(volatile SPACE _atomic<T>* p,      \
      thread T* expected, ::msl::identity_t<T> desired, memory_order, memory_order) {      \
    return ::msl::backend::atomic_compare_exchange<NUMBER>(&p->__v, expected, (T)desired); \
  }
MSL_ATOMICS(device, 1)
MSL_ATOMICS(threadgroup, 3)
#undef MSL_ATOMICS
#undef MSL_ATOMIC_FETCH
}  // namespace metal
