// Kernel arguments.  The pre-pass writes one tag per parameter, taken from its [[attribute]]; the
// parameter's type (pointer, reference, scalar, vector) is deduced from the kernel function.
#pragma once

namespace msl {
template <class P>
struct parameter {
  static constexpr bool is_reference = false;
  typedef P pointer;
  // Whether the kernel promises not to write the buffer.
  static constexpr bool read_only = __is_const(__remove_pointer(P));
};
template <class P>
struct parameter<P&> {
  static constexpr bool is_reference = true;
  typedef P* pointer;
  static constexpr bool read_only = __is_const(P);
};

template <class P>
MSL_INLINE P from_address(void* address) {
  if constexpr (parameter<P>::is_reference)
    return *(typename parameter<P>::pointer)address;
  else
    return (P)address;
}

// Tags: get() makes the argument; index is the buffer number, or -1.
template <int I>
struct arg_buffer {
  static_assert(I >= 0 && I < 31, "buffer index: Metal has 31 buffers, 0 to 30");
  static constexpr int index = I;
  template <class P, class Invocation>
  static MSL_INLINE P get(Invocation& invocation) {
    return from_address<P>(invocation.buffer(I));
  }
};
template <int I>
struct arg_threadgroup {
  static_assert(I >= 0 && I < 31, "threadgroup argument index");
  static constexpr int index = -1;
  template <class P, class Invocation>
  static MSL_INLINE P get(Invocation& invocation) {
    return from_address<P>(invocation.threadgroup_argument(I));
  }
};

// A grid attribute may be declared with one, two or three components.
template <class P>
MSL_INLINE P from_position(uint3 v) {
  if constexpr (is_vector<P>) {
    P r;
    for (int i = 0; i < vector_size<P>; i++) r[i] = v[i];
    return r;
  } else {
    return (P)v.x;
  }
}

#define MSL_POSITION(name)                            \
  struct arg_##name {                                 \
    static constexpr int index = -1;                  \
    template <class P, class Invocation>              \
    static MSL_INLINE P get(Invocation& invocation) { \
      return from_position<P>(invocation.name());     \
    }                                                 \
  };
#define MSL_SCALAR(name)                              \
  struct arg_##name {                                 \
    static constexpr int index = -1;                  \
    template <class P, class Invocation>              \
    static MSL_INLINE P get(Invocation& invocation) { \
      return (P)invocation.name();                    \
    }                                                 \
  };
MSL_POSITION(thread_position_in_grid)
MSL_POSITION(thread_position_in_threadgroup)
MSL_POSITION(threadgroup_position_in_grid)
MSL_POSITION(threads_per_threadgroup)
MSL_POSITION(threadgroups_per_grid)
MSL_POSITION(threads_per_grid)
MSL_POSITION(dispatch_threads_per_threadgroup)
MSL_SCALAR(thread_index_in_threadgroup)
MSL_SCALAR(thread_index_in_simdgroup)
MSL_SCALAR(thread_index_in_quadgroup)
MSL_SCALAR(simdgroup_index_in_threadgroup)
MSL_SCALAR(quadgroup_index_in_threadgroup)
MSL_SCALAR(threads_per_simdgroup)
MSL_SCALAR(thread_execution_width)
MSL_SCALAR(simdgroups_per_threadgroup)
MSL_SCALAR(quadgroups_per_threadgroup)
MSL_SCALAR(dispatch_simdgroups_per_threadgroup)
#undef MSL_POSITION
#undef MSL_SCALAR

template <auto F, class... Tags>
struct caller;
template <class... P, void (*F)(P...), class... Tags>
struct caller<F, Tags...> {
  static_assert(
      sizeof...(P) == sizeof...(Tags), "kernel parameters and attributes differ in number");
  template <class Invocation>
  static MSL_INLINE void call(Invocation& invocation) {
    F(Tags::template get<P>(invocation)...);
  }
  static constexpr unsigned declared =
      ((Tags::index >= 0 ? 1u << (Tags::index & 31) : 0u) | ... | 0u);
  static constexpr unsigned read_only =
      ((Tags::index >= 0 && parameter<P>::read_only ? 1u << (Tags::index & 31) : 0u) | ... | 0u);
};
}  // namespace msl
