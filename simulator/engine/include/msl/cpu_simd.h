// CPU backend: simdgroup operations.  Each is a rendezvous (arrive): lanes leave their operands in
// the Simdgroup, the last to arrive does the work for all.  The functions are not inlined, so that
// their return address tells where in the program a lane waits.
//
// Under divergent control flow a shuffle or a reduction is one of the lanes that reach it: it is
// carried out for them once every other lane has returned or waits at a threadgroup barrier, which
// no lane can pass alone (scheduler.cpp).  Lanes that wait at two places are an error: whether they
// should meet later depends on where the GPU lets branches join, which is not modelled.
#pragma once

namespace msl {
namespace backend {
// What the lanes that wait together must agree on; the runtime knows the numbers (runtime.h).
enum Operation : uint {
  kShuffle = 1,
  kReduce = 2,
  kBarrier = 3,
  kMatrixProduct = 4,
  kMatrixMemory = 5,
  kScan = 6
};
// An operation in the low bits, a detail that must agree as well (type size, barrier flags) above.
MSL_INLINE constexpr uint operation(Operation kind, uint detail = 0) { return kind | detail << 4; }

MSL_INLINE inline uint lane() { return self()->lane; }
MSL_INLINE inline short2 frag_coord() {
  uint f = self()->fragment;
  short2 r;
  r.x = f & 7;
  r.y = f >> 3;
  return r;
}

// True for the lane that must carry out the operation and then clear `arrived`.
MSL_INLINE inline bool arrive(Lane* lane, uint what) {
  Simdgroup* s = lane->simdgroup;
  lane->wait_pc = __builtin_return_address(0);
  if (!s->arrived) {
    s->operation = what;
    s->site = lane->wait_pc;
  } else if (s->operation != what || s->site != lane->wait_pc) {
    msl_fail(lane, lane->wait_pc,
        "divergent simdgroup operation: other lanes of the simdgroup wait at another one");
  }
  s->arrived |= 1u << lane->lane;
  if (s->arrived == s->live) return true;
  msl_wait(lane);
  if (!s->completes) return false;
  s->completes = 0;
  return true;
}

MSL_INLINE inline void require_all_lanes(Lane* lane, const char* what) {
  if (lane->simdgroup->live != ~0u)
    msl_fail(lane, __builtin_return_address(0), "%s with lanes missing (live %08x)", what,
        lane->simdgroup->live);
}

template <class T>
__attribute__((noinline)) MSL_CONVERGENT T shuffle(T v, uint source) {
  static_assert(sizeof(T) <= 32, "type of a simdgroup operation");
  Lane* l = self();
  Simdgroup* s = l->simdgroup;
  MSL_COUNT(simd_ops);
  __builtin_memcpy(s->in[l->lane], &v, sizeof(T));
  s->source[l->lane] = source;
  if (arrive(l, operation(kShuffle))) {
    for (int i = 0; i < 32; i++) {
      uint from = s->source[i] & 31;
      if (s->arrived >> from & 1)
        __builtin_memcpy(s->out[i], s->in[from], sizeof(T));
      else
        __builtin_memset(s->out[i], 0, sizeof(T));
    }
    s->participants = s->arrived;
    s->arrived = 0;
  }
#ifdef MSL_CHECK
  if (s->live & ~s->participants & 1u << (source & 31))
    msl_fail(l, __builtin_return_address(0),
        "shuffle: reads from lane %u, which takes no part in it (lanes %08x do)", source & 31,
        s->participants);
#endif
  T r;
  __builtin_memcpy(&r, s->out[l->lane], sizeof(T));
  return r;
}

// Reduction in butterfly order over the active lanes, or over those of each WIDTH lanes.
template <class Op, int WIDTH = 32, class T>
__attribute__((noinline)) MSL_CONVERGENT T reduce(T v) {
  static_assert(sizeof(T) <= 32, "type of a simdgroup operation");
  Lane* l = self();
  Simdgroup* s = l->simdgroup;
  MSL_COUNT(simd_ops);
  __builtin_memcpy(s->in[l->lane], &v, sizeof(T));
  if (arrive(l, operation(kReduce, sizeof(T)))) {
    T value[32];
    bool on[32];
    for (int i = 0; i < 32; i++) {
      on[i] = s->arrived >> i & 1;
      __builtin_memcpy(&value[i], s->in[i], sizeof(T));
    }
    for (int d = WIDTH / 2; d; d /= 2) {
      for (int i = 0; i < 32; i++) {
        if (i % WIDTH >= d) continue;
        if (on[i] && on[i + d]) {
          value[i] = Op::apply(value[i], value[i + d]);
        } else if (on[i + d]) {
          value[i] = value[i + d];
          on[i] = true;
        }
      }
    }
    for (int i = 0; i < 32; i++) __builtin_memcpy(s->out[i], &value[i / WIDTH * WIDTH], sizeof(T));
    s->arrived = 0;
  }
  T r;
  __builtin_memcpy(&r, s->out[l->lane], sizeof(T));
  return r;
}

// The reduction of this lane's value and those of all active lanes before it, in order.
template <class Op, class T>
__attribute__((noinline)) MSL_CONVERGENT T inclusive_scan(T v) {
  static_assert(sizeof(T) <= 32, "type of a simdgroup operation");
  Lane* l = self();
  Simdgroup* s = l->simdgroup;
  MSL_COUNT(simd_ops);
  __builtin_memcpy(s->in[l->lane], &v, sizeof(T));
  if (arrive(l, operation(kScan, sizeof(T)))) {
    T sum;
    for (uint rest = s->arrived; rest; rest &= rest - 1) {
      int i = __builtin_ctz(rest);
      T next;
      __builtin_memcpy(&next, s->in[i], sizeof(T));
      sum = rest == s->arrived ? next : Op::apply(sum, next);
      __builtin_memcpy(s->out[i], &sum, sizeof(T));
    }
    s->arrived = 0;
  }
  T r;
  __builtin_memcpy(&r, s->out[l->lane], sizeof(T));
  return r;
}

__attribute__((noinline)) MSL_CONVERGENT inline void simdgroup_rendezvous(uint flags) {
  Lane* l = self();
  Simdgroup* s = l->simdgroup;
  MSL_COUNT(simd_barriers);
  if (arrive(l, operation(kBarrier, flags))) {
    if (flags & kMemThreadgroup) s->epoch++;
    s->arrived = 0;
  }
}
// mem_none orders nothing in memory: only a scheduling hint on a GPU.  It is free unless checking.
MSL_INLINE inline void simdgroup_barrier(uint flags) {
#ifndef MSL_CHECK
  if (flags == 0) {
    MSL_COUNT(simd_barriers);
    asm volatile("" ::: "memory");
    return;
  }
#endif
  simdgroup_rendezvous(flags);
}
MSL_INLINE MSL_CONVERGENT inline void threadgroup_barrier(uint flags) {
  asm volatile("" ::: "memory");
  msl_threadgroup_barrier(self(), flags);
  asm volatile("" ::: "memory");
}

// simdgroup_load and store: each lane moves its own two elements, so there is nothing to wait for;
// check mode still requires all 32 lanes to meet.
#ifdef MSL_CHECK
__attribute__((noinline)) MSL_CONVERGENT inline void matrix_memory_operation() {
  Lane* l = self();
  if (arrive(l, operation(kMatrixMemory))) {
    require_all_lanes(l, "simdgroup_load or simdgroup_store");
    l->simdgroup->arrived = 0;
  }
}
#else
MSL_INLINE MSL_CONVERGENT inline void matrix_memory_operation() {}
#endif

typedef float float8 __attribute__((ext_vector_type(8)));
MSL_INLINE inline void multiply_8x8(Simdgroup* s) {
  float8 b[8];
  for (int k = 0; k < 8; k++) b[k] = *(float8*)(s->b + 8 * k);
  for (int i = 0; i < 8; i++) {
    float8 c = *(float8*)(s->c + 8 * i);
    for (int k = 0; k < 8; k++) c = __builtin_elementwise_fma(float8(s->a[8 * i + k]), b[k], c);
    *(float8*)(s->d + 8 * i) = c;
  }
}
// Accumulates in float and rounds to D once.
template <class D, class A, class B, class C>
__attribute__((noinline)) MSL_CONVERGENT vec<D, 2> multiply_accumulate(A a, B b, C c) {
  Lane* l = self();
  Simdgroup* s = l->simdgroup;
  uint f = l->fragment;
  MSL_COUNT(mma);
  if (metal::is_same_v<A, vec<half, 2>> && metal::is_same_v<B, A>) MSL_COUNT(mma_half);
  if (metal::is_same_v<A, vec<bfloat, 2>> && metal::is_same_v<B, A>) MSL_COUNT(mma_bfloat);
  for (int i = 0; i < 2; i++) {
    s->a[f + i] = a[i];
    s->b[f + i] = b[i];
    s->c[f + i] = c[i];
  }
  if (arrive(l, operation(kMatrixProduct))) {
    require_all_lanes(l, "simdgroup_multiply_accumulate");
    multiply_8x8(s);
    s->arrived = 0;
  }
  vec<D, 2> r;
  for (int i = 0; i < 2; i++) r[i] = (D)s->d[f + i];
  return r;
}
}  // namespace backend
}  // namespace msl
