// Progress of one call of the engine.
#pragma once

#include <algorithm>

#include "tlinformer/engine.h"

namespace tlinformer {

// Turns work done into a share of the call's whole work.
struct Meter {
  const Progress* progress;
  double total = 0;
  double done = 0;
  // Reports the work done and `more`, which is under way.
  void poll(double more = 0) const {
    if (*progress && !(*progress)(total > 0 ? std::min((done + more) / total, 1.0) : 1.0)) {
      throw Interrupted("interrupted by the progress callback");
    }
  }
};

}  // namespace tlinformer
