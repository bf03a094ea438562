// CPU backend: atomic operations.  Threadgroups run on several operating system threads, so device
// atomics are real ones.  SPACE is the address space number, for check mode.
#pragma once

namespace msl {
namespace backend {
template <int SPACE, class P>
MSL_INLINE inline void check_atomic(P p) {
#ifdef MSL_CHECK
  msl_check_atomic((const void*)p, sizeof(*p), SPACE);
#endif
}

// Any operation on a float, or one without an instruction, as a compare-and-exchange loop.
template <class T, class F>
MSL_INLINE inline T atomic_update(T* p, F next) {
  T old, desired;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do desired = next(old);
  while (!__atomic_compare_exchange(p, &old, &desired, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

#define MSL_ATOMIC(name, expression)                                     \
  template <int SPACE, class P, class T>                                 \
  MSL_INLINE inline T atomic_##name(P p, T v) {                          \
    check_atomic<SPACE>(p);                                              \
    return atomic_update((T*)p, [v](T old) -> T { return expression; }); \
  }
MSL_ATOMIC(add, old + v)
MSL_ATOMIC(sub, old - v)
MSL_ATOMIC(min, v < old ? v : old)
MSL_ATOMIC(max, old < v ? v : old)
MSL_ATOMIC(and, old& v)
MSL_ATOMIC(or, old | v)
MSL_ATOMIC(xor, old ^ v)
MSL_ATOMIC(exchange, v)
#undef MSL_ATOMIC

template <class T>
MSL_INLINE inline T load_word(const T* p) {
  T v;
  __atomic_load(p, &v, __ATOMIC_RELAXED);
  return v;
}
template <int SPACE, class P>
MSL_INLINE inline auto atomic_load(P p) {
  check_atomic<SPACE>(p);
  typedef metal::remove_addrspace_t<__remove_cv(__remove_pointer(P))> T;
  return load_word((const __remove_cv(T)*)p);
}
template <int SPACE, class P, class T>
MSL_INLINE inline bool atomic_compare_exchange(P p, T* expected, T desired) {
  check_atomic<SPACE>(p);
  return __atomic_compare_exchange(
      (T*)p, expected, &desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}
}  // namespace backend
}  // namespace msl
