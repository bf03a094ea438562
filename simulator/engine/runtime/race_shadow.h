// What check mode remembers about one byte of threadgroup memory: who wrote it last, and who has
// read it since the last barrier.
#pragma once
#include "../include/msl/executor.h"

namespace msl {

// One past access.  Two accesses of different threads conflict unless a barrier lies between them:
// a threadgroup barrier (group_epoch), or, inside one simdgroup, a simdgroup barrier (simd_epoch).
struct Access {
  unsigned long who : 12;
  unsigned long group_epoch : 26;
  unsigned long simd_epoch : 26;

  enum : unsigned {
    kNobody = 0,           // 1 to 1024: thread index + 1
    kOneSimdgroup = 2048,  // + index: several threads of that simdgroup
    kAtomic = 4094,        // atomic operations of anybody
    kEverybody = 4095      // threads of several simdgroups
  };

  static Access now(Lane* lane, unsigned who) {
    Access a;
    a.who = who;
    a.group_epoch = lane->group->epoch;
    a.simd_epoch = lane->simdgroup->epoch;
    return a;
  }
  bool is_thread() const { return who >= 1 && who <= kMaxThreads; }
  bool in_simdgroup(unsigned index) const {
    return is_thread() ? (who - 1) / kSimdWidth == index : who == kOneSimdgroup + index;
  }
  bool conflicts_with(Lane* lane) const {
    if (who == kNobody || who == lane->index + 1) return false;
    if (group_epoch != Access::now(lane, 0).group_epoch) return false;
    if (!in_simdgroup(lane->simdgroup->index)) return true;
    return simd_epoch == Access::now(lane, 0).simd_epoch;
  }
  // The set of readers after `lane` has read too.
  Access joined_by(Lane* lane) const {
    Access mine = now(lane, lane->index + 1);
    if (who == kNobody || who == mine.who || group_epoch != mine.group_epoch) return mine;
    if (!in_simdgroup(lane->simdgroup->index)) return now(lane, kEverybody);
    // An earlier reader of the same simdgroup that is behind a simdgroup barrier no longer matters
    // to this simdgroup, and to the others the two are alike.
    if (simd_epoch != mine.simd_epoch) return mine;
    return now(lane, kOneSimdgroup + lane->simdgroup->index);
  }
};

struct ByteHistory {
  Access writer, reader;
};

}  // namespace msl
