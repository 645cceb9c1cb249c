// The tensors of a model one by one.
#pragma once

#include "tlinformer/config.h"

namespace tlinformer {

// Calls visit(pointer, elements) for every tensor, always in the same order. The pointer is a
// reference if the weights are not const.
template <class AnyWeights, class Visit>
void each_tensor(const Config& config, AnyWeights& weights, const Visit& visit) {
  const int64_t d = config.hidden_size, f = config.intermediate_size;
  const int64_t q = config.query_dim(), qkv = q + 2 * config.kv_dim();
  visit(weights.embed_tokens, config.vocab_size * d);
  visit(weights.norm_weight, d);
  visit(weights.norm_bias, d);
  for (auto& layer : weights.layers) {
    visit(layer.attn_norm_weight, d);
    visit(layer.attn_norm_bias, d);
    visit(layer.qkv_proj_weight, qkv * d);
    visit(layer.qkv_proj_bias, qkv);
    visit(layer.out_proj_weight, d * q);
    visit(layer.out_proj_bias, d);
    visit(layer.mlp_norm_weight, d);
    visit(layer.mlp_norm_bias, d);
    visit(layer.gate_proj_weight, f * d);
    visit(layer.up_proj_weight, f * d);
    visit(layer.down_proj_weight, d * f);
  }
}

}  // namespace tlinformer
