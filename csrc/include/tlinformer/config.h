// What a model is: sizes, windows, variant. The names are those of config.json.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace tlinformer {

enum class DType { float32, bfloat16, float16 };
int64_t size_of(DType dtype);
const char* name_of(DType dtype);
DType dtype_from_name(const std::string& name);

enum class Device { cpu, cuda };

enum class Variant { tlinformer, tconstformer };

struct Config {
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t num_attention_heads = 0;
  int64_t num_key_value_heads = 0;
  int64_t num_blocks = 2;
  int64_t block_depth = 4;
  int64_t history_window = 256;  // rows of compressed history; kAuto: grows with ln(history)
  int64_t generation_window = 256;
  int64_t intermediate_size = 0;
  double rope_theta = 10000.0;
  double layer_norm_eps = 1e-5;
  double history_window_coefficient = 12.0;  // c of the "auto" history window
  Variant variant = Variant::tlinformer;

  static constexpr int64_t kAuto = 0;

  void validate() const;  // throws InvalidArgument naming the first bad field
  int64_t head_dim() const { return hidden_size / num_attention_heads; }
  int64_t num_layers() const { return num_blocks * block_depth; }
  int64_t query_dim() const { return num_attention_heads * head_dim(); }
  int64_t kv_dim() const { return num_key_value_heads * head_dim(); }

  // Tokens before the generation window of position `position`: W * floor(position / W).
  int64_t history_at(int64_t position) const {
    return position / generation_window * generation_window;
  }
  // Rows a history of `history` tokens is compressed to (never more than the history itself).
  int64_t compressed_rows(int64_t history) const;
};

// Borrowed pointers to the tensors of one layer, row-major, all of Weights::dtype.
struct LayerWeights {
  const void* attn_norm_weight = nullptr;  // (D)
  const void* attn_norm_bias = nullptr;    // (D)
  const void* qkv_proj_weight = nullptr;   // ((Hq + 2 Hkv) d, D), rows in the order q, k, v
  const void* qkv_proj_bias = nullptr;     // ((Hq + 2 Hkv) d)
  const void* out_proj_weight = nullptr;   // (D, D)
  const void* out_proj_bias = nullptr;     // (D)
  const void* mlp_norm_weight = nullptr;   // (D)
  const void* mlp_norm_bias = nullptr;     // (D)
  const void* gate_proj_weight = nullptr;  // (F, D)
  const void* up_proj_weight = nullptr;    // (F, D)
  const void* down_proj_weight = nullptr;  // (D, F)
};

// The whole model. The caller keeps the memory alive as long as the engine lives.
struct Weights {
  DType dtype = DType::float32;
  const void* embed_tokens = nullptr;  // (V, D), also the output matrix
  const void* norm_weight = nullptr;   // (D)
  const void* norm_bias = nullptr;     // (D)
  std::vector<LayerWeights> layers;    // num_blocks * block_depth, block by block
};

}  // namespace tlinformer
