// The weights of one layer as the CPU wants them: matrices borrowed, vectors in float32.
#pragma once

#include <vector>

#include "dense.h"
#include "kernels.h"
#include "tlinformer/config.h"

namespace tlinformer::cpu {

inline std::vector<float> to_floats(DType dtype, const void* from, int64_t n) {
  if (dtype == DType::float32) {
    return {static_cast<const float*>(from), static_cast<const float*>(from) + n};
  }
  std::vector<float> to(static_cast<size_t>(n));
  kernels().b16.widen(static_cast<const bf16*>(from), n, to.data());
  return to;
}

struct Layer {
  Layer(const Config& c, DType dtype, const LayerWeights& from)
      : attn_norm_weight(to_floats(dtype, from.attn_norm_weight, c.hidden_size)),
        attn_norm_bias(to_floats(dtype, from.attn_norm_bias, c.hidden_size)),
        mlp_norm_weight(to_floats(dtype, from.mlp_norm_weight, c.hidden_size)),
        mlp_norm_bias(to_floats(dtype, from.mlp_norm_bias, c.hidden_size)),
        qkv_bias(to_floats(dtype, from.qkv_proj_bias, c.query_dim() + 2 * c.kv_dim())),
        out_bias(to_floats(dtype, from.out_proj_bias, c.hidden_size)),
        qkv{from.qkv_proj_weight, qkv_bias.data(), c.query_dim() + 2 * c.kv_dim(), c.hidden_size},
        out{from.out_proj_weight, out_bias.data(), c.hidden_size, c.query_dim()},
        gate{from.gate_proj_weight, nullptr, c.intermediate_size, c.hidden_size},
        up{from.up_proj_weight, nullptr, c.intermediate_size, c.hidden_size},
        down{from.down_proj_weight, nullptr, c.hidden_size, c.intermediate_size} {}
  Layer(Layer&&) = default;  // moving a vector keeps the address that its Matrix holds
  Layer(const Layer&) = delete;

  std::vector<float> attn_norm_weight, attn_norm_bias, mlp_norm_weight, mlp_norm_bias;
  std::vector<float> qkv_bias, out_bias;
  Matrix qkv, out, gate, up, down;
};

}  // namespace tlinformer::cpu
