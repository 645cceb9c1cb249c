#if defined(TLINFORMER_CUDA)

#include "ops_cuda.h"

#include "cuda/attention/prefill_attention.h"

namespace tlinformer::python {

Tensor window_attention_cuda(const Tensor& query, const Tensor& key, const Tensor& value,
                             const std::optional<Tensor>& context_key,
                             const std::optional<Tensor>& context_value, double scale) {
  const DType dtype = checked_dtype(query);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Tensor output = torch::stable::new_empty(query, query.sizes());
  cuda::PrefillAttention a;
  a.dtype = dtype;
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
  cuda::prefill_attention(a, {current_stream(query), false});
  return output;
}

}  // namespace tlinformer::python

#endif  // TLINFORMER_CUDA
