// Which probabilities dropout keeps: a function of the seed and of a score's place alone, so that
// the backward pass finds it again in whatever order it comes by.
#pragma once

#include <cstdint>

namespace tlinformer::cuda {

// A bijection that spreads every bit over all.
__device__ inline uint32_t mix_bits(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

// Bits of a score are the product of its row's and its key's. With both uniform and the row's odd,
// the product is uniform, and any three in a rectangle of scores are independent.
struct DropoutBits {
  uint32_t rows, keys;

  __device__ DropoutBits(const int64_t* seed, int64_t head) {
    const uint64_t s = static_cast<uint64_t>(*seed);
    rows = mix_bits(static_cast<uint32_t>(s) ^
                    mix_bits(static_cast<uint32_t>(s >> 32) + static_cast<uint32_t>(head)));
    keys = mix_bits(rows ^ 0x9e3779b9u);
  }

  // Of an output row's window (0) or context (1).
  __device__ uint32_t of_row(int row, int group) const {
    return mix_bits(rows ^ static_cast<uint32_t>(2 * row + group) * 0x9e3779b1u) | 1;
  }
  __device__ uint32_t of_key(int key) const {
    return mix_bits(keys ^ static_cast<uint32_t>(key) * 0x9e3779b1u);
  }
};

// All bits of the low and of the high half of a word, where the products reach the threshold.
__device__ inline uint32_t kept_halves(uint32_t low, uint32_t high, uint32_t threshold) {
  return (low >= threshold ? 0xffffu : 0u) | (high >= threshold ? 0xffff0000u : 0u);
}

}  // namespace tlinformer::cuda
