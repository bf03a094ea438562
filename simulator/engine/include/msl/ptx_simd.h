// PTX backend: simdgroup operations.  "Hardware lane" is the GPU's number, "lane" Metal's.
#pragma once

namespace metal {
struct __sum;
struct __min;
struct __max;
struct __and;
struct __or;
struct __xor;
}  // namespace metal

namespace msl {
namespace backend {
MSL_INLINE inline uint hardware_lane() {
  uint r;
  asm("mov.u32 %0, %%laneid;" : "=r"(r));
  return r;
}
MSL_INLINE constexpr uint to_metal_lane(uint hardware) {
  return (hardware & 0x11) | (hardware & 8) >> 1 | (hardware & 4) >> 1 | (hardware & 2) << 2;
}
MSL_INLINE constexpr uint to_hardware_lane(uint lane) {
  return (lane & 0x11) | (lane & 8) >> 2 | (lane & 4) << 1 | (lane & 2) << 1;
}

MSL_INLINE inline uint lane() { return to_metal_lane(hardware_lane()); }
MSL_INLINE inline short2 frag_coord() {
  uint h = hardware_lane();
  short2 r;
  r.x = (h & 3) * 2;
  r.y = h >> 2;
  return r;
}

// ---- shuffles and reductions
MSL_INLINE MSL_CONVERGENT inline uint shuffle_word(uint v, uint hardware) {
  uint r;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, 31, 0xffffffff;" : "=r"(r) : "r"(v), "r"(hardware));
  return r;
}
MSL_INLINE MSL_CONVERGENT inline float shuffle_float(float v, uint hardware) {
  return __builtin_bit_cast(float, shuffle_word(__builtin_bit_cast(uint, v), hardware));
}

template <class T>
MSL_INLINE MSL_CONVERGENT T shuffle(T v, uint source) {
  constexpr uint words = (sizeof(T) + 3) / 4;
  uint buffer[words] = {};
  __builtin_memcpy(buffer, &v, sizeof(T));
  for (uint i = 0; i < words; i++) buffer[i] = shuffle_word(buffer[i], to_hardware_lane(source));
  __builtin_memcpy(&v, buffer, sizeof(T));
  return v;
}

// A reduction of integers over all lanes is one instruction.
#define MSL_REDUX(operation, type, instruction)                                        \
  MSL_INLINE MSL_CONVERGENT inline type redux(const metal::operation*, type v) {       \
    type r;                                                                            \
    asm volatile("redux.sync." instruction " %0, %1, 0xffffffff;" : "=r"(r) : "r"(v)); \
    return r;                                                                          \
  }
MSL_REDUX(__sum, int, "add.s32")
MSL_REDUX(__sum, uint, "add.u32")
MSL_REDUX(__min, int, "min.s32")
MSL_REDUX(__min, uint, "min.u32")
MSL_REDUX(__max, int, "max.s32")
MSL_REDUX(__max, uint, "max.u32")
MSL_REDUX(__and, uint, "and.b32")
MSL_REDUX(__or, uint, "or.b32")
MSL_REDUX(__xor, uint, "xor.b32")
#undef MSL_REDUX

template <class Op, int WIDTH = 32, class T>
MSL_INLINE MSL_CONVERGENT T reduce(T v) {
  if constexpr (WIDTH == 32 && (__is_same(T, int) || __is_same(T, uint)) &&
                requires { redux(static_cast<const Op*>(nullptr), v); }) {
    return redux(static_cast<const Op*>(nullptr), v);
  }
  for (uint d = WIDTH / 2; d; d /= 2) v = Op::apply(v, shuffle(v, lane() ^ d));
  return v;
}
template <class Op, class T>
MSL_INLINE MSL_CONVERGENT T inclusive_scan(T v) {
  uint l = lane();
  for (uint d = 1; d < 32; d *= 2) {
    T before = shuffle(v, l >= d ? l - d : l);
    if (l >= d) v = Op::apply(before, v);
  }
  return v;
}

// ---- barriers
MSL_INLINE MSL_CONVERGENT inline void simdgroup_barrier(uint) {
  asm volatile("bar.warp.sync 0xffffffff;" ::: "memory");
}
MSL_INLINE MSL_CONVERGENT inline void threadgroup_barrier(uint) {
  asm volatile("bar.sync 0;" ::: "memory");
}

// ---- matrix products
MSL_INLINE inline void matrix_memory_operation() {}

template <class T>
MSL_INLINE uint pack(vec<T, 2> v) {
  return __builtin_bit_cast(uint, v);
}
MSL_INLINE MSL_CONVERGENT inline uint transpose(uint v) {
  uint r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}

// Half precision operands: the tensor cores' 16x8x8 product, of which the lower eight rows are
// zero.  A lies in the registers as it should, B has to be transposed.
#define MSL_TENSOR_CORE(type, name)                                    \
  MSL_INLINE MSL_CONVERGENT inline void tensor_core_product(           \
      float& c0, float& c1, vec<type, 2> a, vec<type, 2> b) {          \
    float unused0 = 0.0f, unused1 = 0.0f;                              \
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." name "." name \
                 ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"   \
        : "+f"(c0), "+f"(c1), "+f"(unused0), "+f"(unused1)             \
        : "r"(pack<type>(a)), "r"(0u), "r"(transpose(pack<type>(b)))); \
  }
MSL_TENSOR_CORE(half, "f16")
MSL_TENSOR_CORE(bfloat, "bf16")
#undef MSL_TENSOR_CORE

// float operands: fused multiply-adds in the order of k, exactly as the CPU backend.
MSL_INLINE MSL_CONVERGENT inline void float_product(float& c0, float& c1, float2 a, float2 b) {
  uint h = hardware_lane(), row = h & ~3u, pair = h & 3;
  for (uint k = 0; k < 8; k++) {
    float left = shuffle_float(k % 2 ? a.y : a.x, row + k / 2);
    c0 = __builtin_fmaf(left, shuffle_float(b.x, k * 4 + pair), c0);
    c1 = __builtin_fmaf(left, shuffle_float(b.y, k * 4 + pair), c1);
  }
  // Never stores. Without it the assembler may move multiplications behind a branch, to where their
  // sums are used, and keep hundreds of shuffled words until then.
  asm volatile(
      "{.reg .pred p; setp.gt.u32 p, %2, 31; @p st.local.v2.f32 [%2], {%0, %1};}" ::"f"(c0),
      "f"(c1), "r"(h));
}

// float operands in a mode of their own: tensor cores multiply numbers of fewer bits, so that an
// operand is split into two of them, the large part and what is left.  Of the 16 rows of a product
// the upper eight take the large parts of A, the lower eight the small ones; both results are
// added.  Operands have to be finite: infinity less infinity is NaN.
#define MSL_PAIR_OF_HALVES(name, which)                                         \
  MSL_INLINE inline uint name(uint first, uint second) {                        \
    uint r;                                                                     \
    asm("prmt.b32 %0, %1, %2, " which ";" : "=r"(r) : "r"(first), "r"(second)); \
    return r;                                                                   \
  }
MSL_PAIR_OF_HALVES(low_halves, "0x5410")
MSL_PAIR_OF_HALVES(high_halves, "0x7632")
#undef MSL_PAIR_OF_HALVES

MSL_INLINE inline uint bits_of(float v) { return __builtin_bit_cast(uint, v); }
MSL_INLINE inline float leading(float v) {  // what high_halves takes of it
  return __builtin_bit_cast(float, bits_of(v) & 0xffff0000u);
}

// Whether the compiler knows that a float was a bfloat.
#define MSL_WAS_BFLOAT(v) \
  __builtin_constant_p(__builtin_bit_cast(uint, (float)(bfloat)v) == __builtin_bit_cast(uint, v))

// B was bfloat and is one number.  A has 16 bits.
MSL_INLINE MSL_CONVERGENT inline void split_product(
    float& c0, float& c1, float2 a, vec<bfloat, 2> b) {
  uint large = high_halves(bits_of(a.x), bits_of(a.y));
  vec<bfloat, 2> small = {(bfloat)(a.x - leading(a.x)), (bfloat)(a.y - leading(a.y))};
  float small0 = 0.0f, small1 = 0.0f;
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+f"(c0), "+f"(c1), "+f"(small0), "+f"(small1)
      : "r"(large), "r"(pack<bfloat>(small)), "r"(transpose(pack<bfloat>(b))));
  c0 += small0;
  c1 += small1;
}

// The parts of A and B are TF32 numbers, of 11 bits each.  Both are cut off, the small one by the
// tensor cores: to round them takes several instructions.  Column t of A meets row t of B and t + 4
// meets t + 4, where a lane has columns 2 t and 2 t + 1 of A: the sum over k is in another order.
// The words of B are transposed in two halves.  The sum so far is added here, where it is rounded:
// tensor cores would cut it off.
MSL_INLINE inline float tf32(float v) {
  return __builtin_bit_cast(float, bits_of(v) & 0xffffe000u);
}
MSL_INLINE MSL_CONVERGENT inline void split_product(float& c0, float& c1, float2 a, float2 b) {
  uint low = transpose(low_halves(bits_of(b.x), bits_of(b.y)));
  uint high = transpose(high_halves(bits_of(b.x), bits_of(b.y)));
  float2 right = {
      __builtin_bit_cast(float, low_halves(low, high)),
      __builtin_bit_cast(float, high_halves(low, high)),
  };
  float2 a_large = {tf32(a.x), tf32(a.y)}, a_small = {a.x - a_large.x, a.y - a_large.y};
  float2 b_large = {tf32(right.x), tf32(right.y)};
  float2 b_small = {right.x - b_large.x, right.y - b_large.y};
  float large0 = 0.0f, large1 = 0.0f, small0 = 0.0f, small1 = 0.0f;
#define MSL_TF32_PRODUCT(b)                                                               \
  asm volatile(                                                                           \
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, " \
      "{%8,%9}, {%0,%1,%2,%3};"                                                           \
      : "+f"(large0), "+f"(large1), "+f"(small0), "+f"(small1)                            \
      : "r"(bits_of(a_large.x)), "r"(bits_of(a_small.x)), "r"(bits_of(a_large.y)),        \
      "r"(bits_of(a_small.y)), "r"(bits_of((b).x)), "r"(bits_of((b).y)))
  MSL_TF32_PRODUCT(b_small);
  MSL_TF32_PRODUCT(b_large);
#undef MSL_TF32_PRODUCT
  c0 += large0 + small0;
  c1 += large1 + small1;
}

// Accumulates in float and rounds to D once.  MSL_EQUAL_RATE keeps half precision operands off the
// tensor cores: they then cost what float operands cost, as on an Apple GPU.
template <class D, class A, class B, class C>
MSL_INLINE MSL_CONVERGENT vec<D, 2> multiply_accumulate(A a, B b, C c) {
  typedef typename vector_traits<A>::element E;
#ifdef MSL_EQUAL_RATE
  constexpr bool use_tensor_cores = false;
#else
  constexpr bool use_tensor_cores = is_same_v<A, B> && sizeof(E) == 2;
#endif
  float c0 = (float)c[0], c1 = (float)c[1];
  if constexpr (use_tensor_cores) {
    tensor_core_product(c0, c1, a, b);
  } else {
    float2 left = {(float)a[0], (float)a[1]}, right = {(float)b[0], (float)b[1]};
#ifdef MSL_SPLIT_FLOATS
    float x = right.x, y = right.y;
    if (MSL_WAS_BFLOAT(x) && MSL_WAS_BFLOAT(y)) {
      split_product(c0, c1, left, vec<bfloat, 2>{(bfloat)x, (bfloat)y});
    } else {
      split_product(c0, c1, left, right);
    }
#else
    float_product(c0, c1, left, right);
#endif
  }
  vec<D, 2> r;
  r[0] = (D)c0;
  r[1] = (D)c1;
  return r;
}
}  // namespace backend
}  // namespace msl
