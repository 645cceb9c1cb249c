// How many threads an engine's loops on the host may take.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "tlinformer/engine.h"

namespace tlinformer {

inline int threads_of(const EngineOptions& options) {
  require(options.num_threads >= 0 && options.num_threads <= 4096,
          "num_threads = ", options.num_threads, "; it must be 0 (all) to 4096");
  if (options.num_threads > 0) return options.num_threads;
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

}  // namespace tlinformer
