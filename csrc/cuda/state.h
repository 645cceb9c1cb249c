// What the device knows about a sequence while it generates; the host only writes it.
#pragma once

#include <cstdint>

namespace tlinformer::cuda {

// Of the token under way; every kernel of a step reads it, `feed` and the sampler advance it.
struct SequenceState {
  int64_t last = -1;       // position of the newest token
  int64_t history = 0;     // C: tokens before the generation window
  int32_t compressed = 0;  // rows of the compressed history
  int32_t live = 0;        // 0: takes part in no step; 1: does; 2: does, for the last time
};

}  // namespace tlinformer::cuda
