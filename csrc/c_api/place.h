// Where an engine of the C interface lives: memory for its weights and its cache.
#pragma once

#include <memory>

#include "tlinformer/config.h"

namespace tlinformer::c_api {

class Place {
 public:
  virtual ~Place() = default;
  virtual void enter() const = 0;         // before this thread uses an engine of this place
  virtual void* take(int64_t bytes) = 0;  // memory that lives as long as the place
  virtual void* stream() const { return nullptr; }
  // Host weights to where the engine reads them.
  virtual Weights bring(const Config& config, const Weights& weights) = 0;
  virtual void fetch(const float* from, int64_t count, float* to) const = 0;  // to the host
};

std::unique_ptr<Place> make_cpu_place();
#if defined(TLINFORMER_CUDA)
std::unique_ptr<Place> make_cuda_place(int index);
#endif

}  // namespace tlinformer::c_api
