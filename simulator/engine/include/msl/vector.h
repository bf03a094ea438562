// Vector constructors.  clang's C++ has no `float4(a, b.xyz)`; the pre-pass turns it into
// `::msl::construct<float4>(a, b.xyz)`, which also serves types that may turn out not to be
// vectors.
#pragma once

namespace msl {
using metal::is_same_v;
using metal::mem_flags;
using metal::vec;

template <class T>
struct vector_traits {
  static constexpr int size = 0;
  typedef T element;
};
template <class T, int N>
struct vector_traits<T __attribute__((ext_vector_type(N)))> {
  static constexpr int size = N;
  typedef T element;
};
template <class T>
inline constexpr int vector_size = vector_traits<__remove_cv(T)>::size;
template <class T>
inline constexpr bool is_vector = vector_size<T> != 0;

// clang refuses to convert between half and bfloat directly.
template <class E, class A>
MSL_INLINE constexpr E convert(A x) {
  if constexpr ((is_same_v<E, half> && is_same_v<A, bfloat>) ||
                (is_same_v<E, bfloat> && is_same_v<A, half>))
    return static_cast<E>(static_cast<float>(x));
  else
    return static_cast<E>(x);
}

template <class V, class A>
MSL_INLINE constexpr void append_components(V& result, int& next, A argument) {
  typedef typename vector_traits<V>::element E;
  if constexpr (is_vector<A>) {
    for (int k = 0; k < vector_size<A>; k++) result[next++] = convert<E>(argument[k]);
  } else {
    result[next++] = convert<E>(argument);
  }
}

template <class V, class... A>
MSL_INLINE constexpr V construct(A... arguments) {
  if constexpr (!is_vector<V>) {
    return V(arguments...);
  } else {
    typedef typename vector_traits<V>::element E;
    V result = V(0);
    if constexpr (sizeof...(A) == 1 && (!is_vector<A> && ...)) {  // float4(x): all components
      for (int k = 0; k < vector_size<V>; k++) result[k] = (convert<E>(arguments), ...);
    } else {
      constexpr int components = ((is_vector<A> ? vector_size<A> : 1) + ... + 0);
      static_assert(components == vector_size<V> || sizeof...(A) == 0,
          "vector constructor: wrong number of components");
      int next = 0;
      (append_components(result, next, arguments), ...);
    }
    return result;
  }
}

// Keeps an argument out of template deduction.
template <class T>
struct identity {
  typedef T type;
};
template <class T>
using identity_t = typename identity<T>::type;
}  // namespace msl
