// Conversions that clang leaves to the compiler's support library, which has them only from GCC 13
// on.
#include <cstring>

// float to bfloat, to nearest even.
extern "C" __attribute__((weak)) __bf16 __truncsfbf2(float x) {
  unsigned bits;
  memcpy(&bits, &x, sizeof bits);
  bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  unsigned short upper = is_nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  __bf16 result;
  memcpy(&result, &upper, sizeof result);
  return result;
}
