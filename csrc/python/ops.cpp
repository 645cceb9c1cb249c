// torch.ops.tlinformer.*, in torch's stable ABI: one build serves every torch from 2.10 on.
#include "ops.h"

#include <cmath>
#include <optional>

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#pragma GCC diagnostic pop

#include "cpu/window_attention.h"

namespace {

using tlinformer::cpu::HeadRows;
using tlinformer::python::checked_scale;
using tlinformer::python::require;
using tlinformer::python::shape_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void require_rows(const char* name, const Tensor& x, const Tensor& query, int64_t heads,
                  int64_t rows) {
  require(x.scalar_type() == query.scalar_type(), name, " is ",
          torch::headeronly::toString(x.scalar_type()), ", query is ",
          torch::headeronly::toString(query.scalar_type()), "; all tensors need one dtype");
  require(x.is_cuda() == query.is_cuda() && x.get_device_index() == query.get_device_index(), name,
          " and query are on different devices; all tensors need one");
  require(x.dim() == 4 && x.size(0) == query.size(0) && x.size(1) == heads && x.size(2) == rows &&
              x.size(3) == query.size(3),
          name, " is ", shape_of(x), ", must be (", query.size(0), ", ", heads, ", ", rows, ", ",
          query.size(3), ") for the query ", shape_of(query));
}

}  // namespace

namespace tlinformer::python {

double checked_scale(const Tensor& query, const Tensor& key, const Tensor& value,
                     const std::optional<Tensor>& context_key,
                     const std::optional<Tensor>& context_value, std::optional<double> scale,
                     bool same_rows) {
  require(query.dim() == 4 && query.size(3) > 0, "query is ", shape_of(query),
          ", must be (batch, query heads, window rows, head size)");
  require(key.dim() == 4 && key.size(1) > 0 && query.size(1) % key.size(1) == 0, "key is ",
          shape_of(key), ", must be (batch, key/value heads, window",
          " rows, head size) with a number of heads that divides the query's ", query.size(1));
  const int64_t kv_heads = key.size(1), rows = (same_rows ? query : key).size(2);
  require_rows("key", key, query, kv_heads, rows);
  require_rows("value", value, query, kv_heads, rows);
  require(context_key.has_value() == context_value.has_value(),
          "context_key and context_value come together; only ",
          context_key ? "context_key" : "context_value", " was given");
  if (context_key) {
    const int64_t context_rows = context_key->dim() == 4 ? context_key->size(2) : 0;
    require_rows("context_key", *context_key, query, kv_heads, context_rows);
    require_rows("context_value", *context_value, query, kv_heads, context_rows);
  }
  const double factor = scale.value_or(1 / std::sqrt(static_cast<double>(query.size(3))));
  require(std::isfinite(factor), "scale is ", factor, ", must be finite");
  return factor;
}

}  // namespace tlinformer::python

namespace {

// Any outer strides will do; only a strided last dimension is worth a copy.
Tensor with_dense_rows(const Tensor& x) {
  return x.stride(3) == 1 || x.size(3) == 1 ? x : torch::stable::contiguous(x);
}

template <class T>
HeadRows<T> head_rows(T* data, const Tensor& x) {
  return {data, x.stride(0), x.stride(1), x.stride(2)};
}

template <class T>
Tensor attend(const Tensor& query, const Tensor& key, const Tensor& value,
              const std::optional<Tensor>& context_key, const std::optional<Tensor>& context_value,
              double scale) {
  const auto input = [](const Tensor& x) {
    return head_rows(static_cast<const T*>(x.const_data_ptr()), x);
  };
  const Tensor output = torch::stable::new_empty(query, query.sizes());
  tlinformer::cpu::WindowAttention<T> p;
  p.query = input(query);
  p.key = input(key);
  p.value = input(value);
  p.output = head_rows(static_cast<T*>(output.mutable_data_ptr()), output);
  p.batch_size = query.size(0);
  p.query_heads = query.size(1);
  p.kv_heads = key.size(1);
  p.window_rows = query.size(2);
  p.head_dim = query.size(3);
  p.scale = scale;
  if (context_key) {
    p.context_key = input(*context_key);
    p.context_value = input(*context_value);
    p.context_rows = context_key->size(2);
  }
  tlinformer::cpu::window_attention(p);
  return output;
}

Tensor window_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                        std::optional<Tensor> context_key, std::optional<Tensor> context_value,
                        std::optional<double> scale) {
  const double factor =
      checked_scale(query, key, value, context_key, context_value, scale, /*same_rows=*/true);
#if defined(TLINFORMER_CUDA)
  if (query.is_cuda()) {
    return tlinformer::python::window_attention_cuda(query, key, value, context_key, context_value,
                                                     factor);
  }
#endif
  if (context_key) {
    context_key = with_dense_rows(*context_key);
    context_value = with_dense_rows(*context_value);
  }
  const auto run = [&](auto attend_as) {
    return attend_as(with_dense_rows(query), with_dense_rows(key), with_dense_rows(value),
                     context_key, context_value, factor);
  };
  const ScalarType dtype = query.scalar_type();
  if (dtype == ScalarType::Float) return run(attend<float>);
  if (dtype == ScalarType::Double) return run(attend<double>);
  require(dtype == ScalarType::BFloat16, "query is ", torch::headeronly::toString(dtype),
          ", must be Float, Double or BFloat16 on the CPU; convert it with .to(torch.float32)");
  return run(attend<tlinformer::cpu::bf16>);
}

}  // namespace

STABLE_TORCH_LIBRARY(tlinformer, m) {
  m.def(
      "window_attention(Tensor query, Tensor key, Tensor value, Tensor? context_key, "
      "Tensor? context_value, float? scale=None) -> Tensor");
  m.def(
      "window_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? context_key, "
      "Tensor? context_value, float? scale=None) -> Tensor");
  m.def(
      "ranged_attention(Tensor query, Tensor key, Tensor value, Tensor? context_key, "
      "Tensor? context_value, int[] segments, float? scale=None, float dropout=0.0, "
      "Tensor? seed=None, bool rows_first=False) -> (Tensor, Tensor, Tensor)");
  m.def(
      "ranged_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, "
      "Tensor? context_key, Tensor? context_value, Tensor output, Tensor terms, "
      "Tensor log_sum_exp, int[] segments, float? scale=None, float dropout=0.0, "
      "Tensor? seed=None, bool rows_first=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(tlinformer, CPU, m) {
  m.impl("window_attention_forward", TORCH_BOX(&window_attention));
}

#if defined(TLINFORMER_CUDA)
STABLE_TORCH_LIBRARY_IMPL(tlinformer, CUDA, m) {
  m.impl("window_attention_forward", TORCH_BOX(&window_attention));
  m.impl("ranged_attention", TORCH_BOX(&tlinformer::python::ranged_attention_cuda));
  m.impl("ranged_attention_backward",
         TORCH_BOX(&tlinformer::python::ranged_attention_backward_cuda));
}
#endif
