// Entry point of a dispatch: spreads the threadgroups of the grid over operating system threads.
#include <elf.h>
#include <link.h>

#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "runtime.h"

namespace {

// Finds the loaded library that contains the kernel: its program-scope constants may be read.
int find_image(dl_phdr_info* info, size_t, void* data) {
  auto* launch = (msl::Launch*)data;
  const char* base = (const char*)info->dlpi_addr;
  const char* end = base;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const ElfW(Phdr)& segment = info->dlpi_phdr[i];
    const char* segment_end = base + segment.p_vaddr + segment.p_memsz;
    if (segment.p_type == PT_LOAD && segment_end > end) end = segment_end;
  }
  const char* entry = (const char*)launch->entry;
  if (entry < base || entry >= end) return 0;
  launch->image_begin = base;
  launch->image_end = end;
  return 1;
}

void work(msl::Launch* launch, std::atomic<unsigned long>* next, unsigned long total) {
  msl::FaultGuard guard;
  msl::Worker* worker = msl::borrow_worker();
  while (__atomic_load_n(&launch->reports, __ATOMIC_RELAXED) < msl::kMaxReports) {
    unsigned long number = (*next)++;
    if (number >= total) break;
    msl::run_threadgroup(*worker, launch, number);
  }
  msl::return_worker(worker);
}

}  // namespace

// Returns the number of reports.
extern "C" int msl_launch(msl::Launch* launch) {
  launch->reports = launch->memory_bytes = launch->arena_peak = 0;
  memset(&launch->counters, 0, sizeof launch->counters);
  launch->report_text[0] = 0;
  unsigned long total = 1;
  for (int i = 0; i < 3; i++) {
    launch->groups[i] = (launch->threads[i] + launch->group[i] - 1) / launch->group[i];
    total *= launch->groups[i];
  }
  dl_iterate_phdr(find_image, launch);
  std::atomic<unsigned long> next{0};
  unsigned long workers = launch->workers < total ? launch->workers : total;
  std::vector<std::thread> threads;
  for (unsigned long i = 1; i < workers; i++) threads.emplace_back(work, launch, &next, total);
  work(launch, &next, total);
  for (auto& thread : threads) thread.join();
  return launch->reports;
}
