// The order in which the emulated machine runs blocks, warps, copies and products.
#pragma once

#include <algorithm>

#include "machine.h"

namespace emulated {

// Returns when the fiber yields.
[[gnu::noinline]] inline void resume(Fiber& fiber) {
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}
inline void run_fiber() {
  machine.kernel();
  machine.block->fibers[machine.thread].done = true;
  yield();
}

inline std::unique_ptr<Block> start_block(unsigned index, int threads) {
  auto block = std::make_unique<Block>();
  block->index = index;
  block->live = threads;
  block->fibers.resize(threads);
  block->warps.resize(threads / 32);
  block->memory.assign(machine.shared_bytes, 0xff);  // NaN in every type
  for (Fiber& fiber : block->fibers) {
    if (machine.stacks.empty()) machine.stacks.emplace_back(new char[kStackBytes]);
    fiber.stack = std::move(machine.stacks.back());
    machine.stacks.pop_back();
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.start, run_fiber, 0);
  }
  return block;
}

// What goes on beside the threads. False if there is nothing under way.
inline bool run_engines(Block& block) {
  bool busy = !block.loads.empty();
  std::vector<Load> flying = std::move(block.loads);
  block.loads.clear();
  for (Load& load : flying) {
    if (--load.delay > 0) {
      block.loads.push_back(std::move(load));
    } else {
      load.run();
    }
  }
  for (Store& store : block.stores) {
    if (store.group >= block.store_groups[store.thread]) continue;
    busy = true;
    if (--store.delay > 0) continue;
    if (!store.was_read) {
      store.read(store.bytes);
      store.was_read = true;
      store.delay = machine.draw_delay(8 * machine.copy_delay);
    } else {
      store.write(store.bytes);
      store.was_written = true;
    }
  }
  std::erase_if(block.stores, [](const Store& store) { return store.was_written; });
  for (Warp& warp : block.warps) {
    if (warp.products.empty()) continue;
    busy = true;
    if (--warp.stall > 0) continue;
    warp.products.front().run();
    warp.products.pop_front();
    warp.stall = int(machine.random() % warp.pace);
  }
  return busy;
}

// Every warp that is not passed over runs until it waits. True if something happened.
inline bool run_round(Block& block) {
  std::vector<int> order(block.warps.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = int(i);
  std::shuffle(order.begin(), order.end(), machine.random);
  bool moved = false;
  for (int warp : order) {
    if (machine.chance(4)) continue;
    for (int thread = warp * 32; thread < warp * 32 + 32; ++thread) {
      Fiber& fiber = block.fibers[thread];
      if (fiber.done || (fiber.ready != nullptr && !fiber.ready(fiber.condition))) continue;
      machine.thread = thread;
      resume(fiber);
      block.live -= fiber.done;
      moved = true;
    }
  }
  const bool busy = run_engines(block);
  return moved || busy;
}

[[noreturn]] inline void fail_deadlocked(const Block& block) {
  std::string waiting;
  for (size_t i = 0; i < block.fibers.size(); ++i) {
    if (!block.fibers[i].done && (i % 32 == 0 || block.fibers[i - 1].done))
      waiting += " " + std::to_string(i / 32);
  }
  fail("deadlock of block %u: warps%s wait", block.index, waiting.c_str());
}

inline void end_block(Block& block) {
  if (!block.loads.empty()) fail("block %u ends before its loads have landed", block.index);
  // The newest first: they are not in order unless somebody waits.
  std::reverse(block.stores.begin(), block.stores.end());
  for (Store& store : block.stores) {
    if (!store.was_read) fail("block %u ends before its stores have been read", block.index);
    store.write(store.bytes);
  }
  for (Fiber& fiber : block.fibers) machine.stacks.push_back(std::move(fiber.stack));
}

// Blocks without dynamic shared memory run one after the other.
inline void run_grid(unsigned blocks, int threads, int shared_bytes, std::function<void()> kernel) {
  machine.kernel = std::move(kernel);
  machine.shared_bytes = shared_bytes;
  machine.static_memory = nullptr;
  const size_t places = shared_bytes == 0 ? 1 : machine.multiprocessors;
  std::vector<std::unique_ptr<Block>> running;
  constexpr size_t kPatience = 2000;  // rounds of each block
  size_t quiet = 0;
  unsigned next = 0;
  while (next < blocks || !running.empty()) {
    while (next < blocks && running.size() < places)
      running.push_back(start_block(next++, threads));
    const size_t place = machine.random() % running.size();
    Block& block = *running[place];
    machine.block = &block;
    std::copy(block.memory.begin(), block.memory.end(), jax_flash2::sm90::shared);
    for (int rounds = machine.random() % 200; rounds >= 0 && block.live > 0; --rounds) {
      // What happens in a block may be what another one waits for.
      if (run_round(block))
        quiet = 0;
      else if (++quiet > kPatience * running.size())
        fail_deadlocked(block);
    }
    std::copy_n(jax_flash2::sm90::shared, shared_bytes, block.memory.begin());
    if (block.live > 0) continue;
    end_block(block);
    running.erase(running.begin() + place);
  }
}

}  // namespace emulated
