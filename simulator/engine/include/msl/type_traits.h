// <metal_type_traits>
#pragma once

namespace metal {
template <class T, T v>
struct integral_constant {
  static constexpr constant T value = v;
  typedef T value_type;
  typedef integral_constant type;
  METAL_FUNC constexpr operator T() const { return v; }
};
template <bool B>
using bool_constant = integral_constant<bool, B>;
typedef bool_constant<true> true_type;
typedef bool_constant<false> false_type;

template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;

template <bool B, class T, class F>
struct conditional {
  typedef T type;
};
template <class T, class F>
struct conditional<false, T, F> {
  typedef F type;
};
template <bool B, class T, class F>
using conditional_t = typename conditional<B, T, F>::type;

#define MSL_TRANSFORM(name, builtin) \
  template <class T>                 \
  struct name {                      \
    typedef builtin(T) type;         \
  };                                 \
  template <class T>                 \
  using name##_t = builtin(T);
MSL_TRANSFORM(remove_cv, __remove_cv)
MSL_TRANSFORM(remove_const, __remove_const)
MSL_TRANSFORM(remove_reference, __remove_reference_t)
MSL_TRANSFORM(remove_pointer, __remove_pointer)
MSL_TRANSFORM(decay, __decay)
#undef MSL_TRANSFORM

template <class T>
inline constexpr bool __is_small_float =
    __is_same(__remove_cv(T), half) || __is_same(__remove_cv(T), bfloat);

#define MSL_PREDICATE(name, ...)                \
  template <class T>                            \
  inline constexpr bool name##_v = __VA_ARGS__; \
  template <class T>                            \
  struct name : bool_constant<name##_v<T>> {};
MSL_PREDICATE(is_integral, __is_integral(T))
MSL_PREDICATE(is_floating_point, __is_floating_point(T) || __is_small_float<T>)
MSL_PREDICATE(is_arithmetic, __is_arithmetic(T) || __is_small_float<T>)
MSL_PREDICATE(is_scalar, __is_scalar(T) || __is_small_float<T>)
MSL_PREDICATE(is_signed, __is_signed(T))
MSL_PREDICATE(is_unsigned, __is_unsigned(T))
MSL_PREDICATE(is_pointer, __is_pointer(T))
MSL_PREDICATE(is_const, __is_const(T))
MSL_PREDICATE(is_void, __is_void(T))
MSL_PREDICATE(is_enum, __is_enum(T))
#undef MSL_PREDICATE

#define MSL_RELATION(name, builtin)               \
  template <class A, class B>                     \
  inline constexpr bool name##_v = builtin(A, B); \
  template <class A, class B>                     \
  struct name : bool_constant<builtin(A, B)> {};
MSL_RELATION(is_same, __is_same)
MSL_RELATION(is_convertible, __is_convertible)
MSL_RELATION(is_base_of, __is_base_of)
#undef MSL_RELATION

template <class T>
struct remove_addrspace {
  typedef T type;
};
template <class T>
struct remove_addrspace<device T> {
  typedef T type;
};
template <class T>
struct remove_addrspace<constant T> {
  typedef T type;
};
template <class T>
struct remove_addrspace<threadgroup T> {
  typedef T type;
};
template <class T>
using remove_addrspace_t = typename remove_addrspace<T>::type;

template <class T>
T&& declval() noexcept;
}  // namespace metal
