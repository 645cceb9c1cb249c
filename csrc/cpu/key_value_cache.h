// The cache on the CPU: a region holds keys, then values, each (batch, heads, rows, d).
#pragma once

#include "../runtime/backend.h"
#include "attend.h"
#include "rope.h"

namespace tlinformer::cpu {

class KeyValueCache {
 public:
  KeyValueCache(const Config& config, const CachePlan& plan, char* arena, int threads)
      : c_(config), plan_(plan), arena_(arena), threads_(threads) {}

  // What a span's attend verb reads.
  Keys read(Cache cache, const Verb& verb, const Span& span) const {
    const Slots slots = slots_of(plan_, cache, verb.block, verb.layer, span);
    if (slots.count == 0) return {};
    const int64_t head_stride = slots.region->rows * c_.head_dim();
    const char* k = arena_ + slots.region->offset +
                    span.sequence * c_.num_key_value_heads * head_stride * element();
    return {k,           k + slots.region->bytes / 2, head_stride, slots.first,
            slots.count, cache == Cache::window};
  }

  // Rotates and stores the keys, stores the values of a span: lines of (Hkv d) keys and as many
  // values, `stride` floats apart.
  void write(Cache cache, const Verb& verb, const Span& span, const Rope& rope, const float* angles,
             const float* lines, int64_t stride) const {
    if (element() == 2) return write_as<bf16>(cache, verb, span, rope, angles, lines, stride);
    write_as<float>(cache, verb, span, rope, angles, lines, stride);
  }

 private:
  int64_t element() const { return size_of(plan_.options().dtype); }

  template <class T>
  void write_as(Cache cache, const Verb& verb, const Span& span, const Rope& rope,
                const float* angles, const float* lines, int64_t stride) const {
    const int64_t d = c_.head_dim();
    const Keys keys = read(cache, verb, span);
    const int64_t slot = span.begin - slots_of(plan_, cache, verb.block, verb.layer, span).base;
    T* k = static_cast<T*>(const_cast<void*>(keys.k)) + slot * d;
    T* v = static_cast<T*>(const_cast<void*>(keys.v)) + slot * d;
#pragma omp parallel for num_threads(threads_) schedule(static) if (span.rows > 8)
    for (int64_t i = 0; i < span.rows; ++i) {
      const float* line = lines + i * stride;
      float rotated[kMaxHeadDim];
      for (int64_t h = 0; h < c_.num_key_value_heads; ++h) {
        const int64_t at = h * keys.head_stride + i * d;
        rope.rotate(line + h * d, angles + i * d, 1, 1.0f, rotated);
        typed<T>(kernels()).narrow(rotated, d, k + at);
        typed<T>(kernels()).narrow(line + c_.kv_dim() + h * d, d, v + at);
      }
    }
  }

  const Config& c_;
  const CachePlan& plan_;
  char* arena_;
  int threads_;
};

}  // namespace tlinformer::cpu
