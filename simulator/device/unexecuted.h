// The recording engine: while it is on, a dispatch is written down and not executed, so that the
// time of the host alone can be measured.
#pragma once

#include "engine.h"

namespace simulator {

// True while dispatches are only recorded. New memory is not poisoned then, since nothing reads it,
// and freed memory is kept for the next tensor of its size.
bool only_recording();

// Writes the dispatch down; the argument table is that of the moment.
void record(const SimulatorDispatch& dispatch);

}  // namespace simulator
