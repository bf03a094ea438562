// PTX backend: scalar float functions.  Exponentials, log2, rsqrt, sine and cosine are the GPU's
// approximations (about two units in the last place, sine and cosine for small arguments only).
// Functions that are only declared are missing: using one is an error when the PTX is assembled.
#pragma once

namespace msl {
namespace core {
#define MSL_CORE1(name, function) \
  MSL_INLINE inline float name(float x) { return function(x); }
#define MSL_CORE2(name, function) \
  MSL_INLINE inline float name(float x, float y) { return function(x, y); }
#define MSL_INSTRUCTION(name, instruction)          \
  MSL_INLINE inline float name(float x) {           \
    float r;                                        \
    asm(instruction " %0, %1;" : "=f"(r) : "f"(x)); \
    return r;                                       \
  }
MSL_INSTRUCTION(exp2, "ex2.approx.f32")
MSL_INSTRUCTION(log2, "lg2.approx.f32")
MSL_INSTRUCTION(sqrt, "sqrt.rn.f32")
MSL_INSTRUCTION(rsqrt, "rsqrt.approx.f32")
MSL_INSTRUCTION(sin, "sin.approx.f32")
MSL_INSTRUCTION(cos, "cos.approx.f32")
#undef MSL_INSTRUCTION

// exp(x) = 2^n exp(r) with |r| <= ln(2) / 2.
MSL_INLINE inline float exp(float x) {
  float n = __builtin_rintf(x * M_LOG2E_F);
  n = n < -160.0f ? -160.0f : n > 140.0f ? 140.0f : n;
  float r = __builtin_fmaf(n, -0.693359375f, x);  // ln(2) in two parts
  r = __builtin_fmaf(n, 2.12194440e-4f, r);
  return exp2(r * M_LOG2E_F) * exp2(n);
}
MSL_INLINE inline float exp10(float x) { return exp(x * M_LN10_F); }

// A polynomial on [2/3, 4/3); within one unit in the last place of the exact value.
MSL_INLINE inline float log(float x) {
  float exponent = 0.0f, y = x;
  if (y < FLT_MIN) {
    y *= 8388608.0f;  // 2^23
    exponent = -23.0f;
  }
  int bits = (__builtin_bit_cast(int, y) - __builtin_bit_cast(int, 0.666666667f)) & 0xff800000;
  exponent = __builtin_fmaf((float)bits, FLT_EPSILON, exponent);
  float m = __builtin_bit_cast(float, __builtin_bit_cast(int, y) - bits) - 1.0f;
  float s = m * m;
  float even = __builtin_fmaf(-0.130310059f, s, -0.121484190f);
  float odd = __builtin_fmaf(0.140869141f, s, 0.139814854f);
  even = __builtin_fmaf(even, s, -0.166846126f);
  odd = __builtin_fmaf(odd, s, 0.200120345f);
  even = __builtin_fmaf(even, s, -0.249996200f);
  float r = __builtin_fmaf(odd, m, even);
  r = __builtin_fmaf(r, m, 0.333331972f);
  r = __builtin_fmaf(r, m, -0.5f);
  r = __builtin_fmaf(r, s, m);
  r = __builtin_fmaf(exponent, M_LN2_F, r);
  return x > 0.0f && x < INFINITY ? r : x < 0.0f ? NAN : x == 0.0f ? -INFINITY : x + x;
}
MSL_INLINE inline float log10(float x) { return log(x) * M_LOG10E_F; }
MSL_INLINE inline float tanh(float x) {
  float e = exp(2.0f * __builtin_fabsf(x));
  return __builtin_copysignf(1.0f - 2.0f / (e + 1.0f), x);
}
MSL_INLINE inline float sinh(float x) { return 0.5f * (exp(x) - exp(-x)); }
MSL_INLINE inline float cosh(float x) { return 0.5f * (exp(x) + exp(-x)); }
MSL_INLINE inline float tan(float x) { return sin(x) / cos(x); }
MSL_INLINE inline float pow(float x, float y) { return exp2(y * log2(x)); }
MSL_INLINE inline float powr(float x, float y) { return exp2(y * log2(x)); }
MSL_INLINE inline float fdim(float x, float y) { return x > y ? x - y : 0.0f; }
MSL_INLINE inline float fmod(float x, float y) { return x - y * __builtin_truncf(x / y); }
MSL_INLINE inline float ldexp(float x, int e) { return x * exp2((float)e); }
MSL_CORE1(floor, __builtin_floorf)
MSL_CORE1(ceil, __builtin_ceilf)
MSL_CORE1(round, __builtin_roundf)
MSL_CORE1(rint, __builtin_rintf)
MSL_CORE1(trunc, __builtin_truncf)
MSL_CORE1(fabs, __builtin_fabsf)
MSL_CORE1(abs, __builtin_fabsf)
MSL_CORE2(copysign, __builtin_copysignf)
MSL_CORE2(fmax, __builtin_fmaxf)
MSL_CORE2(fmin, __builtin_fminf)
MSL_CORE2(max, __builtin_fmaxf)
MSL_CORE2(min, __builtin_fminf)
#undef MSL_CORE1
#undef MSL_CORE2
float asin(float);
float acos(float);
float atan(float);
float atan2(float, float);
float asinh(float);
float acosh(float);
float atanh(float);
}  // namespace core
}  // namespace msl
