#if defined(TLINFORMER_CUDA)

#include "cuda/attention/ranged_attention.h"
#include "ops_cuda.h"

namespace tlinformer::python {
namespace {

// What forward and backward pass to the kernels alike, and the tensors that it points into.
class RangedCall {
 public:
  cuda::RangedAttention a;

  RangedCall(const Tensor& query, const Tensor& key, const Tensor& value,
             const std::optional<Tensor>& context_key, const std::optional<Tensor>& context_value,
             const std::vector<int64_t>& segments, std::optional<double> scale, double dropout,
             const std::optional<Tensor>& seed, bool rows_first)
      : query_(query), rows_first_(rows_first) {
    const double factor = checked_scale(query, key, value, context_key, context_value, scale,
                                        /*same_rows=*/segments.empty());
    a.dtype = checked_dtype(query);
    a.batch = query.size(0);
    a.query_heads = static_cast<int>(query.size(1));
    a.kv_heads = static_cast<int>(key.size(1));
    a.head_dim = static_cast<int>(query.size(3));
    a.scale = static_cast<float>(factor);
    a.query_rows = query.size(2);
    a.query = read(query);
    for (int g = 0; g < 2; ++g) {
      const Tensor& keys = g == 1 && context_key ? *context_key : key;
      a.keys[g] = g == 1 && !context_key ? a.keys[0] : read(keys);
      a.values[g] = g == 1 && !context_key
                        ? a.values[0]
                        : read(g == 0 || !context_value ? value : *context_value);
      a.key_rows[g] = keys.size(2);
    }
    set_segments(segments, context_key ? context_key->size(2) : 0);
    a.dropout = static_cast<float>(dropout);
    require(dropout == 0 || seed.has_value(), "dropout is ", dropout, ", but seed is missing");
    if (!seed) return;
    require(seed->scalar_type() == ScalarType::Long && seed->numel() == 1 &&
                seed->get_device_index() == query.get_device_index(),
            "seed must be one int64 on the query's device");
    a.seed = static_cast<const int64_t*>(seed->const_data_ptr());
  }

  // Rows that the kernels can read; a copy lives as long as this.
  cuda::HeadTensor read(const Tensor& x) {
    kept_.push_back(with_aligned_rows(x));
    return head_tensor(kept_.back(), kept_.back().const_data_ptr());
  }

  // A new (batch, heads, rows, d), in memory (batch, rows, heads, d) with rows_first.
  Tensor make(int64_t heads, int64_t rows) const {
    if (!rows_first_) return torch::stable::new_empty(query_, {a.batch, heads, rows, a.head_dim});
    const Tensor x = torch::stable::new_empty(query_, {a.batch, rows, heads, a.head_dim});
    return torch::stable::transpose(x, 1, 2);
  }
  static cuda::HeadTensor write(const Tensor& x) { return head_tensor(x, x.mutable_data_ptr()); }

  bool reads_both() const {
    for (const cuda::Segment& s : segments_)
      if (s.rows > 0 && s.window >= 0 && s.context_rows > 0) return true;
    return false;
  }

 private:
  void set_segments(const std::vector<int64_t>& segments, int64_t context_rows) {
    require(segments.size() % 5 == 0, "segments has ", segments.size(),
            " numbers; each takes query, rows, window, context, context rows");
    for (size_t i = 0; i < segments.size(); i += 5) {
      cuda::Segment s;
      for (size_t j = 0; j < 5; ++j) {
        require(segments[i + j] <= INT32_MAX && segments[i + j] >= -1, "segments has ",
                segments[i + j]);
      }
      s.query = static_cast<int>(segments[i]);
      s.rows = static_cast<int>(segments[i + 1]);
      s.window = static_cast<int>(segments[i + 2]);
      s.context = static_cast<int>(segments[i + 3]);
      s.context_rows = static_cast<int>(segments[i + 4]);
      s.output = static_cast<int>(a.output_rows);
      a.output_rows += s.rows;
      segments_.push_back(s);
    }
    if (segments.empty()) {  // one window, whose keys have its rows, and all of the context
      a.output_rows = a.query_rows;
      segments_.push_back(
          {0, static_cast<int>(a.query_rows), 0, 0, 0, static_cast<int>(context_rows)});
    }
    a.segments = segments_.data();
    a.segment_count = static_cast<int>(segments_.size());
  }

  Tensor query_;
  bool rows_first_;
  std::vector<Tensor> kept_;
  std::vector<cuda::Segment> segments_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> ranged_attention_cuda(
    const Tensor& query, const Tensor& key, const Tensor& value, std::optional<Tensor> context_key,
    std::optional<Tensor> context_value, std::vector<int64_t> segments, std::optional<double> scale,
    double dropout, std::optional<Tensor> seed, bool rows_first) {
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  RangedCall call(query, key, value, context_key, context_value, segments, scale, dropout, seed,
                  rows_first);
  cuda::RangedAttention& a = call.a;
  const Tensor output = call.make(a.query_heads, a.output_rows);
  const Tensor terms = call.make(2 * a.query_heads, call.reads_both() ? a.output_rows : 0);
  const Tensor log_sum_exp = torch::stable::new_empty(
      query, {2, a.batch, a.query_heads, a.output_rows}, ScalarType::Float);
  a.output = RangedCall::write(output);
  if (call.reads_both()) a.terms = RangedCall::write(terms);
  a.log_sum_exp = static_cast<float*>(log_sum_exp.mutable_data_ptr());
  cuda::ranged_attention(a, {current_stream(query), false});
  return {output, terms, log_sum_exp};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ranged_attention_backward_cuda(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value,
    std::optional<Tensor> context_key, std::optional<Tensor> context_value, const Tensor& output,
    const Tensor& terms, const Tensor& log_sum_exp, std::vector<int64_t> segments,
    std::optional<double> scale, double dropout, std::optional<Tensor> seed, bool rows_first) {
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  RangedCall call(query, key, value, context_key, context_value, segments, scale, dropout, seed,
                  rows_first);
  cuda::RangedAttention& a = call.a;
  a.output = call.read(output);
  if (call.reads_both()) a.terms = call.read(terms);
  a.log_sum_exp = const_cast<float*>(static_cast<const float*>(log_sum_exp.const_data_ptr()));
  const Tensor delta = torch::stable::new_empty(log_sum_exp, log_sum_exp.sizes());
  const Tensor grad_query = call.make(a.query_heads, a.query_rows);
  const Tensor none = torch::stable::new_empty(query, {0});
  Tensor grad_keys[2] = {call.make(a.kv_heads, a.key_rows[0]), none};
  Tensor grad_values[2] = {call.make(a.kv_heads, a.key_rows[0]), none};
  if (context_key) {
    grad_keys[1] = call.make(a.kv_heads, a.key_rows[1]);
    grad_values[1] = call.make(a.kv_heads, a.key_rows[1]);
  }
  cuda::RangedGradient gradient;
  gradient.output = call.read(grad);
  gradient.delta = static_cast<float*>(delta.mutable_data_ptr());
  gradient.query = RangedCall::write(grad_query);
  for (int g = 0; g < 2; ++g) {
    gradient.keys[g] = RangedCall::write(grad_keys[context_key ? g : 0]);
    gradient.values[g] = RangedCall::write(grad_values[context_key ? g : 0]);
  }
  cuda::ranged_attention_gradient(a, gradient, {current_stream(query), false});
  return {grad_query, grad_keys[0], grad_values[0], grad_keys[1], grad_values[1]};
}

}  // namespace tlinformer::python

#endif  // TLINFORMER_CUDA
