// Draws a token from float32 logits on the CPU.
#pragma once

#include <cstdint>
#include <vector>

#include "tlinformer/sampling.h"

namespace tlinformer::cpu {

class Sampler {
 public:
  // Same (seed, sequence, position): same random number. Throws NumericalError on NaN logits.
  int32_t draw(const float* logits, int64_t vocab_size, const SamplingParams& params,
               const uint8_t* seen, int64_t sequence, int64_t position);

 private:
  struct Candidate {
    int32_t token;
    double logit;
  };
  std::vector<Candidate> candidates_;
  std::vector<double> weights_;
};

}  // namespace tlinformer::cpu
