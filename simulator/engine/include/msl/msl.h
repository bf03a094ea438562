// The Metal Shading Language standard library in clang C++: everything <metal_stdlib> and its
// neighbours declare, as far as it is covered.  Freestanding.  The compiler puts it in front of
// every program as a precompiled header.
//
// The common part needs a backend, which supplies msl::core (scalar float functions) and
// msl::backend (lanes, barriers, shuffles, matrix products, atomics, kernel entries).  The CPU
// backend is in msl/cpu.h; MSL_PTX selects another one beside it.
#pragma once
#pragma GCC system_header

// clang-format off: the order matters
#include <msl/address_spaces.h>
#include <msl/macros.h>
#include <msl/types.h>
#include <msl/type_traits.h>
#include <msl/limits.h>
#include <msl/vector.h>
#ifdef MSL_PTX
#include <msl/ptx.h>
#else
#include <msl/cpu.h>
#endif
#include <msl/math.h>
#include <msl/relational.h>
#include <msl/simd.h>
#include <msl/simdgroup_matrix.h>
#include <msl/atomics.h>
#include <msl/arguments.h>
