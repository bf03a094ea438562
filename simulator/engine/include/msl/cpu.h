// CPU backend of the library: a GPU thread is a fiber; the lanes of a simdgroup meet at
// collectives.
#pragma once
// clang-format off: the order matters
#include <msl/executor.h>
#include <msl/cpu_math.h>
#include <msl/cpu_simd.h>
#include <msl/cpu_atomics.h>
#include <msl/cpu_entry.h>
