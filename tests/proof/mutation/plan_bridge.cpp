// native/plan.cpp behind a C interface, so that tests call a (mutated) plan without torch.
#include <algorithm>
#include <cstring>

#include "native/plan.h"

namespace {

/// One tensor: sizes, strides, offset in elements. Same layout in harness.py.
struct FlatLayout {
  int64_t sizes[4];
  int64_t strides[4];
  int64_t offset;
};

struct Request {
  FlatLayout q, k, v, out, dout;
  int64_t dtype, has_mask, has_alibi, has_sinks, window_left, window_right, diagonal, backward,
      scratch_bytes;
  double dropout_p, scale, softcap;
  char tiles[128];
};

orchard::Layout layout(const FlatLayout& flat) {
  orchard::Layout result;
  std::copy(flat.sizes, flat.sizes + 4, result.sizes.begin());
  std::copy(flat.strides, flat.strides + 4, result.strides.begin());
  result.offset = flat.offset;
  return result;
}

}  // namespace

extern "C" {

/// The plan as JSON, its params, and (groups x, groups y, threads) of each kernel.
void orchard_test_plan(const Request* request, char* json, uint64_t capacity,
    AttentionParams* params, uint64_t* geometry) {
  orchard::Problem problem;
  problem.dtype = static_cast<orchard::DType>(request->dtype);
  problem.q = layout(request->q);
  problem.k = layout(request->k);
  problem.v = layout(request->v);
  problem.has_mask = request->has_mask;
  problem.has_alibi = request->has_alibi;
  problem.has_sinks = request->has_sinks;
  problem.dropout_p = request->dropout_p;
  problem.scale = request->scale;
  problem.window_left = request->window_left;
  problem.window_right = request->window_right;
  problem.diagonal = request->diagonal;
  problem.softcap = request->softcap;
  problem.scratch_bytes = request->scratch_bytes;
  problem.tiles = request->tiles;
  const orchard::Layout out = layout(request->out);
  const orchard::Plan plan = request->backward
                                 ? orchard::plan_backward(problem, out, layout(request->dout))
                                 : orchard::plan_forward(problem, out);
  std::strncpy(json, orchard::to_json(plan).c_str(), capacity - 1);
  for (const orchard::KernelLaunch& launch : plan.launches) {
    AttentionParams set{};
    launch.set(set);
    if (set.first_kv_head != launch.first_kv_head || set.key_begin != launch.key_begin ||
        set.key_end != launch.key_end) {
      std::strncpy(json, "\"KernelLaunch::set\"", capacity - 1);
    }
  }
  *params = plan.params;
  for (size_t i = 0; i < plan.kernels.size() && i < 4; i++) {
    *geometry++ = plan.kernels[i].groups[0];
    *geometry++ = plan.kernels[i].groups[1];
    *geometry++ = plan.kernels[i].threads;
  }
}

void orchard_test_strides(const int64_t* like, const int64_t* sizes, int64_t* strides) {
  std::array<int64_t, 4> a, b;
  std::copy(like, like + 4, a.begin());
  std::copy(sizes, sizes + 4, b.begin());
  const auto result = orchard::strides_in_order_of(a, b);
  std::copy(result.begin(), result.end(), strides);
}

/// Buffer numbers in the order of the enumeration.
void orchard_test_buffers(int32_t* numbers) {
  const int32_t all[] = {kBufferQuery, kBufferKey, kBufferValue, kBufferOut, kBufferRowStats,
      kBufferDout, kBufferDlse, kBufferDelta, kBufferDq, kBufferDk, kBufferDv, kBufferDs,
      kBufferParams};
  std::copy(std::begin(all), std::end(all), numbers);
}

}  // extern "C"
