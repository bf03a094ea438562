// Device memory: host memory behind opaque handles, poisoned, and counted.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/Device.h>
#include <c10/core/Storage.h>

namespace simulator {

inline c10::Device mps_device() { return c10::Device(c10::DeviceType::MPS, 0); }

c10::Allocator* allocator();

// Makes the memory of a CPU storage into device memory without a copy; the CPU storage lives on
// inside the result. This is how the result of a CPU kernel becomes an mps tensor, so it counts
// as an allocation, and can be made to fail, as the allocation on a Mac would.
at::DataPtr adopt(const c10::Storage& cpu_storage);

// Memory outside any tensor; freed by hand. Returns the handle.
void* allocate_buffer(size_t nbytes);
void free_buffer(void* handle);

int64_t allocated_bytes();
int64_t peak_bytes();

}  // namespace simulator
