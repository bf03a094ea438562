// <metal_limits>
#pragma once

namespace metal {
template <class T>
struct numeric_limits;

#define MSL_FLOAT_LIMITS(T, largest, smallest, eps, bits)       \
  template <>                                                   \
  struct numeric_limits<T> {                                    \
    static constexpr bool is_integer = false, is_signed = true; \
    static constexpr int digits = bits;                         \
    static constexpr T max() { return (T)(largest); }           \
    static constexpr T lowest() { return (T)(-(largest)); }     \
    static constexpr T min() { return (T)(smallest); }          \
    static constexpr T epsilon() { return (T)(eps); }           \
    static constexpr T infinity() { return (T)INFINITY; }       \
    static constexpr T quiet_NaN() { return (T)NAN; }           \
  };
MSL_FLOAT_LIMITS(float, FLT_MAX, FLT_MIN, FLT_EPSILON, 24)
MSL_FLOAT_LIMITS(half, 65504.0f, 6.103515625e-05f, 9.765625e-04f, 11)
MSL_FLOAT_LIMITS(bfloat, 3.3895314e38f, 1.17549435e-38f, 7.8125e-3f, 8)
#undef MSL_FLOAT_LIMITS

#define MSL_INTEGER_LIMITS(T, smallest, largest)                       \
  template <>                                                          \
  struct numeric_limits<T> {                                           \
    static constexpr bool is_integer = true, is_signed = T(-1) < T(1); \
    static constexpr int digits = sizeof(T) * 8 - is_signed;           \
    static constexpr T max() { return largest; }                       \
    static constexpr T min() { return smallest; }                      \
    static constexpr T lowest() { return smallest; }                   \
  };
MSL_INTEGER_LIMITS(bool, false, true)
MSL_INTEGER_LIMITS(char, CHAR_MIN, CHAR_MAX)
MSL_INTEGER_LIMITS(int8_t, CHAR_MIN, CHAR_MAX)
MSL_INTEGER_LIMITS(uchar, 0, UCHAR_MAX)
MSL_INTEGER_LIMITS(short, SHRT_MIN, SHRT_MAX)
MSL_INTEGER_LIMITS(ushort, 0, USHRT_MAX)
MSL_INTEGER_LIMITS(int, INT_MIN, INT_MAX)
MSL_INTEGER_LIMITS(uint, 0, UINT_MAX)
MSL_INTEGER_LIMITS(long, LONG_MIN, LONG_MAX)
MSL_INTEGER_LIMITS(ulong, 0, ULONG_MAX)
#undef MSL_INTEGER_LIMITS
}  // namespace metal
