#include "memory.h"

#include <c10/core/CachingDeviceAllocator.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "faults.h"
#include "handle.h"
#include "unexecuted.h"

namespace simulator {
namespace {

std::atomic<int64_t> allocated{0}, peak{0}, allocations{0}, total{0};

// Reading memory that nothing has written must show: 0xFF bytes are NaN in every float type.
constexpr int kPoisonByte = 0xFF;
constexpr size_t kAlignment = 256;  // more than any Metal type asks for

struct Block {
  void* host = nullptr;
  size_t nbytes = 0;
  bool owned = false;    // host came from posix_memalign
  c10::Storage adopted;  // or belongs to this CPU storage
};

void count_allocation(int64_t nbytes) {
  ++allocations;
  total += nbytes;
  const int64_t now = allocated += nbytes;
  int64_t highest = peak.load();
  while (now > highest && !peak.compare_exchange_weak(highest, now)) {
  }
}

// The recording engine measures the host's time, and a Mac's allocator answers from a cache.
std::mutex spare_mutex;
std::unordered_map<size_t, std::vector<void*>> spare;  // by rounded size

void* take_spare(size_t rounded) {
  std::lock_guard<std::mutex> lock(spare_mutex);
  auto& memory = spare[rounded];
  if (memory.empty()) return nullptr;
  void* host = memory.back();
  memory.pop_back();
  return host;
}

size_t rounded_size(size_t nbytes) { return (nbytes + kAlignment - 1) / kAlignment * kAlignment; }

void delete_block(void* context) {
  auto* block = static_cast<Block*>(context);
  allocated -= static_cast<int64_t>(block->nbytes);
  if (block->owned && only_recording()) {
    std::lock_guard<std::mutex> lock(spare_mutex);
    spare[rounded_size(block->nbytes)].push_back(block->host);
  } else if (block->owned) {
    std::free(block->host);
  }
  delete block;
}

at::DataPtr data_ptr_of(Block* block) {
  count_allocation(static_cast<int64_t>(block->nbytes));
  return {handle_of(block->host), block, &delete_block, mps_device()};
}

void check_memory(bool available, size_t nbytes) {
  // A plain RuntimeError, as PyTorch's MPS allocator raises it, not torch.OutOfMemoryError.
  TORCH_CHECK(available, "MPS backend out of memory (MPS allocated: ", allocated.load(),
      " bytes, other allocations: 0 bytes, max allowed: 17179869184 bytes). "
      "Tried to allocate ",
      nbytes,
      " bytes on shared pool. Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper "
      "limit for memory allocations (may cause system failure).");
}

struct DeviceMemory final : c10::DeviceAllocator {
  at::DataPtr allocate(size_t nbytes) override {
    if (nbytes == 0) return {nullptr, nullptr, &c10::detail::deleteNothing, mps_device()};
    check_memory(!fault_is_due(Fault::kAllocate), nbytes);
    auto block = std::make_unique<Block>();
    const size_t rounded = rounded_size(nbytes);
    if (only_recording()) block->host = take_spare(rounded);
    if (!block->host) {
      check_memory(posix_memalign(&block->host, kAlignment, rounded) == 0, nbytes);
    }
    if (!only_recording()) std::memset(block->host, kPoisonByte, rounded);
    block->nbytes = nbytes;
    block->owned = true;
    return data_ptr_of(block.release());
  }
  at::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t nbytes) const override {
    std::memcpy(host_of(to), host_of(from), nbytes);
  }

  // The rest is what torch.accelerator.memory_* asks for. There is no cache to empty.
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    stats.allocated_bytes[0].current = allocated;
    stats.allocated_bytes[0].peak = peak;
    stats.reserved_bytes[0] = stats.allocated_bytes[0];
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override { peak = allocated.load(); }
};

DeviceMemory device_memory;

std::mutex buffers_mutex;
std::unordered_map<void*, at::DataPtr> buffers;  // what allocate_buffer() has given out

[[maybe_unused]] const int registered = [] {
  c10::SetAllocator(c10::DeviceType::MPS, &device_memory, /*priority=*/0);
  return 0;
}();

}  // namespace

c10::Allocator* allocator() { return &device_memory; }

at::DataPtr adopt(const c10::Storage& cpu_storage) {
  if (cpu_storage.nbytes() > 0) {
    check_memory(!fault_is_due(Fault::kAllocate), cpu_storage.nbytes());
  }
  auto* block = new Block();
  block->adopted = cpu_storage;
  block->host = cpu_storage.mutable_data();
  block->nbytes = cpu_storage.nbytes();
  return data_ptr_of(block);
}

void* allocate_buffer(size_t nbytes) {
  auto data = device_memory.allocate(nbytes);
  void* handle = data.get();
  std::lock_guard<std::mutex> lock(buffers_mutex);
  buffers[handle] = std::move(data);
  return handle;
}

void free_buffer(void* handle) {
  std::lock_guard<std::mutex> lock(buffers_mutex);
  TORCH_CHECK(buffers.erase(handle) == 1, "simulator: freeing a buffer that is not allocated");
}

int64_t allocated_bytes() { return allocated; }
int64_t peak_bytes() { return peak; }

}  // namespace simulator

extern "C" {

void simulator_memory(int64_t* allocated, int64_t* peak, int64_t* allocations, int64_t* total) {
  *allocated = simulator::allocated;
  *peak = simulator::peak;
  *allocations = simulator::allocations;
  *total = simulator::total;
}
void simulator_reset_peak() { simulator::peak = simulator::allocated.load(); }

}  // extern "C"
