// Opaque storage handles.
//
// On a Mac, storage().data() of an mps tensor is an id<MTLBuffer>: an object, not memory that a
// CPU may read. Here it is the host address with one high bit flipped, a non-canonical x86-64
// address. So code that mistakes data_ptr() for memory faults at once, adding a storage offset
// still works, and translating costs one xor.
#pragma once

#include <cstdint>

namespace simulator {

inline constexpr uintptr_t kHandleTag = uintptr_t(1) << 62;

inline void* flip_tag(const void* pointer) {
  return pointer ? reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(pointer) ^ kHandleTag)
                 : nullptr;
}

inline void* handle_of(const void* host) { return flip_tag(host); }
inline void* host_of(const void* handle) { return flip_tag(handle); }

}  // namespace simulator
