// Discrete-event model of one Apple7/Apple8 GPU core: four schedulers, in-order simdgroups, a port
// to threadgroup memory and one to device memory that all share, threadgroup barriers.
//
// Every simdgroup repeats a list of instructions, one block of the kernel's loop: all the same one,
// or those of a pair one each. An instruction waits for its operands (up to three earlier
// instructions, by distance), for its scheduler and for its unit; among the simdgroups of a
// scheduler the one served longest ago goes first.
#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr int kSchedulers = 4;

enum Unit : int { kAlu, kMatrix, kExp, kThreadgroup, kBarrier, kDevice };

}  // namespace

/// core_model.py's _Instruction.
struct Instruction {
  double cost;     // cycles that its unit is busy
  double latency;  // cycles to the result: after the unit is done, or (matrix) from the start
  int32_t unit;
  int32_t after[3];  // distances back to what it waits for; 0 is nothing
};

namespace {

struct Simdgroup {
  const Instruction* body;
  int length;
  int threadgroup, scheduler;
  int position = 0, block = 0;
  double issue = 0;  // earliest cycle of the next issue
  double ready = 0;  // the same, with operands there: earliest start but for shared units
  const double* unit_free = nullptr;  // of the unit that the next instruction waits for
  double last_store = 0;  // cycle at which its threadgroup accesses are done, for barriers
  bool waits = false, done = false;
  std::vector<double> finished;
};

/// What a scheduler issues next, and when.
struct Next {
  double key, start;
  size_t simdgroup;
};

constexpr double kNever = 1e300;

struct Threadgroup {
  int arrived = 0;
  double last_arrival = 0;
  std::vector<double> block_ends;
};

struct Core {
  std::vector<Simdgroup> simdgroups;
  std::vector<Threadgroup> threadgroups;
  double scheduler_free[kSchedulers] = {}, pipe_free[kSchedulers] = {}, exp_free[kSchedulers] = {};
  size_t last_served[kSchedulers] = {};
  double threadgroup_free = 0, device_free = 0;
  double busy[6] = {};
  bool changed[kSchedulers] = {true, true, true, true};  // since its next issue was chosen

  /// Finds out what x's next instruction waits for.
  void prepare(Simdgroup& x) {
    const Instruction& next = x.body[x.position];
    x.ready = x.issue;
    for (int distance : next.after) {
      const int index = x.position - distance;
      if (distance == 0 || (index < 0 && x.block == 0)) continue;
      x.ready = std::max(x.ready, x.finished[index < 0 ? index + x.length : index]);
    }
    if (next.unit == kBarrier) x.ready = std::max(x.ready, x.last_store);
    x.unit_free = next.unit == kAlu || next.unit == kMatrix ? &pipe_free[x.scheduler]
                  : next.unit == kExp                       ? &exp_free[x.scheduler]
                                                            : &scheduler_free[x.scheduler];
  }

  /// Of the scheduler's simdgroups, the first that can issue; of several, that served longest ago.
  Next choose(int scheduler, const std::vector<size_t>& among) const {
    const size_t n = simdgroups.size();
    Next best{kNever, 0, n};
    for (size_t i : among) {
      const Simdgroup& x = simdgroups[i];
      if (x.waits || x.done) continue;
      const double s = std::max({x.ready, scheduler_free[scheduler], *x.unit_free});
      const double key = s + 1e-6 * ((i + 2 * n - last_served[scheduler] - 1) % n);
      if (key < best.key) best = {key, s, i};
    }
    return best;
  }

  /// Issues x's next instruction at `start`; returns when its result is there.
  double issue(Simdgroup& x, double start, int simdgroups_each, double barrier_latency) {
    const Instruction& i = x.body[x.position];
    busy[i.unit] += i.cost;
    scheduler_free[x.scheduler] = start + 1;
    x.issue = start + 1;
    changed[x.scheduler] = true;
    switch (i.unit) {
      case kAlu:
        x.issue = pipe_free[x.scheduler] = start + i.cost;
        return start + i.cost + i.latency;
      case kMatrix:
        pipe_free[x.scheduler] = start + i.cost;
        return start + i.latency;
      case kExp:
        x.issue = exp_free[x.scheduler] = start + i.cost;
        return start + i.cost + i.latency;
      case kThreadgroup:
        threadgroup_free = std::max(threadgroup_free, start + 1) + i.cost;
        x.last_store = std::max(x.last_store, threadgroup_free + i.latency);
        return threadgroup_free + i.latency;
      case kDevice:
        device_free = std::max(device_free, start + 1) + i.cost;
        return device_free + i.latency;
      default: {
        Threadgroup& t = threadgroups[x.threadgroup];
        t.last_arrival = std::max(t.last_arrival, start);
        x.waits = true;
        if (++t.arrived == simdgroups_each) {
          for (Simdgroup& y : simdgroups) {
            if (y.threadgroup != x.threadgroup) continue;
            y.waits = false;
            y.issue = t.last_arrival + barrier_latency;
            if (&y != &x) prepare(y);
            changed[y.scheduler] = true;
          }
          t.arrived = 0;
          t.last_arrival = 0;
        }
        return start;
      }
    }
  }
};

}  // namespace

/// Runs `blocks` repetitions of a body on every simdgroup of `threadgroups` resident threadgroups:
/// of `bodies` bodies, one after the other in `instructions`, the s-th simdgroup takes number s %
/// bodies. Of the threadgroups, the k-th of which starts k * stagger cycles late. Returns the
/// core's cycles for one block of one threadgroup in the steady state (after `warm_up` blocks), or
/// -1 on a deadlock. utilisation: busy shares of the matrix units, the threadgroup port, the device
/// port, the ALUs.
extern "C" double simulate_core(const Instruction* instructions, const int32_t* lengths, int bodies,
    int threadgroups, int simdgroups_each, int blocks, int warm_up, double barrier_latency,
    double stagger, double* utilisation) {
  Core core;
  core.threadgroups.resize(threadgroups);
  for (int t = 0; t < threadgroups; t++) {
    for (int s = 0; s < simdgroups_each; s++) {
      Simdgroup x;
      x.body = instructions;
      for (int i = 0; i < s % bodies; i++) x.body += lengths[i];
      x.length = lengths[s % bodies];
      x.threadgroup = t;
      x.scheduler = (t * simdgroups_each + s) % kSchedulers;
      x.issue = t * stagger;
      x.finished.assign(x.length, 0);
      core.simdgroups.push_back(x);
      core.prepare(core.simdgroups.back());
    }
  }
  const size_t n = core.simdgroups.size();
  std::vector<size_t> of_scheduler[kSchedulers];
  for (size_t i = 0; i < n; i++) of_scheduler[core.simdgroups[i].scheduler].push_back(i);
  Next next[kSchedulers];
  for (size_t live = n; live > 0;) {
    size_t chosen = n;
    double best = kNever, start = 0;
    for (int k = 0; k < kSchedulers; k++) {
      if (core.changed[k]) next[k] = core.choose(k, of_scheduler[k]);
      core.changed[k] = false;
      if (next[k].key < best || (next[k].key == best && next[k].simdgroup < chosen)) {
        best = next[k].key;
        start = next[k].start;
        chosen = next[k].simdgroup;
      }
    }
    if (best == kNever) return -1;
    Simdgroup& x = core.simdgroups[chosen];
    core.last_served[x.scheduler] = chosen;
    x.finished[x.position] = core.issue(x, start, simdgroups_each, barrier_latency);
    if (++x.position == x.length) {
      x.position = 0;
      x.block++;
      if (chosen % simdgroups_each == 0) {
        core.threadgroups[x.threadgroup].block_ends.push_back(start);
      }
      if (x.block == blocks) {
        x.done = true;
        live--;
      }
    }
    core.prepare(x);
  }

  // The window in which every threadgroup runs, and the (fractional) blocks in it.
  double begin = 0, end = 1e300, last = 0, done = 0;
  for (const Threadgroup& t : core.threadgroups) {
    begin = std::max(begin, t.block_ends[warm_up]);
    end = std::min(end, t.block_ends.back());
    last = std::max(last, t.block_ends.back());
  }
  for (const Threadgroup& t : core.threadgroups) {
    for (size_t i = 1; i < t.block_ends.size(); i++) {
      const double a = std::max(t.block_ends[i - 1], begin), b = std::min(t.block_ends[i], end);
      if (b > a) done += (b - a) / (t.block_ends[i] - t.block_ends[i - 1]);
    }
  }
  utilisation[0] = core.busy[kMatrix] / (kSchedulers * last);
  utilisation[1] = core.busy[kThreadgroup] / last;
  utilisation[2] = core.busy[kDevice] / last;
  utilisation[3] = core.busy[kAlu] / (kSchedulers * last);
  return (end - begin) / done;
}
