// A model with random weights, and an engine, in host memory.
#pragma once

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/kernels.h"
#include "tlinformer/engine.h"

namespace tlinformer {

inline Config small_config() {
  Config c;
  c.vocab_size = 37;
  c.hidden_size = 24;
  c.num_attention_heads = 4;
  c.num_key_value_heads = 2;
  c.num_blocks = 3;
  c.block_depth = 3;
  c.history_window = 5;
  c.generation_window = 4;
  c.intermediate_size = 40;
  return c;
}

// Weights of float32 or bfloat16, and their memory.
struct RandomModel {
  Config config;
  Weights weights;
  std::vector<std::vector<char>> storage;
  std::mt19937 generator{7};

  const void* tensor(int64_t n, float scale, float shift = 0) {
    std::normal_distribution<float> draw(shift, scale);
    std::vector<float> values(static_cast<size_t>(n));
    for (float& value : values) value = draw(generator);
    storage.emplace_back(static_cast<size_t>(n * size_of(weights.dtype)));
    if (weights.dtype == DType::float32) {
      std::memcpy(storage.back().data(), values.data(), storage.back().size());
    } else {
      cpu::kernels().b16.narrow(values.data(), n,
                                reinterpret_cast<cpu::bf16*>(storage.back().data()));
    }
    return storage.back().data();
  }

  RandomModel(const Config& c, DType dtype) : config(c) {
    weights.dtype = dtype;
    const int64_t d = c.hidden_size, f = c.intermediate_size, qkv = c.query_dim() + 2 * c.kv_dim();
    const float in = 1 / std::sqrt(float(d));
    weights.embed_tokens = tensor(c.vocab_size * d, 1);
    weights.norm_weight = tensor(d, 0.2f, 1);
    weights.norm_bias = tensor(d, 0.2f);
    for (int64_t i = 0; i < c.num_layers(); ++i) {
      LayerWeights layer;
      layer.attn_norm_weight = tensor(d, 0.2f, 1);
      layer.attn_norm_bias = tensor(d, 0.2f);
      layer.qkv_proj_weight = tensor(qkv * d, in);
      layer.qkv_proj_bias = tensor(qkv, 0.2f);
      layer.out_proj_weight = tensor(d * d, in);
      layer.out_proj_bias = tensor(d, 0.2f);
      layer.mlp_norm_weight = tensor(d, 0.2f, 1);
      layer.mlp_norm_bias = tensor(d, 0.2f);
      layer.gate_proj_weight = tensor(f * d, in);
      layer.up_proj_weight = tensor(f * d, in);
      layer.down_proj_weight = tensor(d * f, 1 / std::sqrt(float(f)));
      weights.layers.push_back(layer);
    }
  }
};

// An engine on an arena of its own that is exactly as large as planned and full of NaN.
struct Owned {
  CachePlan plan;
  std::vector<char> memory;
  Engine engine;
  static char* aligned(std::vector<char>& memory) {
    const auto at = reinterpret_cast<uintptr_t>(memory.data());
    return memory.data() + (64 - at % 64) % 64;
  }
  Owned(const RandomModel& model, int64_t max_context, int64_t batch, int threads)
      : plan(CachePlan::make(model.config, {max_context, batch, model.weights.dtype})),
        memory(static_cast<size_t>(plan.total_bytes()) + 64, char(0xff)),
        engine(model.config, model.weights, plan, {aligned(memory), plan.total_bytes()},
               {threads}) {}
  std::vector<float> logits() const {
    const float* from = engine.logits();
    return {from, from + engine.sequences() * engine.config().vocab_size};
  }
};

}  // namespace tlinformer
