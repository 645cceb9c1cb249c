// The first half of a gated MLP over many rows: two products and their activation in one kernel, so
// that what gate and up give never leaves the multiprocessors.
#pragma once

#include <cstdint>

#include "../launch.cuh"
#include "tlinformer/config.h"

namespace tlinformer::cuda {

// hidden (rows, F) <- silu(input gate^T) * (input up^T), all of dtype and dense: input (rows, D),
// gate and up (F, D). 16-byte aligned; D is a multiple of 8.
struct GatedProduct {
  DType dtype = DType::bfloat16;
  int64_t rows = 0;
  int64_t inputs = 0, outputs = 0;  // D, F
  const void* input = nullptr;
  const void* gate = nullptr;
  const void* up = nullptr;
  void* hidden = nullptr;
};

// Whether the device (Hopper alone has the instructions) and the widths allow it.
bool takes_gated_product(DType dtype, int64_t inputs, int64_t outputs);
void gated_product(const GatedProduct& p, const Launch& how);

}  // namespace tlinformer::cuda
