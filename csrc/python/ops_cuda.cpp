#if defined(TLINFORMER_CUDA)

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
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The strides of its rows; those of a dimension of size 1 say nothing.
cuda::HeadTensor head_tensor(const Tensor& x, const void* data) {
  const auto stride = [&](int64_t i) { return x.size(i) == 1 ? 0 : x.stride(i); };
  return {const_cast<void*>(data), stride(0), stride(1), stride(2)};
}

// With rows that the kernel's copies of 16 bytes (8 where rows are no multiple of that) can read.
Tensor with_aligned_rows(const Tensor& x) {
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

}  // namespace

Tensor window_attention_cuda(const Tensor& query, const Tensor& key, const Tensor& value,
                             const std::optional<Tensor>& context_key,
                             const std::optional<Tensor>& context_value, double scale) {
  const ScalarType dtype = query.scalar_type();
  require(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "query is ",
          torch::headeronly::toString(dtype),
          ", must be BFloat16 or Half on CUDA; convert it with .to(torch.bfloat16)");
  require(cuda::prefill_takes_head_size(query.size(3)), "query is ", shape_of(query),
          ", its head size on CUDA must be one of", cuda::prefill_head_sizes());
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Tensor output = torch::stable::new_empty(query, query.sizes());
  cuda::PrefillAttention a;
  a.dtype = dtype == ScalarType::Half ? DType::float16 : DType::bfloat16;
  a.batch = query.size(0);
  a.query_heads = static_cast<int>(query.size(1));
  a.kv_heads = static_cast<int>(key.size(1));
  a.rows = query.size(2);
  a.head_dim = static_cast<int>(query.size(3));
  a.scale = static_cast<float>(scale);
  if (query.numel() == 0) return output;
  const Tensor aligned_query = with_aligned_rows(query);
  a.query = head_tensor(aligned_query, aligned_query.const_data_ptr());
  a.output = head_tensor(output, output.mutable_data_ptr());
  // Copies live until the kernel is launched; their memory is reused behind it on its stream.
  std::optional<Tensor> copies[2][2];
  const auto set_group = [&](int g, const Tensor& keys, const Tensor& values) {
    copies[g][0] = with_aligned_rows(keys);
    copies[g][1] = with_aligned_rows(values);
    a.groups[g].keys = head_tensor(*copies[g][0], copies[g][0]->const_data_ptr());
    a.groups[g].values = head_tensor(*copies[g][1], copies[g][1]->const_data_ptr());
    a.groups[g].count = keys.size(2);
  };
  set_group(0, key, value);
  a.groups[0].causal = true;
  if (context_key && context_key->size(2) > 0) set_group(1, *context_key, *context_value);
  a.scratch_bytes = cuda::prefill_attention_scratch(a.batch, a.rows, a.query_heads, a.head_dim);
  const Tensor scratch = torch::stable::new_empty(
      query, {a.scratch_bytes / static_cast<int64_t>(sizeof(float))}, ScalarType::Float);
  if (a.scratch_bytes > 0) a.scratch = scratch.mutable_data_ptr();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(query.get_device_index(), &stream));
  cuda::prefill_attention(a, {static_cast<cudaStream_t>(stream), false});
  return output;
}

}  // namespace tlinformer::python

#endif  // TLINFORMER_CUDA
