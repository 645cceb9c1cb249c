// The likeliest of tokens.
#pragma once

#include <cmath>

#include "product.h"

namespace tlinformer::cuda::step {

constexpr Candidate kNoCandidate = {-INFINITY, INT32_MAX};

// NaN is likelier than anything, so that nobody overlooks it; the lower id among equals.
__device__ inline Candidate likelier(Candidate a, Candidate b) {
  const bool a_nan = a.logit != a.logit, b_nan = b.logit != b.logit;
  if (a_nan != b_nan) return a_nan ? a : b;
  if (a_nan || a.logit == b.logit) return a.token < b.token ? a : b;
  return a.logit > b.logit ? a : b;
}

// Of lanes NEAREST and more apart, but less than END, to all of these.
template <int NEAREST, int END>
__device__ Candidate likeliest_of_lanes(Candidate own) {
#pragma unroll
  for (int distance = NEAREST; distance < END; distance *= 2) {
    own = likelier(own, {__shfl_xor_sync(0xffffffffu, own.logit, distance),
                         __shfl_xor_sync(0xffffffffu, own.token, distance)});
  }
  return own;
}
__device__ inline Candidate likeliest_of_warp(Candidate own) {
  return likeliest_of_lanes<1, 32>(own);
}

}  // namespace tlinformer::cuda::step
