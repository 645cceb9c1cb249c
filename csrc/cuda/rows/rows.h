// What surrounds the products when many rows go through a layer (prefill and slide). Arrays are
// 16-byte aligned; D and F are multiples of 8, d and head_stride of 4.
#pragma once

#include <cstdint>

#include "../launch.cuh"
#include "../rope.cuh"
#include "../step/product.h"
#include "tlinformer/config.h"

namespace tlinformer::cuda {

// x (rows, D) float32 <- embed[tokens]; and, with a norm, normed (rows, D) of dtype <- norm(x).
// With embed null x is read instead; with embed x may be null: not wanted.
struct NormRows {
  DType dtype = DType::bfloat16;
  int64_t rows = 0;
  int hidden_size = 0;
  const int32_t* tokens = nullptr;  // null: rows 0 ... rows - 1 of embed
  const void* embed = nullptr;
  float* x = nullptr;
  const Norm* norm = nullptr;  // host pointer; null: x only
  void* normed = nullptr;
};
void norm_rows(const NormRows& n, const Launch& how);

// Where keys and values of rows go: (Hkv, capacity, d) of a sequence, from row `slot` on.
struct CachePlace {
  void* keys = nullptr;  // null: nowhere
  void* values = nullptr;
  int64_t head_stride = 0, slot = 0;
};

// Of `lines`, line_stride elements apart: [q (Hq d) if query is given][k (Hkv d), v (Hkv d) if any
// keys are]. query (rows, Hq d) <- rotated q; the place's rows <- rotated k, v. Those of the first
// `apart` rows go to a place of their own.
struct RotateRows : CachePlace {
  DType dtype = DType::bfloat16;
  int64_t rows = 0, begin = 0;  // position of row 0
  int query_heads = 0, kv_heads = 0, head_dim = 0;
  Rope rope{};
  const void* lines = nullptr;
  int64_t line_stride = 0;
  const int32_t* tokens = nullptr;  // row i's line; null: line i
  void* query = nullptr;
  int64_t apart = 0;
  CachePlace own{};
};
void rotate_rows(const RotateRows& r, const Launch& how);

// gate_up (rows, 2 F): [gate][up]; hidden (rows, F) <- silu(gate) * up.
void silu_rows(DType dtype, const void* gate_up, void* hidden, int64_t rows, int64_t columns,
               const Launch& how);

// to (count) <- from, of dtype: the biases that Dense::add wants in float32.
void widen(DType dtype, const void* from, float* to, int64_t count, const Launch& how);

}  // namespace tlinformer::cuda
