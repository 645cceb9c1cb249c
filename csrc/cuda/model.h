// The model and its cache as kernels see them: sizes, device pointers, strides.
#pragma once

#include "../runtime/backend.h"
#include "attention/decode_attention.h"
#include "rope.cuh"
#include "step/product.h"

namespace tlinformer::cuda {

struct Model {
  Config c;
  DType dtype;
  Weights weights;
  CachePlan plan;
  char* arena;
  Rope rope;

  Model(const Config& config, const Weights& from, const CachePlan& planned, Arena memory)
      : c(config),
        dtype(planned.options().dtype),
        weights(from),
        plan(planned),
        arena(static_cast<char*>(memory.data)),
        rope(Rope::of(config)) {}

  int heads() const { return static_cast<int>(c.num_attention_heads); }
  int kv_heads() const { return static_cast<int>(c.num_key_value_heads); }
  int head_dim() const { return static_cast<int>(c.head_dim()); }
  int hidden() const { return static_cast<int>(c.hidden_size); }
  int inner() const { return static_cast<int>(c.intermediate_size); }
  int vocab() const { return static_cast<int>(c.vocab_size); }

  const LayerWeights& layer(const Verb& verb) const {
    return weights.layers[static_cast<size_t>(verb.block * c.block_depth + verb.layer)];
  }
  Norm norm(const void* weight, const void* bias) const {
    return {weight, bias, static_cast<float>(c.layer_norm_eps)};
  }

  // Block 0's window continues its history in the same region.
  static bool follows_history(Cache cache, const Verb& verb) {
    return cache == Cache::window && verb.block == 0 && verb.layer == 0;
  }
  // Where the keys and values of all sequences lie; nothing for a region of no rows.
  CachedRows rows(Cache cache, const Verb& verb) const {
    const char* name = cache == Cache::context                                   ? "context"
                       : cache == Cache::window && !follows_history(cache, verb) ? "window"
                                                                                 : "history";
    const Region* region = plan.find(name, verb.block, verb.layer);
    if (!region) return {};
    const int64_t head_stride = region->rows * c.head_dim();
    const char* keys = arena + region->offset;
    return {keys, keys + region->bytes / 2, c.num_key_value_heads * head_stride, head_stride};
  }
  int64_t element() const { return size_of(dtype); }
};

}  // namespace tlinformer::cuda
