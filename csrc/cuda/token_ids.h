// Token ids of prompts on their way to the device, and those that are there already.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "tlinformer/engine.h"

namespace tlinformer::cuda {

// Pinned memory from which ids are copied: of other memory a copy has the host wait.
class StagedIds {
 public:
  StagedIds();
  ~StagedIds();
  StagedIds(const StagedIds&) = delete;
  StagedIds& operator=(const StagedIds&) = delete;

  int32_t* room(int64_t count);  // once earlier copies have ended; grows
  bool holds(const int32_t* ids) const { return ids >= ids_ && ids < ids_ + count_; }
  void sent(cudaStream_t stream);  // copies are under way

  // Of ids on the device: whether all are in the vocabulary. Waits for the stream.
  bool in_vocabulary(const TokenIds& ids, int64_t vocab, cudaStream_t stream);

 private:
  int32_t* ids_ = nullptr;  // (count_ + 1), the last for the device's answer
  int64_t count_ = 0;
  cudaEvent_t copied_ = nullptr;
};

// to <- ids, both on the device.
void narrow_ids(const TokenIds& ids, int32_t* to, cudaStream_t stream);

}  // namespace tlinformer::cuda
