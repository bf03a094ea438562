// Functions of the text of score_mod and mask_mod: what PyTorch computes and Metal has no function
// for, or another one. Integer division by zero, which has no result, gives 0.
#pragma once

#include <metal_stdlib>
using namespace metal;

// ---- integers: quotients towards zero and down, remainders with the sign of either ------------

/// Whether b is the -1 by which the most negative integer has no quotient.
template <typename T>
METAL_FUNC bool flex_negates(T b) {
  return T(-1) < T(0) && b == T(-1);
}

template <typename T>
METAL_FUNC T flex_divide(T a, T b) {
  if (flex_negates(b)) {
    return T(T(0) - a);  // it wraps round, as in PyTorch
  }
  return b == T(0) ? T(0) : T(a / b);
}

template <typename T>
METAL_FUNC T flex_fmod(T a, T b) {
  return b == T(0) || flex_negates(b) ? T(0) : T(a % b);
}

template <typename T>
METAL_FUNC T flex_remainder(T a, T b) {
  const T rest = flex_fmod(a, b);
  return rest != T(0) && (rest < T(0)) != (b < T(0)) ? T(rest + b) : rest;
}

template <typename T>
METAL_FUNC T flex_floor_divide(T a, T b) {
  const T rest = flex_fmod(a, b);
  const T quotient = flex_divide(a, b);
  return rest != T(0) && (rest < T(0)) != (b < T(0)) ? T(quotient - T(1)) : quotient;
}

METAL_FUNC int flex_shift_left(int a, int n) {
  return n < 0 || n > 31 ? 0 : int(uint(a) << uint(n));
}

METAL_FUNC long flex_shift_left(long a, long n) {
  return n < 0 || n > 63 ? long(0) : long(ulong(a) << ulong(n));
}

METAL_FUNC int flex_shift_right(int a, int n) { return a >> (n < 0 || n > 31 ? 31 : n); }

METAL_FUNC long flex_shift_right(long a, long n) { return a >> (n < 0 || n > 63 ? long(63) : n); }

METAL_FUNC long flex_power(long base, long exponent) {
  if (exponent < 0) {
    return base == 1 ? 1 : base == -1 ? ((exponent & 1) != 0 ? -1 : 1) : 0;
  }
  ulong result = 1;
  ulong square = ulong(base);
  for (ulong n = ulong(exponent); n != 0; n >>= 1) {
    result *= (n & 1) != 0 ? square : ulong(1);
    square *= square;
  }
  return long(result);
}

METAL_FUNC int flex_power(int base, int exponent) {
  return int(flex_power(long(base), long(exponent)));
}

// ---- floats -------------------------------------------------------------------------------------

template <>
METAL_FUNC float flex_remainder<float>(float a, float b) {
  const float rest = precise::fmod(a, b);
  return rest != 0.0f && (rest < 0.0f) != (b < 0.0f) ? rest + b : rest;
}

template <>
METAL_FUNC float flex_floor_divide<float>(float a, float b) {
  if (b == 0.0f) {
    return a / b;
  }
  const float rest = precise::fmod(a, b);
  const float exact = (a - rest) / b;
  const float quotient = rest != 0.0f && (rest < 0.0f) != (b < 0.0f) ? exact - 1.0f : exact;
  const float below = floor(quotient);
  const float nearest = quotient - below > 0.5f ? below + 1.0f : below;
  return quotient == 0.0f ? copysign(0.0f, a / b) : nearest;
}

/// For every base, also below zero.
METAL_FUNC float flex_power(float base, float exponent) {
  if (base == 1.0f || exponent == 0.0f) {
    return 1.0f;
  }
  const float size = precise::pow(fabs(base), exponent);
  const bool is_whole = exponent == trunc(exponent);
  const bool is_odd = is_whole && fabs(precise::fmod(exponent, 2.0f)) == 1.0f;
  if (is_odd) {
    return copysign(size, base);
  }
  return base < 0.0f && !is_whole && base != -INFINITY ? NAN : size;
}

/// log(1 + x): the rounding of 1 + x divides out.
METAL_FUNC float flex_log1p(float x) {
  const float u = 1.0f + x;
  const float rounded = u - 1.0f;
  return rounded == 0.0f || x == INFINITY ? x : precise::log(u) * (x / rounded);
}

/// exp(x) - 1, the same way.
METAL_FUNC float flex_expm1(float x) {
  const float u = precise::exp(x);
  const float rounded = u - 1.0f;
  if (u == 1.0f || u == INFINITY) {
    return u == 1.0f ? x : u;
  }
  return rounded == -1.0f ? rounded : rounded * (x / precise::log(u));
}

/// Polynomials fitted to erf(x) / x in x^2 below 1, and to log(1 - erf(x)) up to 4, where erf
/// rounds to 1: within two units in the last place.
METAL_FUNC float flex_erf(float x) {
  const float size = fabs(x);
  if (size < 1.0f) {
    const float z = x * x;
    float p = 7.88908582762815e-05f;
    p = p * z - 0.0008020831155590713f;
    p = p * z + 0.005189534276723862f;
    p = p * z - 0.026854444295167923f;
    p = p * z + 0.11283600330352783f;
    p = p * z - 0.3761262595653534f;
    p = p * z + 1.1283791065216064f;
    return x * p;
  }
  const float z = size < 4.0f ? size : 4.0f;
  float p = 1.5998537037376082e-06f;
  p = p * z - 4.5298806071514264e-05f;
  p = p * z + 0.0005902094999328256f;
  p = p * z - 0.004727718885987997f;
  p = p * z + 0.02632761560380459f;
  p = p * z - 0.10990989953279495f;
  p = p * z - 0.6320132613182068f;
  p = p * z - 1.130119800567627f;
  p = p * z + 0.00029105678549967706f;
  return x != x ? x : copysign(1.0f - precise::exp(p), x);
}

METAL_FUNC float flex_gelu(float x) {
  return 0.5f * x * (1.0f + flex_erf(x * 0.7071067690849304f));
}

METAL_FUNC float flex_gelu_tanh(float x) {
  const float inner = 0.7978845834732056f * (x + 0.044714998453855515f * (x * x * x));
  return 0.5f * x * (1.0f + precise::tanh(inner));
}
