// A GPU in one host thread, unkind on purpose: thread blocks of fibers, one fiber a CUDA thread, under a
// random schedule (schedule.h). What the hardware leaves open is drawn at random: which block and which
// warp goes on, when a copy lands, when an asynchronous product reads its operands. What the hardware
// would not forgive (a deadlock, an access outside shared memory) ends the program with a word on it.
// Memory is in order, and everybody sees at once what anybody wrote: a missing fence is not found.
//
// Lanes of a warp run one after the other and meet where an instruction is the whole warp's.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace jax_flash2::sm90 {
// What `extern __shared__ uint8_t shared[]` in the kernels names: the memory of the running block.
alignas(1024) uint8_t shared[232448];
}  // namespace jax_flash2::sm90

namespace emulated {

// The 32-bit addresses of dynamic shared memory begin at a multiple of 16 bytes, and no more.
constexpr uint32_t kDynamicAddress = 1040, kStaticAddress = 1 << 20;
constexpr int kStaticBytes = 48 << 10;
constexpr size_t kStackBytes = 128 << 10;

// What can be made to go wrong, to see that it is found.
enum class Fault {
  kNone,
  kLostArrival,  // one arrival at an mbarrier does not count
  kEarlySignal,  // copies are announced before they land
  kDirtyPadding  // reads past the end of a tensor give NaN, not 0
};

// ---- A block

struct Fiber {
  ucontext_t start;
  jmp_buf place;  // where it waits; much faster to come back to than a context
  bool started = false;
  std::unique_ptr<char[]> stack;
  bool (*ready)(const void*) = nullptr;  // null: may go on
  const void* condition = nullptr;
  bool done = false;
};

// A product that the tensor cores have been given, and the group it was committed with.
struct Product {
  int group;
  std::function<void()> run;
};
struct Warp {
  // The instruction that the lanes meet in, and where each left its operands.
  const char* instruction = nullptr;
  int arrived = 0;
  unsigned meetings = 0;
  void* lanes[32];
  std::deque<Product> products;  // run in order
  int product_group = 0;         // the one that is not committed yet
  int pace = 1;                  // of its products at present: rounds for each, at most
  int stall = 0;                 // rounds until the next may run
};
// bar.sync and bar.arrive.
struct NamedBarrier {
  int arrived = 0;
  unsigned phase = 0;
};
struct Mbarrier {
  int expected, pending;
  int64_t bytes;
  unsigned phase;
};
struct Load {
  int delay;  // rounds
  std::function<void()> run;
};
// A copy from shared to global memory: read first, written later.
struct Store {
  int thread, group;
  int delay;  // rounds, of what comes next
  std::function<void(std::vector<uint8_t>&)> read;
  std::function<void(const std::vector<uint8_t>&)> write;
  std::vector<uint8_t> bytes;
  bool was_read, was_written;
};

struct Block {
  unsigned index;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  NamedBarrier barriers[16];
  std::map<uint32_t, Mbarrier> mbarriers;  // by address
  std::vector<Load> loads;
  std::vector<Store> stores;
  std::map<int, int> store_groups;  // of a thread: the one that is not committed yet
  std::vector<uint8_t> memory;      // while another block runs
  int live;                         // threads
};

// ---- The machine

struct Machine {
  std::mt19937 random;
  int multiprocessors = 1;
  int copy_delay = 4, product_delay = 4;  // rounds, at most
  Fault fault = Fault::kNone;
  int arrivals = 0;  // at mbarriers, counted for kLostArrival
  std::string task;  // what runs, for failures

  std::function<void()> kernel;
  Block* block = nullptr;
  unsigned thread = 0;
  int shared_bytes = 0;
  const uint8_t* static_memory = nullptr;
  jmp_buf scheduler;
  std::vector<std::unique_ptr<char[]>> stacks;  // to use again

  bool chance(int one_in) { return random() % one_in == 0; }
  // Short for one half.
  int draw_delay(int longest) { return int(random() % (chance(2) ? 4 : longest)); }
  Warp& warp() { return block->warps[thread / 32]; }
};
inline Machine machine;

[[noreturn, gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
  std::printf("FAILED %s: ", machine.task.c_str());
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf("\n");
  std::exit(1);
}

// ---- Called by fibers

[[gnu::noinline]] inline void yield() {
  if (_setjmp(machine.block->fibers[machine.thread].place) == 0) _longjmp(machine.scheduler, 1);
}
// Lets others go first, now and then.
inline void dawdle(int one_in) {
  if (machine.chance(one_in)) yield();
}
template <typename Condition>
void wait_until(const Condition& condition) {
  if (condition()) return;
  Fiber& fiber = machine.block->fibers[machine.thread];
  fiber.condition = &condition;
  fiber.ready = [](const void* c) { return (*static_cast<const Condition*>(c))(); };
  yield();
  fiber.ready = nullptr;
}

// An instruction of the whole warp: whoever comes last does it for all lanes, given all operands.
template <typename Lane, typename Execute>
void together(const char* instruction, Lane& mine, const Execute& execute) {
  Warp& warp = machine.warp();
  if (warp.arrived > 0 && warp.instruction != instruction)
    fail("lanes of a warp part: %s and %s", warp.instruction, instruction);
  warp.instruction = instruction;
  warp.lanes[machine.thread % 32] = &mine;
  const unsigned meeting = warp.meetings;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.meetings;
    execute(reinterpret_cast<Lane**>(warp.lanes));
    return;
  }
  wait_until([&] { return warp.meetings != meeting; });
}

inline void arrive(NamedBarrier& barrier, int threads) {
  if (++barrier.arrived < threads) return;
  barrier.arrived = 0;
  ++barrier.phase;
}
inline void sync(NamedBarrier& barrier, int threads) {
  const unsigned phase = barrier.phase;
  arrive(barrier, threads);
  wait_until([&] { return barrier.phase != phase; });
}

}  // namespace emulated
