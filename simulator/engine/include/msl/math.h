// <metal_math>, <metal_common>, <metal_geometric>, <metal_integer>.  The scalar float functions
// come from the backend (msl::core); half is computed in float and rounded once.  There are no
// bfloat overloads: Apple's library has none either.
#pragma once

namespace metal {
template <class To, class From>
METAL_FUNC constexpr To as_type(From from) {
  return __builtin_bit_cast(To, from);
}

// The body of a function that works on each component of a vector.
#define MSL_MAP(T, N, expression)                \
  vec<T, N> r;                                   \
  for (int i = 0; i < N; i++) r[i] = expression; \
  return r

#define MSL_UNARY(name)                                                      \
  METAL_FUNC float name(float x) { return ::msl::core::name(x); }            \
  METAL_FUNC half name(half x) { return (half)::msl::core::name((float)x); } \
  template <int N>                                                           \
  METAL_FUNC vec<float, N> name(vec<float, N> x) {                           \
    MSL_MAP(float, N, name(x[i]));                                           \
  }                                                                          \
  template <int N>                                                           \
  METAL_FUNC vec<half, N> name(vec<half, N> x) {                             \
    MSL_MAP(half, N, name(x[i]));                                            \
  }

#define MSL_BINARY(name)                                                                       \
  METAL_FUNC float name(float x, float y) { return ::msl::core::name(x, y); }                  \
  METAL_FUNC half name(half x, half y) { return (half)::msl::core::name((float)x, (float)y); } \
  template <class T, int N>                                                                    \
  METAL_FUNC vec<T, N> name(vec<T, N> x, vec<T, N> y) {                                        \
    MSL_MAP(T, N, name((T)x[i], (T)y[i]));                                                     \
  }

// clang-format off
#define MSL_ALL_UNARY                                                                     \
  MSL_UNARY(exp) MSL_UNARY(exp2) MSL_UNARY(exp10)                                         \
  MSL_UNARY(log) MSL_UNARY(log2) MSL_UNARY(log10)                                         \
  MSL_UNARY(sqrt) MSL_UNARY(rsqrt)                                                        \
  MSL_UNARY(sin) MSL_UNARY(cos) MSL_UNARY(tan)                                            \
  MSL_UNARY(asin) MSL_UNARY(acos) MSL_UNARY(atan)                                         \
  MSL_UNARY(sinh) MSL_UNARY(cosh) MSL_UNARY(tanh)                                         \
  MSL_UNARY(asinh) MSL_UNARY(acosh) MSL_UNARY(atanh)                                      \
  MSL_UNARY(floor) MSL_UNARY(ceil) MSL_UNARY(round) MSL_UNARY(rint) MSL_UNARY(trunc)      \
  MSL_UNARY(fabs)
#define MSL_ALL_BINARY                                                                    \
  MSL_BINARY(pow) MSL_BINARY(powr) MSL_BINARY(fmod) MSL_BINARY(atan2)                     \
  MSL_BINARY(max) MSL_BINARY(min)
// clang-format on

MSL_ALL_UNARY
MSL_ALL_BINARY
MSL_UNARY(abs)
MSL_BINARY(copysign)
MSL_BINARY(fmax)
MSL_BINARY(fmin)
MSL_BINARY(fdim)

METAL_FUNC float sincos(float x, thread float& c) {
  c = cos(x);
  return sin(x);
}
METAL_FUNC float ldexp(float x, int e) { return ::msl::core::ldexp(x, e); }

// Both are as exact as the backend's functions here, see the README.
namespace fast {
MSL_ALL_UNARY
MSL_ALL_BINARY
using metal::sincos;
METAL_FUNC float divide(float a, float b) { return a / b; }
}  // namespace fast
namespace precise {
MSL_ALL_UNARY
MSL_ALL_BINARY
using metal::ldexp;
using metal::sincos;
METAL_FUNC float divide(float a, float b) { return a / b; }
}  // namespace precise
#undef MSL_ALL_UNARY
#undef MSL_ALL_BINARY
#undef MSL_BINARY
#undef MSL_UNARY

#define MSL_INTEGER_RANGE(T)                                     \
  METAL_FUNC constexpr T max(T x, T y) { return x < y ? y : x; } \
  METAL_FUNC constexpr T min(T x, T y) { return y < x ? y : x; } \
  METAL_FUNC constexpr T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }
MSL_INTEGER_RANGE(char)
MSL_INTEGER_RANGE(int8_t)
MSL_INTEGER_RANGE(uchar)
MSL_INTEGER_RANGE(short)
MSL_INTEGER_RANGE(ushort)
MSL_INTEGER_RANGE(int)
MSL_INTEGER_RANGE(uint)
MSL_INTEGER_RANGE(long)
MSL_INTEGER_RANGE(ulong)
#undef MSL_INTEGER_RANGE

METAL_FUNC int abs(int x) { return x < 0 ? -x : x; }
METAL_FUNC long abs(long x) { return x < 0 ? -x : x; }
METAL_FUNC short abs(short x) { return x < 0 ? -x : x; }

METAL_FUNC float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
METAL_FUNC half fma(half a, half b, half c) { return (half)__builtin_fmaf(a, b, c); }
template <class T, int N>
METAL_FUNC vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) {
  MSL_MAP(T, N, fma((T)a[i], (T)b[i], (T)c[i]));
}

METAL_FUNC float clamp(float x, float lo, float hi) { return min(max(x, lo), hi); }
METAL_FUNC half clamp(half x, half lo, half hi) { return min(max(x, lo), hi); }
template <class T, int N>
METAL_FUNC vec<T, N> clamp(vec<T, N> x, vec<T, N> lo, vec<T, N> hi) {
  MSL_MAP(T, N, clamp((T)x[i], (T)lo[i], (T)hi[i]));
}
template <class T, int N>
METAL_FUNC vec<T, N> clamp(vec<T, N> x, ::msl::identity_t<T> lo, ::msl::identity_t<T> hi) {
  MSL_MAP(T, N, clamp((T)x[i], lo, hi));
}
METAL_FUNC float max3(float x, float y, float z) { return max(x, max(y, z)); }
METAL_FUNC float min3(float x, float y, float z) { return min(x, min(y, z)); }
METAL_FUNC half max3(half x, half y, half z) { return max(x, max(y, z)); }
METAL_FUNC half min3(half x, half y, half z) { return min(x, min(y, z)); }
METAL_FUNC float mix(float a, float b, float t) { return a + (b - a) * t; }
METAL_FUNC float saturate(float x) { return clamp(x, 0.0f, 1.0f); }
METAL_FUNC half saturate(half x) { return clamp(x, (half)0.0f, (half)1.0f); }
METAL_FUNC float fract(float x) { return x - floor(x); }
METAL_FUNC float sinpi(float x) { return sin(M_PI_F * (x - 2.0f * rint(x * 0.5f))); }
METAL_FUNC float cospi(float x) { return cos(M_PI_F * (x - 2.0f * rint(x * 0.5f))); }
METAL_FUNC float step(float edge, float x) { return x < edge ? 0.0f : 1.0f; }

template <class T>
METAL_FUNC T sign(T x) {
  return x > T(0) ? T(1) : x < T(0) ? T(-1) : T(0);
}
template <class T, int N>
METAL_FUNC T dot(vec<T, N> a, vec<T, N> b) {
  T r = T(0);
  for (int i = 0; i < N; i++) r += a[i] * b[i];
  return r;
}
template <class T, int N>
METAL_FUNC T length_squared(vec<T, N> a) {
  return dot(a, a);
}
template <class T, int N>
METAL_FUNC T length(vec<T, N> a) {
  return sqrt(dot(a, a));
}

METAL_FUNC uint popcount(uint x) { return __builtin_popcount(x); }
METAL_FUNC uint clz(uint x) { return x ? __builtin_clz(x) : 32; }
METAL_FUNC uint ctz(uint x) { return x ? __builtin_ctz(x) : 32; }
METAL_FUNC uint reverse_bits(uint x) { return __builtin_bitreverse32(x); }
METAL_FUNC uint rotate(uint x, uint n) { return __builtin_rotateleft32(x, n); }
METAL_FUNC uint mulhi(uint a, uint b) { return (uint)(((ulong)a * b) >> 32); }
METAL_FUNC int mulhi(int a, int b) { return (int)(((long)a * b) >> 32); }
METAL_FUNC ulong mulhi(ulong a, ulong b) { return (ulong)(((unsigned __int128)a * b) >> 64); }
}  // namespace metal

// Metal declares it in the global namespace as well.
using metal::as_type;
