// A GPU for programs in C, which bring no memory and no stream of their own.
#include "../c_api/place.h"

#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "../runtime/tensors.h"
#include "tlinformer/cache.h"
#include "tlinformer/error.h"

namespace tlinformer::c_api {
namespace {

template <class E = Error>
void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // it must not fail the next call too
  throw E(what + ": " + cudaGetErrorString(status));
}

class CudaPlace final : public Place {
 public:
  explicit CudaPlace(int index) : index_(index) {
    int count = 0;
    check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    require(index >= 0 && index < count, "device_index is ", index, "; there are ", count, " GPUs");
    enter();
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  }
  ~CudaPlace() override {
    cudaSetDevice(index_);
    for (void* memory : taken_) cudaFree(memory);
    if (stream_) cudaStreamDestroy(stream_);
  }
  void enter() const override { check(cudaSetDevice(index_), "cudaSetDevice"); }
  void* stream() const override { return stream_; }
  void* take(int64_t bytes) override {
    void* memory = nullptr;
    taken_.reserve(taken_.size() + 1);
    check<OutOfMemory>(cudaMalloc(&memory, static_cast<size_t>(bytes)),
                       std::to_string(bytes) + " bytes of the GPU");
    taken_.push_back(memory);
    return memory;
  }
  Weights bring(const Config& config, const Weights& weights) override {
    constexpr int64_t kAlignment = CachePlan::kAlignment;
    const int64_t element = size_of(weights.dtype);
    const auto room = [&](int64_t elements) {
      return (elements * element + kAlignment - 1) / kAlignment * kAlignment;
    };
    int64_t bytes = 0;
    each_tensor(config, weights, [&](const void*, int64_t elements) { bytes += room(elements); });
    char* at = static_cast<char*>(take(bytes));
    Weights moved = weights;
    each_tensor(config, moved, [&](const void*& tensor, int64_t elements) {
      check(cudaMemcpy(at, tensor, static_cast<size_t>(elements * element), cudaMemcpyHostToDevice),
            "copy of the weights");
      tensor = at;
      at += room(elements);
    });
    return moved;
  }
  void fetch(const float* from, int64_t count, float* to) const override {
    check(cudaMemcpyAsync(to, from, static_cast<size_t>(count) * sizeof(float),
                          cudaMemcpyDeviceToHost, stream_),
          "copy of the logits");
    check(cudaStreamSynchronize(stream_), "copy of the logits");
  }

 private:
  int index_;
  cudaStream_t stream_ = nullptr;
  std::vector<void*> taken_;
};

}  // namespace

std::unique_ptr<Place> make_cuda_place(int index) { return std::make_unique<CudaPlace>(index); }

}  // namespace tlinformer::c_api
