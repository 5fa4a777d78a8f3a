// What the drivers share: the command line, and results under a second schedule.
#pragma once

#include <cstring>
#include <iterator>

#include "core/status.h"
#include "definition.h"

namespace emulated {

inline void expect_ok(const Status& status) {
  if (!status.ok()) fail("%s", status.message().c_str());
}

// A schedule, and a GPU of a few multiprocessors. Its copies and its products are fast or very slow.
inline void begin_schedule(int seed) {
  Draw draw{std::mt19937(unsigned(seed)), {}};
  machine.random = draw.engine;
  machine.multiprocessors = draw.from(1, 4);
  machine.copy_delay = draw.one_in(3) ? 4 : draw.from(5, 200);
  machine.product_delay = draw.one_in(3) ? 4 : draw.from(5, 60);
  machine.arrivals = 0;
}

template <typename T>
void expect_same(const char* name, const std::vector<T>& first, const std::vector<T>& second) {
  if (std::memcmp(first.data(), second.data(), first.size() * sizeof(T)) != 0)
    fail("%s depends on the schedule", name);
}

// Memory that nobody has written holds NaN.
template <typename T>
std::vector<T> unwritten(int64_t size) {
  std::vector<T> x(size);
  std::memset(x.data(), 0xff, x.size() * sizeof(T));
  return x;
}

// driver FIRST COUNT LONGEST [FAULT]: problems of seeds FIRST and on, in turn of either type, of up to
// LONGEST queries. Ends with a word on the first failure, and 1. By hand, from the repository's root:
//   c++ -std=c++20 -O1 -ftree-vectorize -U_FORTIFY_SOURCE -DHEAD_DIM=128 -Itests/cuda/emulated -Icuda
//     tests/cuda/emulated/forward.cc -o forward && ./forward 0 1000 300
template <template <typename> typename Check>
int drive(int count, char** arguments) {
  if (count < 4) return std::printf("seed count longest [fault]\n"), 2;
  const int first = std::atoi(arguments[1]), seeds = std::atoi(arguments[2]);
  const int longest = std::atoi(arguments[3]);
  const std::string names[] = {"none", "lost-arrival", "early-signal", "dirty-padding"};
  if (count > 4) {
    const auto* const name = std::find(std::begin(names), std::end(names), arguments[4]);
    if (name == std::end(names)) return std::printf("no such fault: %s\n", arguments[4]), 2;
    machine.fault = Fault(name - names);
  }
  for (int seed = first; seed < first + seeds; ++seed) {
    if (seed % 2 == 0) {
      Check<__nv_bfloat16>()(seed, longest);
    } else {
      Check<__half>()(seed, longest);
    }
  }
  std::printf("%d problems passed\n", seeds);
  return 0;
}

}  // namespace emulated
