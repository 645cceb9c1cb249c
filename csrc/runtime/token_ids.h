// Token ids on their way in: checked and narrowed to 32 bits in one pass.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "tlinformer/engine.h"

namespace tlinformer {

template <class... Where>
void require_token(int64_t id, int64_t vocab, const Where&... where) {
  require(id >= 0 && id < vocab, where..., ": token id ", id, " is outside the vocabulary, 0 to ",
          vocab - 1);
}

// to (count) <- ids, of 32 or 64 bits. Throws for one outside 0 ... vocab - 1, naming the first;
// then `to` holds anything.
template <class Id, class... Where>
void narrow(const Id* ids, int64_t count, int64_t vocab, [[maybe_unused]] int threads, int32_t* to,
            const Where&... where) {
  const auto most =
      static_cast<uint32_t>(std::min<int64_t>(vocab - 1, std::numeric_limits<int32_t>::max()));
  // One bit says whether any id is outside: of its upper half, its sign, or how far it is above.
  uint64_t high = 0;
  uint32_t low = 0;
  // Fewer ids take less time than threads take to wake.
#pragma omp parallel for num_threads(threads) reduction(| : high, low) if (count > (1 << 18))
  for (int64_t i = 0; i < count; ++i) {
    const auto id = static_cast<uint32_t>(ids[i]);
    high |= static_cast<uint64_t>(ids[i]);
    low |= id | (most - id);
    to[i] = static_cast<int32_t>(id);
  }
  if (high >> 31 == 0 && low >> 31 == 0) return;
  for (int64_t i = 0; i < count; ++i) {
    require_token(ids[i], vocab, where...);
  }
}

}  // namespace tlinformer
