// The device guard: one device, one stream, and everything on it has always finished.
#include <c10/core/DeviceCapability.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <chrono>

#include "exit.h"
#include "memory.h"
#include "waits.h"

namespace simulator {
namespace {

using EventTime = std::chrono::steady_clock::time_point;

EventTime& event_time(void* event) { return *static_cast<EventTime*>(event); }

struct MpsGuard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::DeviceType::MPS;
  MpsGuard() = default;
  explicit MpsGuard(c10::DeviceType) {}

  c10::DeviceType type() const override { return static_type; }
  c10::Device exchangeDevice(c10::Device) const override { return mps_device(); }
  c10::Device getDevice() const override { return mps_device(); }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.is_mps(), "Expected a MPS device, but got ", device);
    note_device_worker();
  }
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void synchronizeDevice(c10::DeviceIndex) const override { count_wait(Wait::kSynchronize); }

  c10::Stream getStream(c10::Device) const override { return the_stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return the_stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return the_stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return the_stream(); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { count_wait(Wait::kSynchronize); }

  void record(void** event, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {
    if (!*event) *event = new EventTime();
    event_time(*event) = std::chrono::steady_clock::now();
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override { count_wait(Wait::kSynchronize); }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override {
    delete static_cast<EventTime*>(event);
  }
  double elapsedTime(void* start, void* end, c10::DeviceIndex) const override {
    const std::chrono::duration<double, std::milli> elapsed = event_time(end) - event_time(start);
    return elapsed.count();
  }

  c10::DeviceCapability getDeviceCapability(c10::Device) const override {
    c10::DeviceCapability capability;
    uint64_t bits = 0;
    // Everything but float64, complex128 and the exotic types.
    for (auto kind : {c10::kIndex_Byte, c10::kIndex_Char, c10::kIndex_Short, c10::kIndex_Int,
             c10::kIndex_Long, c10::kIndex_UInt16, c10::kIndex_UInt32, c10::kIndex_UInt64,
             c10::kIndex_Bool, c10::kIndex_Half, c10::kIndex_BFloat16, c10::kIndex_Float,
             c10::kIndex_ComplexHalf, c10::kIndex_ComplexFloat}) {
      bits |= uint64_t(1) << kind;
    }
    capability.capability_data.capability_bits = bits;
    return capability;
  }

 private:
  static c10::Stream the_stream() { return c10::Stream(c10::Stream::DEFAULT, mps_device()); }
};

}  // namespace
}  // namespace simulator

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(MPS, simulator::MpsGuard)
}  // namespace c10::impl
