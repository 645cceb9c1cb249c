// Matrix products of many rows, by cuBLASLt. Arrays are 16-byte aligned, and so are their rows:
// inputs, outputs and to_stride are multiples of 8.
#pragma once

#include <cstdint>
#include <memory>

#include "../launch.cuh"
#include "tlinformer/config.h"

namespace tlinformer::cuda {

// Keeps what cuBLASLt chose for each shape, so the first product of a shape takes longer.
class Dense {
 public:
  // `workspace` is device memory (256-byte aligned) that cuBLASLt may use; it outlives this.
  Dense(DType dtype, void* workspace, int64_t workspace_bytes);
  ~Dense();

  // to (rows, outputs), row stride `to_stride` elements, of dtype <- input weight^T + bias (or
  // null). input (rows, inputs) dense, weight (outputs, inputs), both of dtype.
  void product(const void* input, int64_t rows, const void* weight, const void* bias,
               int64_t outputs, int64_t inputs, void* to, int64_t to_stride, const Launch& how);
  // x (rows, outputs) float32 <- input weight^T + bias (or null), in float32 as x is: cuBLASLt adds
  // no other.
  void set(const void* input, int64_t rows, const void* weight, const float* bias, int64_t outputs,
           int64_t inputs, float* x, const Launch& how);
  // x += the same.
  void add(const void* input, int64_t rows, const void* weight, const float* bias, int64_t outputs,
           int64_t inputs, float* x, const Launch& how);

  static int64_t workspace_bytes();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace tlinformer::cuda
