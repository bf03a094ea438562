// <metal_relational>
#pragma once

namespace metal {
template <class T>
METAL_FUNC bool isnan(T x) {
  return x != x;
}
template <class T>
METAL_FUNC bool isinf(T x) {
  return fabs(x) == (T)INFINITY;
}
template <class T>
METAL_FUNC bool isfinite(T x) {
  return fabs(x) < (T)INFINITY;
}
template <class T>
METAL_FUNC bool isunordered(T a, T b) {
  return a != a || b != b;
}
template <class T>
METAL_FUNC bool signbit(T x) {
  return __builtin_signbitf((float)x);
}
template <class T>
METAL_FUNC T select(T a, T b, bool c) {
  return c ? b : a;
}
template <class T, class C, int N>
METAL_FUNC vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<C, N> c) {
  MSL_MAP(T, N, c[i] ? b[i] : a[i]);
}
template <class C, int N>
METAL_FUNC bool any(vec<C, N> c) {
  bool r = false;
  for (int i = 0; i < N; i++) r |= bool(c[i]);
  return r;
}
template <class C, int N>
METAL_FUNC bool all(vec<C, N> c) {
  bool r = true;
  for (int i = 0; i < N; i++) r &= bool(c[i]);
  return r;
}
#undef MSL_MAP
}  // namespace metal
