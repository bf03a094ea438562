// Metal's address spaces as clang address spaces.  They must be distinct types: programs specialise
// templates on `device T*`, `threadgroup T*` and `thread T*`, and a pointer of the wrong space must
// be an error.  x86 treats them all as ordinary memory; check mode finds the accesses by their
// number.
#pragma once

#define device __attribute__((address_space(1)))
#define threadgroup __attribute__((address_space(3)))
// `constant` memory cannot be written, hence the const.
#ifdef MSL_PTX
#define constant const __attribute__((address_space(100)))
#else
#define constant const __attribute__((address_space(2)))
#endif
#define thread

#define METAL_FUNC inline __attribute__((always_inline))
#define MSL_INLINE __attribute__((always_inline))
// Kernels stay separate functions, so that reports can name them.
#ifdef MSL_PTX
#define MSL_KERNEL static inline __attribute__((always_inline))
#else
#define MSL_KERNEL static __attribute__((noinline))
#endif
// Calls at two places stay two: lanes that come from different branches do not meet.
#define MSL_CONVERGENT __attribute__((convergent, nomerge))
