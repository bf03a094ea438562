// Command blocks: code between runCommandBlock's braces runs on the stream's serial queue.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>

namespace simulator {

// Runs `body` as a block of the queue: one block at a time, whatever the thread. A block inside
// a block is refused, because dispatch_sync to the queue one is on deadlocks on a Mac.
//
// While the queue is held the engine's Python call-backs take the interpreter lock, so a thread
// must not wait here with that lock in its hands. PyTorch's bindings and ctypes.CDLL release it.
void run_command_block(const std::function<void()>& body);

// Whether this thread is inside a block.
bool in_command_block();

// A number for the block this thread is in, different for every block; 0 outside.
uint64_t current_command_block();

// Keeps a tensor alive until the end of the block this thread is in. A bound argument may be freed
// before the dispatch; and no longer than that, or memory() would count it for too long.
void keep_until_block_ends(at::Tensor tensor);

}  // namespace simulator
