// MPSHooks: how libtorch and torch._C._mps_* ask about the device. PyTorch looks the class up by
// the name "MPSHooks", once per process, and caches the answer for good.
#include <ATen/detail/MPSHooksInterface.h>
#include <c10/core/CPUAllocator.h>

#include <atomic>

#include "generator.h"
#include "memory.h"
#include "waits.h"

namespace at {

struct MPSHooks final : MPSHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasMPS() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isOnMacOSorNewer(unsigned major, unsigned minor) const override {
    return major < 15 || (major == 15 && minor == 0);
  }

  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  Device getDeviceFromPtr(void*) const override { return simulator::mps_device(); }

  const Generator& getDefaultGenerator(DeviceIndex) const override {
    return simulator::default_generator();
  }
  Generator getNewGenerator(DeviceIndex) const override {
    return make_generator<simulator::MpsGenerator>(c10::default_rng_seed_val);
  }

  Allocator* getMPSDeviceAllocator() const override { return simulator::allocator(); }
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  void emptyCache() const override {}
  void setMemoryFraction(double) const override {}
  size_t getCurrentAllocatedMemory() const override { return simulator::allocated_bytes(); }
  size_t getDriverAllocatedMemory() const override { return simulator::peak_bytes(); }
  size_t getRecommendedMaxMemory() const override { return size_t(16) << 30; }
  size_t getMaxBufferLength() const override { return size_t(8) << 30; }

  // Every operation is synchronous, so there is nothing to wait for or to time.
  void deviceSynchronize() const override { simulator::count_wait(simulator::Wait::kSynchronize); }
  void commitStream() const override {}
  uint32_t acquireEvent(bool) const override {
    static std::atomic<uint32_t> next{1};
    return next++;
  }
  void releaseEvent(uint32_t) const override {}
  void recordEvent(uint32_t) const override {}
  void waitForEvent(uint32_t) const override {}
  void synchronizeEvent(uint32_t) const override {
    simulator::count_wait(simulator::Wait::kSynchronize);
  }
  bool queryEvent(uint32_t) const override { return true; }
  double elapsedTimeOfEvents(uint32_t, uint32_t) const override { return 0.0; }
  void profilerStartTrace(const std::string&, bool) const override {}
  void profilerStopTrace() const override {}
};

REGISTER_MPS_HOOKS(MPSHooks);

}  // namespace at
