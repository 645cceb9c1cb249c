#include "tlinformer/config.h"

#include <algorithm>
#include <cmath>

#include "tlinformer/error.h"
#include "tlinformer/sampling.h"

namespace tlinformer {

int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return "float32";
    case DType::bfloat16:
      return "bfloat16";
    case DType::float16:
      return "float16";
  }
  throw InvalidArgument("dtype is none of float32, bfloat16, float16");
}

DType dtype_from_name(const std::string& name) {
  for (DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
    if (name == name_of(dtype)) return dtype;
  }
  throw InvalidArgument("dtype '" + name + "' is none of float32, bfloat16, float16");
}

void Config::validate() const {
  constexpr int64_t kMostLayers = 65536;
  const auto positive = [](const char* field, int64_t value) {
    constexpr int64_t kMost = int64_t{1} << 31;
    require(value > 0 && value < kMost, field, " = ", value, "; it must be 1 to ", kMost - 1);
  };
  positive("vocab_size", vocab_size);
  positive("hidden_size", hidden_size);
  positive("num_attention_heads", num_attention_heads);
  positive("num_key_value_heads", num_key_value_heads);
  positive("num_blocks", num_blocks);
  positive("block_depth", block_depth);
  positive("generation_window", generation_window);
  positive("intermediate_size", intermediate_size);
  require(block_depth >= 2, "block_depth = ", block_depth,
          "; a block needs at least 2 layers, compress and restore");
  require(num_layers() <= kMostLayers, "num_blocks * block_depth = ", num_layers(),
          " layers; they must be at most ", kMostLayers);
  require(history_window >= 0, "history_window = ", history_window,
          "; it must be at least 1, or 0 for auto");
  require(hidden_size % num_attention_heads == 0, "hidden_size = ", hidden_size,
          " is no multiple of num_attention_heads = ", num_attention_heads);
  require(head_dim() % 2 == 0, "head size ", head_dim(),
          " (hidden_size / num_attention_heads) is odd; rotary embeddings need pairs");
  require(head_dim() <= 256, "head size ", head_dim(), " is above the limit of 256");
  require(num_attention_heads % num_key_value_heads == 0,
          "num_attention_heads = ", num_attention_heads,
          " is no multiple of num_key_value_heads = ", num_key_value_heads);
  require(rope_theta > 0 && std::isfinite(rope_theta), "rope_theta = ", rope_theta,
          "; it must be positive");
  require(layer_norm_eps > 0 && std::isfinite(layer_norm_eps), "layer_norm_eps = ", layer_norm_eps,
          "; it must be positive");
  require(history_window_coefficient > 0 && std::isfinite(history_window_coefficient),
          "history_window_coefficient = ", history_window_coefficient, "; it must be positive");
}

int64_t Config::compressed_rows(int64_t history) const {
  if (history <= 0) return 0;
  if (history_window != kAuto) return std::min(history, history_window);
  const double length = static_cast<double>(history);
  const double wanted = std::ceil(history_window_coefficient * std::log(length) / 8) * 8;
  return static_cast<int64_t>(std::min(length, std::max(8.0, wanted)));
}

void SamplingParams::validate(int64_t vocab_size) const {
  require(temperature >= 0 && std::isfinite(temperature), "temperature = ", temperature,
          "; it must be at least 0 (0 is greedy)");
  require(top_k >= 0, "top_k = ", top_k, "; it must be at least 0 (0 keeps all tokens)");
  require(top_p > 0 && top_p <= 1, "top_p = ", top_p, "; it must be in (0, 1]");
  require(min_p >= 0 && min_p <= 1, "min_p = ", min_p, "; it must be in [0, 1]");
  require(repetition_penalty > 0 && std::isfinite(repetition_penalty),
          "repetition_penalty = ", repetition_penalty, "; it must be positive (1 is off)");
  for (int32_t id : stop_token_ids) {
    require(id >= 0 && id < vocab_size, "stop token id ", id, " is outside the vocabulary, 0 to ",
            vocab_size - 1);
  }
}

}  // namespace tlinformer
