#include "sample.h"

#include <algorithm>
#include <cmath>

#include "tlinformer/error.h"

namespace tlinformer::cpu {
namespace {

// Philox 4x32-10 (Salmon et al. 2011): a counter-based generator, so that a draw depends on the
// seed and its place alone, whatever was drawn before and on which device.
double uniform(uint64_t seed, int64_t sequence, int64_t position) {
  uint32_t c[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32),
                   static_cast<uint32_t>(sequence), static_cast<uint32_t>(sequence >> 32)};
  uint32_t k[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c[0];
    const uint64_t b = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t next[4] = {
        static_cast<uint32_t>(b >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(b),
        static_cast<uint32_t>(a >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(a)};
    std::copy(next, next + 4, c);
    k[0] += 0x9E3779B9;
    k[1] += 0xBB67AE85;
  }
  return (c[0] + 0.5) / 4294967296.0;
}

}  // namespace

int32_t Sampler::draw(const float* logits, int64_t vocab_size, const SamplingParams& params,
                      const uint8_t* seen, int64_t sequence, int64_t position) {
  candidates_.clear();
  candidates_.reserve(static_cast<size_t>(vocab_size));
  for (int64_t i = 0; i < vocab_size; ++i) {
    double logit = logits[i];
    require<NumericalError>(!std::isnan(logit), "the logits of sequence ", sequence,
                            " at position ", position, " contain NaN (token ", i,
                            "): the weights hold NaN or infinity, or overflowed their dtype");
    if (seen && seen[i]) {
      logit = logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
    }
    candidates_.push_back({static_cast<int32_t>(i), logit});
  }
  // Ties go to the lower token id, everywhere.
  const auto likelier = [](const Candidate& a, const Candidate& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
  };
  const Candidate best = *std::min_element(candidates_.begin(), candidates_.end(), likelier);
  if (params.temperature == 0) return best.token;

  if (params.top_k > 0 && params.top_k < vocab_size) {
    // Sorted, because the order of the candidates decides which of them a random number means.
    std::partial_sort(candidates_.begin(), candidates_.begin() + params.top_k, candidates_.end(),
                      likelier);
    candidates_.resize(static_cast<size_t>(params.top_k));
  }
  const auto weight = [&](const Candidate& candidate) {
    return std::exp((candidate.logit - best.logit) / params.temperature);
  };
  double total = 0;
  if (params.top_p < 1) {
    std::sort(candidates_.begin(), candidates_.end(), likelier);
    for (const Candidate& candidate : candidates_) total += weight(candidate);
    double kept = 0;
    size_t count = 0;
    while (count < candidates_.size() && (count == 0 || kept < params.top_p * total)) {
      kept += weight(candidates_[count++]);
    }
    candidates_.resize(count);
  }
  weights_.clear();
  total = 0;
  for (const Candidate& candidate : candidates_) {
    const double w = weight(candidate);  // relative to the likeliest token
    weights_.push_back(w >= params.min_p ? w : 0.0);
    total += weights_.back();
  }
  double left = uniform(params.seed, sequence, position) * total;
  int32_t chosen = best.token;
  for (size_t i = 0; i < weights_.size(); ++i) {
    if (weights_[i] == 0) continue;
    chosen = candidates_[i].token;
    left -= weights_[i];
    if (left <= 0) break;
  }
  return chosen;
}

}  // namespace tlinformer::cpu
