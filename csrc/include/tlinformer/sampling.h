// How the next token is drawn from the logits.
#pragma once

#include <cstdint>
#include <vector>

namespace tlinformer {

// The filters apply in this order: repetition penalty, temperature, top-k, top-p, min-p.
struct SamplingParams {
  double temperature = 0.0;         // 0: greedy, after the repetition penalty alone
  int64_t top_k = 0;                // keep the k likeliest tokens; 0: all
  double top_p = 1.0;               // keep the smallest set whose probability reaches p
  double min_p = 0.0;               // drop tokens less likely than min_p times the likeliest
  double repetition_penalty = 1.0;  // > 1 makes tokens already in the sequence less likely
  uint64_t seed = 0;                // same seed, same weights, same prompt: same tokens
  std::vector<int32_t> stop_token_ids;

  void validate(int64_t vocab_size) const;  // throws InvalidArgument naming the field
};

}  // namespace tlinformer
