// PTX backend of the library, for NVIDIA GPUs: a simdgroup is a warp, threadgroup memory is shared
// memory.  The program is compiled by engine/ptx.py.
//
// Lanes are renumbered so that Apple's layout of an 8x8 matrix becomes that of mma.sync's
// accumulators: a lane of the GPU with the bits (b4 b3 b2 b1 b0) is Metal's lane (b4 b1 b3 b2 b0)
// and holds row (b4 b3 b2), columns 2 * (b1 b0) and the next.
//
// Every simdgroup operation needs all 32 lanes here; under divergence it is undefined.
#pragma once
// clang-format off: the order matters
#include <msl/ptx_math.h>
#include <msl/ptx_simd.h>
#include <msl/ptx_atomics.h>
#include <msl/ptx_entry.h>
