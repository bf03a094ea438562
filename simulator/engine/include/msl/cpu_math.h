// CPU backend: scalar float functions (the C library's, so fast:: is as exact as precise::).
#pragma once

namespace msl {
MSL_INLINE inline Lane* self() {
  unsigned long sp;
  asm("mov %%rsp, %0" : "=r"(sp));
  return lane_of(sp);
}
#define MSL_COUNT(field) (::msl::self()->counters->field++)

namespace core {
#define MSL_CORE1(name, function) \
  MSL_INLINE inline float name(float x) { return function(x); }
#define MSL_CORE1_COUNTED(name, function, counter) \
  MSL_INLINE inline float name(float x) {          \
    MSL_COUNT(counter);                            \
    return function(x);                            \
  }
#define MSL_CORE2(name, function) \
  MSL_INLINE inline float name(float x, float y) { return function(x, y); }
MSL_CORE1_COUNTED(exp, __builtin_expf, exps)
MSL_CORE1_COUNTED(exp2, __builtin_exp2f, exps)
MSL_CORE1_COUNTED(tanh, __builtin_tanhf, exps)
MSL_CORE1_COUNTED(log, __builtin_logf, logs)
MSL_CORE1_COUNTED(log2, __builtin_log2f, logs)
MSL_INLINE inline float exp10(float x) {
  MSL_COUNT(exps);
  return __builtin_powf(10.0f, x);
}
MSL_CORE1(log10, __builtin_log10f)
MSL_CORE1(sqrt, __builtin_sqrtf)
MSL_INLINE inline float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
MSL_CORE1(sin, __builtin_sinf)
MSL_CORE1(cos, __builtin_cosf)
MSL_CORE1(tan, __builtin_tanf)
MSL_CORE1(asin, __builtin_asinf)
MSL_CORE1(acos, __builtin_acosf)
MSL_CORE1(atan, __builtin_atanf)
MSL_CORE1(sinh, __builtin_sinhf)
MSL_CORE1(cosh, __builtin_coshf)
MSL_CORE1(asinh, __builtin_asinhf)
MSL_CORE1(acosh, __builtin_acoshf)
MSL_CORE1(atanh, __builtin_atanhf)
MSL_CORE1(floor, __builtin_floorf)
MSL_CORE1(ceil, __builtin_ceilf)
MSL_CORE1(round, __builtin_roundf)
MSL_CORE1(rint, __builtin_rintf)
MSL_CORE1(trunc, __builtin_truncf)
MSL_CORE1(fabs, __builtin_fabsf)
MSL_CORE1(abs, __builtin_fabsf)
MSL_CORE2(pow, __builtin_powf)
MSL_CORE2(powr, __builtin_powf)
MSL_CORE2(fmod, __builtin_fmodf)
MSL_CORE2(fdim, __builtin_fdimf)
MSL_CORE2(atan2, __builtin_atan2f)
MSL_CORE2(copysign, __builtin_copysignf)
MSL_CORE2(fmax, __builtin_fmaxf)
MSL_CORE2(fmin, __builtin_fminf)
MSL_CORE2(max, __builtin_fmaxf)
MSL_CORE2(min, __builtin_fminf)
MSL_INLINE inline float ldexp(float x, int e) { return __builtin_ldexpf(x, e); }
#undef MSL_CORE1
#undef MSL_CORE1_COUNTED
#undef MSL_CORE2
}  // namespace core
}  // namespace msl
