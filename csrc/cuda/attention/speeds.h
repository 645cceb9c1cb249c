// Which multiprocessors read memory faster than the others.
#pragma once

#include <cstdint>

namespace tlinformer::cuda {

struct Speeds {
  uint32_t fast[8] = {};  // a bit for each multiprocessor, by its number
  int count = 0;          // of those that are fast
};

// Of the current device; measured by the first call, which must not be part of a capture, within a
// millisecond. None is fast where there was no memory to measure with.
const Speeds& multiprocessor_speeds();

}  // namespace tlinformer::cuda
