// <metal_simdgroup_matrix>: 8x8 matrices held by the 32 lanes, two neighbouring elements of a row
// each. The backend knows which (frag_coord); the CPU's layout is the one that MLX and PyTorch rely
// on.
#pragma once

namespace metal {
template <class T, int C, int R>
struct simdgroup_matrix {
  static_assert(C == 8 && R == 8, "only 8x8");
  // bool is no operand of a product; PyTorch's mask fragment only names the type.
  static_assert(
      is_same_v<T, half> || is_same_v<T, bfloat> || is_same_v<T, float> || is_same_v<T, bool>,
      "simdgroup_matrix element type");
  typedef vec<T, 2> storage_type;
  storage_type __t;

  METAL_FUNC simdgroup_matrix() {}
  METAL_FUNC explicit simdgroup_matrix(T diagonal) {
    short2 c = ::msl::backend::frag_coord();
    __t[0] = c.x == c.y ? diagonal : T(0);
    __t[1] = c.x + 1 == c.y ? diagonal : T(0);
  }
  METAL_FUNC thread storage_type& thread_elements() { return __t; }
  METAL_FUNC const thread storage_type& thread_elements() const { return __t; }
};
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;

template <class T, int C, int R>
METAL_FUNC simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T v) {
  simdgroup_matrix<T, C, R> m;
  m.__t = vec<T, 2>(v);
  return m;
}

// Index of the lane's two elements in memory.
struct __matrix_index {
  ulong first, second;
};
METAL_FUNC __matrix_index __locate(ulong per_row, ulong2 origin, bool transpose) {
  short2 c = ::msl::backend::frag_coord();
  ulong x = c.x, y = c.y;
  if (transpose) {
    ulong i = (origin.y + x) * per_row + origin.x + y;
    return {i, i + per_row};
  }
  ulong i = (origin.y + y) * per_row + origin.x + x;
  return {i, i + 1};
}

#define MSL_MATRIX_MEMORY(SPACE)                                                                   \
  template <class T>                                                                               \
  METAL_FUNC void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& m, const SPACE T* source,       \
      ulong per_row = 8, ulong2 origin = ulong2(0), bool transpose = false) {                      \
    ::msl::backend::matrix_memory_operation();                                                     \
    __matrix_index i = __locate(per_row, origin, transpose);                                       \
    m.__t[0] = source[i.first];                                                                    \
    m.__t[1] = source[i.second];                                                                   \
  }                                                                                                \
  template <class T>                                                                               \
  METAL_FUNC void simdgroup_store(simdgroup_matrix<T, 8, 8> m, SPACE T* target, ulong per_row = 8, \
      ulong2 origin = ulong2(0), bool transpose = false) {                                         \
    ::msl::backend::matrix_memory_operation();                                                     \
    __matrix_index i = __locate(per_row, origin, transpose);                                       \
    target[i.first] = m.__t[0];                                                                    \
    target[i.second] = m.__t[1];                                                                   \
  }
MSL_MATRIX_MEMORY(device)
MSL_MATRIX_MEMORY(threadgroup)
#undef MSL_MATRIX_MEMORY

template <class D, class A, class B, class C>
METAL_FUNC void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>& d,
    simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c) {
  d.__t = ::msl::backend::template multiply_accumulate<D>(a.__t, b.__t, c.__t);
}
template <class D, class A, class B>
METAL_FUNC void simdgroup_multiply(
    thread simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b) {
  d.__t = ::msl::backend::template multiply_accumulate<D>(a.__t, b.__t, vec<D, 2>(D(0)));
}
template <class T>
METAL_FUNC simdgroup_matrix<T, 8, 8> operator*(
    simdgroup_matrix<T, 8, 8> a, simdgroup_matrix<T, 8, 8> b) {
  simdgroup_matrix<T, 8, 8> d;
  simdgroup_multiply(d, a, b);
  return d;
}
}  // namespace metal
