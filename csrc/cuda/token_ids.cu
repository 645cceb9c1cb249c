#include <algorithm>

#include "launch.cuh"
#include "token_ids.h"

namespace tlinformer::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostBlocks = 1024;

template <class Id>
__global__ void tlin_check_ids(const Id* ids, int64_t count, int64_t vocab, int32_t* outside) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  bool found = false;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += stride) {
    found |= ids[i] < 0 || ids[i] >= vocab;
  }
  if (found) *outside = 1;
}

template <class Id>
__global__ void tlin_narrow_ids(const Id* ids, int64_t count, int32_t* to) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += stride) {
    to[i] = static_cast<int32_t>(ids[i]);
  }
}

unsigned blocks(int64_t count) {
  return static_cast<unsigned>(std::min<int64_t>((count + kThreads - 1) / kThreads, kMostBlocks));
}

// Calls `use` with the ids of their own type.
template <class Use>
void with_ids(const TokenIds& ids, const Use& use) {
  if (ids.wide) {
    use(static_cast<const int64_t*>(ids.ids));
  } else {
    use(static_cast<const int32_t*>(ids.ids));
  }
}

}  // namespace

StagedIds::StagedIds() {
  check(cudaEventCreateWithFlags(&copied_, cudaEventDisableTiming), "cudaEventCreate");
}

StagedIds::~StagedIds() {
  cudaEventDestroy(copied_);
  cudaFreeHost(ids_);
}

int32_t* StagedIds::room(int64_t count) {
  check(cudaEventSynchronize(copied_), "copy of token ids");
  if (ids_ == nullptr || count > count_) {
    cudaFreeHost(ids_);
    ids_ = nullptr;
    count_ = 0;
    check(
        cudaHostAlloc(&ids_, static_cast<size_t>(count + 1) * sizeof(int32_t), cudaHostAllocMapped),
        "pinned memory for the prompts");
    count_ = count;
  }
  return ids_;
}

void StagedIds::sent(cudaStream_t stream) {
  check(cudaEventRecord(copied_, stream), "cudaEventRecord");
}

bool StagedIds::in_vocabulary(const TokenIds& ids, int64_t vocab, cudaStream_t stream) {
  int32_t* const outside = room(0) + count_;
  *outside = 0;
  with_ids(ids, [&](const auto* own) {
    using Id = std::decay_t<decltype(*own)>;
    launch({stream, false}, tlin_check_ids<Id>, "tlin_check_ids", blocks(ids.count), kThreads, 0,
           own, ids.count, vocab, outside);
  });
  check(cudaStreamSynchronize(stream), "check of token ids");
  return *static_cast<volatile int32_t*>(outside) == 0;
}

void narrow_ids(const TokenIds& ids, int32_t* to, cudaStream_t stream) {
  with_ids(ids, [&](const auto* own) {
    using Id = std::decay_t<decltype(*own)>;
    launch({stream, false}, tlin_narrow_ids<Id>, "tlin_narrow_ids", blocks(ids.count), kThreads, 0,
           own, ids.count, to);
  });
}

}  // namespace tlinformer::cuda
