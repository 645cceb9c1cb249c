// What the CPU's and CUDA's halves of torch.ops.tlinformer share.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

// The stable ABI of torch 2.10. Not on the command line: with it, the pybind11 headers that come
// with torch refuse to serve the other binding.
#define TORCH_TARGET_VERSION 0x020a000000000000

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include <torch/csrc/stable/tensor.h>
#pragma GCC diagnostic pop

#include "tlinformer/error.h"

namespace tlinformer::python {

// Becomes Python's ValueError.
template <class... Parts>
void require(bool holds, const Parts&... parts) {
  tlinformer::require<std::invalid_argument>(holds, "window_attention: ", parts...);
}

inline std::string shape_of(const torch::stable::Tensor& x) {
  std::string text;
  for (int64_t i = 0; i < x.dim(); ++i) text += (i ? ", " : "") + std::to_string(x.size(i));
  return "(" + text + ")";
}

// The scale, after the tensors' shapes, devices and dtypes are found to fit each other; with
// `same_rows` there are as many keys as queries.
double checked_scale(const torch::stable::Tensor& query, const torch::stable::Tensor& key,
                     const torch::stable::Tensor& value,
                     const std::optional<torch::stable::Tensor>& context_key,
                     const std::optional<torch::stable::Tensor>& context_value,
                     std::optional<double> scale, bool same_rows);

// On a GPU, of tensors whose shapes, devices and dtypes fit each other.
torch::stable::Tensor window_attention_cuda(
    const torch::stable::Tensor& query, const torch::stable::Tensor& key,
    const torch::stable::Tensor& value, const std::optional<torch::stable::Tensor>& context_key,
    const std::optional<torch::stable::Tensor>& context_value, double scale);

// See tlinformer/ops.py.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>
ranged_attention_cuda(const torch::stable::Tensor& query, const torch::stable::Tensor& key,
                      const torch::stable::Tensor& value,
                      std::optional<torch::stable::Tensor> context_key,
                      std::optional<torch::stable::Tensor> context_value,
                      std::vector<int64_t> segments, std::optional<double> scale, double dropout,
                      std::optional<torch::stable::Tensor> seed, bool rows_first);
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor, torch::stable::Tensor>
ranged_attention_backward_cuda(
    const torch::stable::Tensor& grad, const torch::stable::Tensor& query,
    const torch::stable::Tensor& key, const torch::stable::Tensor& value,
    std::optional<torch::stable::Tensor> context_key,
    std::optional<torch::stable::Tensor> context_value, const torch::stable::Tensor& output,
    const torch::stable::Tensor& terms, const torch::stable::Tensor& log_sum_exp,
    std::vector<int64_t> segments, std::optional<double> scale, double dropout,
    std::optional<torch::stable::Tensor> seed, bool rows_first);

}  // namespace tlinformer::python
