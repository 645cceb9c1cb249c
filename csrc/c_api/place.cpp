#include "place.h"

#include <algorithm>
#include <new>
#include <vector>

#include "tlinformer/cache.h"

namespace tlinformer::c_api {
namespace {

class CpuPlace final : public Place {
 public:
  ~CpuPlace() override {
    for (void* memory : taken_) ::operator delete(memory, kAlignment);
  }
  void enter() const override {}
  void* take(int64_t bytes) override {
    taken_.reserve(taken_.size() + 1);
    taken_.push_back(::operator new(static_cast<size_t>(bytes), kAlignment));
    return taken_.back();
  }
  Weights bring(const Config&, const Weights& weights) override { return weights; }
  void fetch(const float* from, int64_t count, float* to) const override {
    std::copy(from, from + count, to);
  }

 private:
  static constexpr std::align_val_t kAlignment{CachePlan::kAlignment};
  std::vector<void*> taken_;
};

}  // namespace

std::unique_ptr<Place> make_cpu_place() { return std::make_unique<CpuPlace>(); }

}  // namespace tlinformer::c_api
