// The end of a process: see exit.cpp.
#pragma once

namespace simulator {

// Autograd has set the device of a thread, as each of its workers does when it starts.
void note_device_worker();

}  // namespace simulator
