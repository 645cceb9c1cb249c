// From torch's tensors to the kernels' arguments.
#pragma once

#define USE_CUDA  // the stable ABI's functions about streams; before any of torch's headers
#include "ops.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#pragma GCC diagnostic pop

#include "cuda/attention/prefill_attention.h"

namespace tlinformer::python {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The strides of its rows; those of a dimension of size 1 say nothing.
inline cuda::HeadTensor head_tensor(const Tensor& x, const void* data) {
  const auto stride = [&](int64_t i) { return x.size(i) == 1 ? 0 : x.stride(i); };
  return {const_cast<void*>(data), stride(0), stride(1), stride(2)};
}

// With rows that the kernel's copies of 16 bytes (8 where rows are no multiple of that) can read.
inline Tensor with_aligned_rows(const Tensor& x) {
  const int64_t alignment = x.size(3) % 8 == 0 ? 8 : 4;
  const cuda::HeadTensor rows = head_tensor(x, x.const_data_ptr());
  const bool aligned = (x.stride(3) == 1 || x.size(3) == 1) &&
                       reinterpret_cast<uintptr_t>(rows.data) % (2 * alignment) == 0 &&
                       rows.batch_stride % alignment == 0 && rows.head_stride % alignment == 0 &&
                       rows.row_stride % alignment == 0 && rows.row_stride < (1 << 24);
  if (aligned) return x;
  Tensor copy = torch::stable::new_empty(x, x.sizes());
  return torch::stable::copy_(copy, x);
}

// Of a query that CUDA has a kernel for.
inline DType checked_dtype(const Tensor& query) {
  const ScalarType dtype = query.scalar_type();
  require(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "query is ",
          torch::headeronly::toString(dtype),
          ", must be BFloat16 or Half on CUDA; convert it with .to(torch.bfloat16)");
  require(cuda::prefill_takes_head_size(query.size(3)), "query is ", shape_of(query),
          ", its head size on CUDA must be one of", cuda::prefill_head_sizes());
  return dtype == ScalarType::Half ? DType::float16 : DType::bfloat16;
}

inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace tlinformer::python
