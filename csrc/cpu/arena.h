// The memory that the caller lends.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tlinformer::cpu {

// Takes every page now, by the threads that will use them: a step must not meet the page
// allocator. Large pages where the system has them: a long history then misses the TLB less.
inline void touch(char* arena, int64_t bytes, int threads) {
  constexpr int64_t kPage = 4096;
#if defined(MADV_HUGEPAGE)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(arena) + kPage - 1) / kPage * kPage;
  const uintptr_t end = reinterpret_cast<uintptr_t>(arena) + static_cast<uintptr_t>(bytes);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < bytes; i += kPage) {
    volatile char* page = arena + i;
    *page = *page;
  }
}

}  // namespace tlinformer::cpu
