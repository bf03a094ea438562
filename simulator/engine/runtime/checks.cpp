// Check mode.  instrument.py puts a call in front of every load and store of the device (1),
// constant (2) and threadgroup (3) address spaces; `align` is the alignment that the access relies
// on.
#include "runtime.h"

using namespace msl;

namespace {

enum class Kind { kRead, kWrite, kAtomic };

const char* verb(Kind kind) {
  return kind == Kind::kRead ? "read" : kind == Kind::kWrite ? "write" : "atomic operation";
}

void check_alignment(Lane* lane, const char* p, unsigned n, unsigned align, Kind kind, void* pc) {
  if ((unsigned long)p & (align - 1))
    msl_fail(lane, pc,
        "misaligned %s of %u bytes: the type requires %u-byte alignment, the address is "
        "%lu modulo %u",
        verb(kind), n, align, (unsigned long)p & (align - 1), align);
}

bool inside(const Launch* launch, unsigned i, const char* p, unsigned n) {
  const char* begin = (const char*)launch->buffers[i];
  return p >= begin && p + n <= begin + launch->buffer_bytes[i];
}

[[noreturn]] void fail_buffer(
    Lane* lane, const char* p, unsigned n, Kind kind, void* pc, const char* space) {
  Launch* launch = lane->group->launch;
  unsigned missing = launch->declared & ~launch->bound;
  long distance = 1l << 62;
  unsigned nearest = 0;
  for (unsigned i = 0; i < kMaxBuffers; i++) {
    if (!(launch->bound >> i & 1)) continue;
    const char* begin = (const char*)launch->buffers[i];
    long before = begin - p, behind = p - (begin + launch->buffer_bytes[i]);
    long d = before > 0 ? before : behind > 0 ? behind : 0;
    if (d < distance) distance = d, nearest = i;
  }
  // A null pointer plus an offset.
  if (missing && (unsigned long)p + (1ul << 40) < 1ul << 41) {
    char list[160] = "";
    unsigned used = 0;
    for (unsigned i = 0; i < kMaxBuffers; i++)
      if (missing >> i & 1) used += __builtin_snprintf(list + used, sizeof list - used, " %u", i);
    msl_fail(
        lane, pc, "%s %s through a buffer that is not bound (missing:%s)", space, verb(kind), list);
  }
  if (!launch->bound)
    msl_fail(lane, pc, "%s %s of %u bytes, but no buffer is bound", space, verb(kind), n);
  msl_fail(lane, pc,
      "out-of-bounds %s %s of %u bytes; nearest is buffer(%u) of %lu bytes, at offset %ld", space,
      verb(kind), n, nearest, launch->buffer_bytes[nearest],
      p - (const char*)launch->buffers[nearest]);
}

// The same bytes may be bound twice, once to be read and once to be written.
void device_access(const char* p, unsigned n, unsigned align, Kind kind, void* pc) {
  Lane* lane = current_lane();
  Launch* launch = lane->group->launch;
  int read_only = -1;
  for (unsigned bound = launch->bound; bound; bound &= bound - 1) {
    unsigned i = __builtin_ctz(bound);
    if (!inside(launch, i, p, n)) continue;
    if (kind == Kind::kRead || launch->writable >> i & 1)
      return check_alignment(lane, p, n, align, kind, pc);
    read_only = i;
  }
  if (read_only >= 0)
    msl_fail(lane, pc, "device %s of %u bytes in buffer(%d), which is read-only, at offset %ld",
        verb(kind), n, read_only, p - (const char*)launch->buffers[read_only]);
  fail_buffer(lane, p, n, kind, pc, "device");
}

// Threadgroup memory: the variable that holds the bytes, or a report.
const ThreadgroupVariable& find_variable(
    Lane* lane, const char* p, unsigned n, Kind kind, void* pc) {
  Threadgroup* group = lane->group;
  long offset = p - (const char*)group->arena;
  const ThreadgroupVariable* nearest = nullptr;
  for (unsigned i = 0; i < group->variable_count; i++) {
    const ThreadgroupVariable& v = group->variables[i];
    if (offset >= v.begin && offset + n <= v.end) return v;
    if (offset + 64l >= v.begin && offset < v.end + 64l && !(nearest && offset < v.begin))
      nearest = &v;
  }
  if (!nearest)
    msl_fail(lane, pc, "out-of-bounds threadgroup %s of %u bytes, near no variable", verb(kind), n);
  msl_fail(lane, pc, "out-of-bounds threadgroup %s of %u bytes at offset %ld of '%s' (%u bytes)",
      verb(kind), n, offset - nearest->begin, nearest->name ? nearest->name : "an argument",
      nearest->end - nearest->begin);
}

[[noreturn]] void fail_race(Lane* lane, void* pc, Kind kind, const ThreadgroupVariable& v,
    unsigned offset, const char* earlier, Access by) {
  const char* name = v.name ? v.name : "an argument";
  if (by.is_thread())
    msl_fail(lane, pc,
        "threadgroup race: %s at offset %u of '%s', thread %u %s it with no barrier between",
        verb(kind), offset, name, (unsigned)by.who - 1, earlier);
  msl_fail(lane, pc, "threadgroup race: %s at offset %u of '%s', %s %s it with no barrier between",
      verb(kind), offset, name,
      by.who == Access::kAtomic ? "an atomic operation" : "several threads", earlier);
}

void threadgroup_access(const char* p, unsigned n, unsigned align, Kind kind, void* pc) {
  Lane* lane = current_lane();
  Threadgroup* group = lane->group;
  const ThreadgroupVariable& v = find_variable(lane, p, n, kind, pc);
  check_alignment(lane, p, n, align, kind, pc);
  unsigned first = p - (const char*)group->arena;
  for (unsigned k = 0; k < n; k++) {
    ByteHistory& byte = group->shadow[first + k];
    unsigned offset = first + k - v.begin;
    if (kind == Kind::kRead && byte.writer.who == Access::kNobody)
      msl_fail(lane, pc, "read of uninitialised threadgroup memory at offset %u of '%s'", offset,
          v.name ? v.name : "an argument");
    bool both_atomic = kind == Kind::kAtomic && byte.writer.who == Access::kAtomic;
    if (!both_atomic && byte.writer.conflicts_with(lane))
      fail_race(lane, pc, kind, v, offset, "wrote", byte.writer);
    if (kind == Kind::kRead) {
      byte.reader = byte.reader.joined_by(lane);
    } else {
      if (byte.reader.conflicts_with(lane))
        fail_race(lane, pc, kind, v, offset, "read", byte.reader);
      byte.writer = Access::now(lane, kind == Kind::kAtomic ? Access::kAtomic : lane->index + 1);
    }
  }
}

}  // namespace

extern "C" {

void msl_load_1(const char* p, unsigned n, unsigned align) {
  Counters& counters = current_lane()->group->counters;
  counters.device_bytes_read += n;
  counters.device_reads++;
  device_access(p, n, align, Kind::kRead, __builtin_return_address(0));
}
void msl_store_1(const char* p, unsigned n, unsigned align) {
  Counters& counters = current_lane()->group->counters;
  counters.device_bytes_written += n;
  counters.device_writes++;
  device_access(p, n, align, Kind::kWrite, __builtin_return_address(0));
}

void msl_load_2(const char* p, unsigned n, unsigned align) {
  Lane* lane = current_lane();
  Launch* launch = lane->group->launch;
  void* pc = __builtin_return_address(0);
  lane->group->counters.constant_bytes_read += n;
  bool found = p >= launch->image_begin && p + n <= launch->image_end;
  for (unsigned bound = launch->bound; bound && !found; bound &= bound - 1)
    found = inside(launch, __builtin_ctz(bound), p, n);
  if (!found) fail_buffer(lane, p, n, Kind::kRead, pc, "constant");
  check_alignment(lane, p, n, align, Kind::kRead, pc);
}
void msl_store_2(const char*, unsigned, unsigned) {
  msl_fail(current_lane(), __builtin_return_address(0), "write to the constant address space");
}

void msl_load_3(const char* p, unsigned n, unsigned align) {
  Counters& counters = current_lane()->group->counters;
  counters.threadgroup_bytes_read += n;
  counters.threadgroup_reads++;
  threadgroup_access(p, n, align, Kind::kRead, __builtin_return_address(0));
}
void msl_store_3(const char* p, unsigned n, unsigned align) {
  Counters& counters = current_lane()->group->counters;
  counters.threadgroup_bytes_written += n;
  counters.threadgroup_writes++;
  threadgroup_access(p, n, align, Kind::kWrite, __builtin_return_address(0));
}

void msl_check_atomic(const void* p, unsigned n, unsigned address_space) {
  void* pc = __builtin_return_address(0);
  if (address_space == 3) return threadgroup_access((const char*)p, n, n, Kind::kAtomic, pc);
  Counters& counters = current_lane()->group->counters;
  counters.device_bytes_read += n;
  counters.device_bytes_written += n;
  counters.device_reads++;
  counters.device_writes++;
  device_access((const char*)p, n, n, Kind::kAtomic, pc);
}

// One call a basic block, for Library.instruction_mix.
void msl_block(unsigned i) {
  Launch* launch = current_lane()->group->launch;
  if (launch->block_counts && i < launch->block_count)
    __atomic_fetch_add(&launch->block_counts[i], 1, __ATOMIC_RELAXED);
}

// Call-backs of -fsanitize-minimal-runtime.
#define MSL_UNDEFINED(name, what)                                \
  void __ubsan_handle_##name##_minimal() {                       \
    msl_fail(current_lane(), __builtin_return_address(0), what); \
  }
MSL_UNDEFINED(out_of_bounds, "array index out of bounds")
MSL_UNDEFINED(shift_out_of_bounds, "shift by more than the width of the type")
MSL_UNDEFINED(divrem_overflow, "integer division by zero or overflow")
}
