// The first half of a gated MLP over many rows: the norm, two products and their activation in one
// kernel, so that what the norm, gate and up give never leaves the multiprocessors.
#pragma once

#include <cstdint>

#include "../launch.cuh"
#include "../step/product.h"
#include "tlinformer/config.h"

namespace tlinformer::cuda {

// hidden (rows, F) <- silu(n gate^T) * (n up^T), where n = norm(x), rounded to dtype. x (rows, D)
// float32; the others of dtype: gate and up (F, D). All dense and 16-byte aligned; D is a multiple
// of 8.
struct GatedProduct {
  DType dtype = DType::bfloat16;
  int64_t rows = 0;
  int64_t inputs = 0, outputs = 0;  // D, F
  float* x = nullptr;
  Norm norm{};
  const void* gate = nullptr;
  const void* up = nullptr;
  void* hidden = nullptr;
  // With embed (V, D), x is made here first: x <- embed[tokens] + branch.
  const void* embed = nullptr;
  const int32_t* tokens = nullptr;  // (rows)
  const float* branch = nullptr;    // (rows, D)
};

// Whether the device (Hopper alone has the instructions) and the widths allow it.
bool takes_gated_product(DType dtype, int64_t inputs, int64_t outputs);
void gated_product(const GatedProduct& p, const Launch& how);

}  // namespace tlinformer::cuda
