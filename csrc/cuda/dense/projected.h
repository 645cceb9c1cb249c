// A layer's projection of many rows in one kernel: the product, the rotation, and the way into the
// cache.
#pragma once

#include "../rows/rows.h"

namespace tlinformer::cuda {

// As rotate_rows, of lines that are made here and never stored: input weight^T + bias, of dtype.
struct ProjectedRows : RotateRows {
  const void* input = nullptr;  // (rows, inputs)
  const void* weight =
      nullptr;                 // (columns, inputs): of q if query is given, of k and v if keys are
  const void* bias = nullptr;  // (columns)
  int64_t inputs = 0;
};

// Whether the device (Hopper alone has the instructions) and the widths allow it.
bool takes_projected_rows(DType dtype, int64_t inputs, int64_t columns, int head_dim);
void projected_rows(const ProjectedRows& p, const Launch& how);

}  // namespace tlinformer::cuda
