// Workers are kept between launches: their stacks are large and costly to map.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#include "runtime.h"

namespace msl {
namespace {

std::mutex pool_mutex;
std::vector<Worker*> idle;

char* map_stacks() {
  unsigned long bytes = (unsigned long)kMaxThreads * kStackBytes;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* raw = mmap(nullptr, bytes + kStackBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (raw == MAP_FAILED) throw std::bad_alloc();
  unsigned long aligned =
      ((unsigned long)raw + kStackBytes - 1) & ~(unsigned long)(kStackBytes - 1);
  for (unsigned i = 0; i < kMaxThreads; i++)
    mprotect((char*)aligned + (unsigned long)i * kStackBytes, 4096, PROT_NONE);
  return (char*)aligned;
}

}  // namespace

Worker* borrow_worker() {
  {
    std::lock_guard<std::mutex> lock(pool_mutex);
    if (!idle.empty()) {
      Worker* worker = idle.back();
      idle.pop_back();
      return worker;
    }
  }
  Worker* worker = new Worker;
  worker->stacks = map_stacks();
  worker->arena = (unsigned char*)aligned_alloc(4096, kArenaBytes);
  worker->simdgroups = (Simdgroup*)aligned_alloc(64, sizeof(Simdgroup) * kMaxSimdgroups);
  memset((void*)worker->simdgroups, 0, sizeof(Simdgroup) * kMaxSimdgroups);
  worker->shadow = (ByteHistory*)calloc(kArenaBytes, sizeof(ByteHistory));
  worker->shadow_used = 0;
  return worker;
}

void return_worker(Worker* worker) {
  std::lock_guard<std::mutex> lock(pool_mutex);
  idle.push_back(worker);
}

}  // namespace msl
