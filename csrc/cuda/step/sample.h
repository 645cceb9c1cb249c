// Draws the next token of every live sequence on the device, and starts its step.
#pragma once

#include <cstdint>

#include "../launch.cuh"
#include "../rope.cuh"
#include "../state.h"
#include "product.h"
#include "tlinformer/config.h"
#include "tlinformer/sampling.h"

namespace tlinformer::cuda {

// SamplingParams as kernels read them from device memory, so that a captured step serves all.
struct DeviceSampling {
  double temperature, top_p, min_p, repetition_penalty;
  int64_t top_k;
  uint64_t seed;
};

// Flags of tokens, a byte each.
constexpr uint8_t kSeen = 1;  // (batch, V): in the sequence already

struct SampleStep {
  DType dtype = DType::bfloat16;
  int batch = 1, vocab_size = 0, hidden_size = 0;
  const DeviceSampling* sampling = nullptr;
  const float* logits = nullptr;          // (batch, V)
  const Candidate* candidates = nullptr;  // (batch, count), by head_step
  int candidate_count = 0;
  SequenceState* state = nullptr;  // (batch)
  uint8_t* seen = nullptr;         // (batch, V), kept up to date if the penalty is not 1
  const uint8_t* stops = nullptr;  // (V), 1: a sequence ends after drawing this token
  int32_t* tokens = nullptr;       // (batch, token_stride): by position
  int64_t token_stride = 0;
  const void* embed = nullptr;  // (V, D)
  float* x = nullptr;           // (batch, D) <- the new token's row of embed
  Rope rope{};
  int pairs = 0;                // d / 2
  float2* rotations = nullptr;  // (batch, pairs) <- cos, sin of each pair at position last + 1
  // Ring in pinned host memory, (ring_rows, batch): the drawn token, or -2 - (its first NaN's
  // index) for logits with NaN; the host waits for a value other than kPending. Draw number
  // *draws goes to row *draws % ring_rows; the kernel then increments *draws (one for the batch).
  int32_t* ring = nullptr;
  int64_t ring_rows = 0;
  int64_t* draws = nullptr;  // on the device
  void* scratch = nullptr;   // sample_scratch() bytes, zeroed once at creation
};
constexpr int32_t kPending = -1;

int64_t sample_scratch(int batch, int vocab_size);

// Of each sequence: live 2 -> 0. Live 1: token drawn at position last + 1, stored in tokens, last
// incremented, its row of embed written to x, live <- 2 if it is a stop token or the logits hold
// NaN (then no token is stored, last stays, and live <- 0 at once).
void sample_step(const SampleStep& s, const Launch& how);

// The same without a draw: the token at tokens[last + 1] is given. Live sequences only.
void feed_step(const SampleStep& s, const Launch& how);

}  // namespace tlinformer::cuda
