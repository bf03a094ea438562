// PTX backend: atomic operations, all as compare-and-exchange loops on a 32-bit word.  SPACE is the
// address space number.
#pragma once

namespace msl {
namespace backend {
template <int SPACE>
using atomic_word = volatile uint __attribute__((address_space(SPACE)));

template <int SPACE, class T, class P, class F>
MSL_INLINE inline T atomic_update(P p, F next) {
  static_assert(sizeof(T) == 4, "only 32-bit atomics");
  auto word = (atomic_word<SPACE>*)p;
  uint old = __atomic_load_n(word, __ATOMIC_RELAXED), desired;
  do desired = __builtin_bit_cast(uint, next(__builtin_bit_cast(T, old)));
  while (
      !__atomic_compare_exchange_n(word, &old, desired, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return __builtin_bit_cast(T, old);
}

#define MSL_ATOMIC(name, expression)                                           \
  template <int SPACE, class P, class T>                                       \
  MSL_INLINE inline T atomic_##name(P p, T v) {                                \
    return atomic_update<SPACE, T>(p, [v](T old) -> T { return expression; }); \
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

template <int SPACE, class P>
MSL_INLINE inline auto atomic_load(P p) {
  typedef metal::remove_addrspace_t<__remove_cv(__remove_pointer(P))> T;
  uint word = __atomic_load_n((atomic_word<SPACE>*)p, __ATOMIC_RELAXED);
  return __builtin_bit_cast(__remove_cv(T), word);
}
template <int SPACE, class P, class T>
MSL_INLINE inline bool atomic_compare_exchange(P p, T* expected, T desired) {
  uint old = __builtin_bit_cast(uint, *expected);
  bool done = __atomic_compare_exchange_n((atomic_word<SPACE>*)p, &old,
      __builtin_bit_cast(uint, desired), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  *expected = __builtin_bit_cast(T, old);
  return done;
}
}  // namespace backend
}  // namespace msl
