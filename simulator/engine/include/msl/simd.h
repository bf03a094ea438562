// Barriers, <metal_simdgroup> and quad functions, in terms of the backend's shuffle and reduction.
#pragma once

namespace metal {
METAL_FUNC void threadgroup_barrier(mem_flags f) { ::msl::backend::threadgroup_barrier(uint(f)); }
METAL_FUNC void threadgroup_barrier(mem_flags f, thread_scope) { threadgroup_barrier(f); }
METAL_FUNC void simdgroup_barrier(mem_flags f) { ::msl::backend::simdgroup_barrier(uint(f)); }
METAL_FUNC void simdgroup_barrier(mem_flags f, thread_scope) { simdgroup_barrier(f); }

template <class T>
METAL_FUNC T simd_shuffle(T v, ushort lane) {
  return ::msl::backend::shuffle(v, lane & 31);
}
template <class T>
METAL_FUNC T simd_broadcast(T v, ushort lane) {
  return ::msl::backend::shuffle(v, lane & 31);
}
uint __first_lane();
template <class T>
METAL_FUNC T simd_broadcast_first(T v) {
  return ::msl::backend::shuffle(v, __first_lane());
}
template <class T>
METAL_FUNC T simd_shuffle_xor(T v, ushort mask) {
  return ::msl::backend::shuffle(v, (::msl::backend::lane() ^ mask) & 31);
}
// Metal leaves the lanes without a source undefined; here they keep their own value.
template <class T>
METAL_FUNC T simd_shuffle_down(T v, ushort delta) {
  uint l = ::msl::backend::lane();
  return ::msl::backend::shuffle(v, l + delta < 32 ? l + delta : l);
}
template <class T>
METAL_FUNC T simd_shuffle_up(T v, ushort delta) {
  uint l = ::msl::backend::lane();
  return ::msl::backend::shuffle(v, l >= delta ? l - delta : l);
}
template <class T>
METAL_FUNC T simd_shuffle_rotate_down(T v, ushort delta) {
  return ::msl::backend::shuffle(v, (::msl::backend::lane() + delta) & 31);
}
template <class T>
METAL_FUNC T simd_shuffle_rotate_up(T v, ushort delta) {
  return ::msl::backend::shuffle(v, (::msl::backend::lane() - delta) & 31);
}
template <class T>
METAL_FUNC T simd_shuffle_and_fill_down(T v, T filling, ushort delta) {
  uint l = ::msl::backend::lane();
  bool inside = l + delta < 32;
  T a = ::msl::backend::shuffle(v, inside ? l + delta : l);
  T b = ::msl::backend::shuffle(filling, inside ? l : (l + delta) & 31);
  return inside ? a : b;
}
template <class T>
METAL_FUNC T simd_shuffle_and_fill_up(T v, T filling, ushort delta) {
  uint l = ::msl::backend::lane();
  bool inside = l >= delta;
  T a = ::msl::backend::shuffle(v, inside ? l - delta : l);
  T b = ::msl::backend::shuffle(filling, inside ? l : (l - delta) & 31);
  return inside ? a : b;
}

template <class T>
METAL_FUNC T quad_shuffle(T v, ushort lane) {
  return ::msl::backend::shuffle(v, (::msl::backend::lane() & ~3u) | (lane & 3));
}
template <class T>
METAL_FUNC T quad_broadcast(T v, ushort lane) {
  return quad_shuffle(v, lane);
}
template <class T>
METAL_FUNC T quad_shuffle_xor(T v, ushort mask) {
  return ::msl::backend::shuffle(v, ::msl::backend::lane() ^ (mask & 3));
}

// bfloat has no max and min of its own; like the others they return the operand that is not NaN.
#define MSL_REDUCTION(name, expression)   \
  struct name {                           \
    template <class T>                    \
    METAL_FUNC static T apply(T a, T b) { \
      expression;                         \
    }                                     \
  };
MSL_REDUCTION(__sum, return a + b)
MSL_REDUCTION(__product, return a * b)
MSL_REDUCTION(__and, return a & b)
MSL_REDUCTION(__or, return a | b)
MSL_REDUCTION(__xor, return a ^ b)
MSL_REDUCTION(__max, if constexpr (is_same_v<T, bfloat>) return a < b || a != a ? b : a;
    else return metal::max(a, b))
MSL_REDUCTION(__min, if constexpr (is_same_v<T, bfloat>) return b < a || a != a ? b : a;
    else return metal::min(a, b))
#undef MSL_REDUCTION

#define MSL_SIMD_REDUCTION(name, operation)               \
  template <class T>                                      \
  METAL_FUNC T name(T v) {                                \
    return ::msl::backend::template reduce<operation>(v); \
  }
MSL_SIMD_REDUCTION(simd_sum, __sum)
MSL_SIMD_REDUCTION(simd_product, __product)
MSL_SIMD_REDUCTION(simd_max, __max)
MSL_SIMD_REDUCTION(simd_min, __min)
MSL_SIMD_REDUCTION(simd_and, __and)
MSL_SIMD_REDUCTION(simd_or, __or)
MSL_SIMD_REDUCTION(simd_xor, __xor)
#undef MSL_SIMD_REDUCTION

#define MSL_QUAD_REDUCTION(name, operation)                  \
  template <class T>                                         \
  METAL_FUNC T name(T v) {                                   \
    return ::msl::backend::template reduce<operation, 4>(v); \
  }
MSL_QUAD_REDUCTION(quad_sum, __sum)
MSL_QUAD_REDUCTION(quad_product, __product)
MSL_QUAD_REDUCTION(quad_max, __max)
MSL_QUAD_REDUCTION(quad_min, __min)
#undef MSL_QUAD_REDUCTION

template <class T>
METAL_FUNC T simd_prefix_inclusive_sum(T v) {
  return ::msl::backend::template inclusive_scan<__sum>(v);
}
template <class T>
METAL_FUNC T simd_prefix_inclusive_product(T v) {
  return ::msl::backend::template inclusive_scan<__product>(v);
}
template <class T>
METAL_FUNC T simd_prefix_exclusive_sum(T v) {
  return simd_prefix_inclusive_sum(v) - v;
}

METAL_FUNC bool simd_all(bool p) { return simd_and((uint)p) != 0; }
METAL_FUNC bool simd_any(bool p) { return simd_or((uint)p) != 0; }
METAL_FUNC uint __first_lane() { return simd_min(::msl::backend::lane()); }
METAL_FUNC bool simd_is_first() { return ::msl::backend::lane() == __first_lane(); }

struct simd_vote {
  typedef ulong vote_t;
  vote_t v;
  explicit simd_vote(vote_t x = 0) : v(x) {}
  operator vote_t() const { return v; }
  bool all() const { return (uint)v == ~0u; }
  bool any() const { return v != 0; }
};
METAL_FUNC simd_vote simd_ballot(bool p) {
  return simd_vote(simd_or(p ? 1u << ::msl::backend::lane() : 0u));
}
}  // namespace metal
