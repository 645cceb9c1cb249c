// The products of a single sequence's token.
#include <cmath>

#include "../rope.cuh"
#include "folded_row.cuh"

namespace tlinformer::cuda {
namespace {

using namespace step;

// Warps of a block, and slices that each has in flight.
constexpr int kProjectWarps = 8, kProjectAhead = 2;
constexpr int kAddWarps = 16, kAddAhead = 3;

template <class T, int MOST>
__global__ void __launch_bounds__(32 * kProjectWarps, 2)  // else loads wait for registers
    tlin_project_row(const __grid_constant__ ProjectStep p, float scale, float per_width,
                     unsigned per_head) {
  let_next_start();
  using Product = NormedProduct<T, 1, kProjectWarps, kProjectAhead, MOST>;
  __shared__ typename Product::Shared shared;
  const int outputs = (p.query_heads + 2 * p.kv_heads) * p.head_dim;
  Product product(shared, {p.weight}, outputs, p.norm, p.x, p.parts, p.hidden_size);
  // A pair to be rotated is two neighbours.
  const int own_output = blockIdx.x * kTile + product.output();
  const int output = min(own_output, outputs - 1);
  const int head = static_cast<int>(__umulhi(static_cast<unsigned>(output), per_head));
  const int element = output - head * p.head_dim;
  const bool is_query = head < p.query_heads,
             is_key = !is_query && head < p.query_heads + p.kv_heads;
  const NewRows& rows = p.new_rows;
  T* const to = static_cast<T*>(is_key ? rows.keys : rows.values) + element +
                (head - p.query_heads - (is_key ? 0 : p.kv_heads)) * rows.head_stride;
  const float bias = to_float(static_cast<const T*>(p.bias)[output]);

  wait_for_previous();
  product.start();
  const WarpState state(p.state, product.finishes());
  const float2 rotation = load_now(p.rotations + element / 2, product.finishes());
  product.multiply();
  if (!product.finishes()) return;
  const bool live = state.live() != 0;
  const int slot = state.last() - (rows.follows_history ? 0 : state.history());
  const float own = product.value(per_width) + bias;
  const float other = __shfl_xor_sync(0xffffffffu, own, 1);
  const float turned = own * rotation.x + (output % 2 == 0 ? -other : other) * rotation.y;
  if (threadIdx.x % 32 >= 8 || own_output >= outputs || !live) return;
  if (is_query) {
    p.query[output] = turned * scale;
  } else {
    to[int64_t{slot} * p.head_dim] = from_float<T>(is_key ? turned : own);
  }
}

template <class T>
__global__ void __launch_bounds__(32 * kGateWarps)
    tlin_gate_row(const __grid_constant__ GateStep p, float per_width) {
  let_next_start();
  using Product = NormedProduct<T, 2, kGateWarps, kGateAhead, 0>;
  __shared__ typename Product::Shared shared;
  Product product(shared, {p.gate, p.up}, p.intermediate_size, p.norm, p.x, {}, p.hidden_size);
  wait_for_previous();
  product.start();
  const int live = load_now(&p.state->live, product.finishes());
  product.multiply();
  if (!product.finishes()) return;
  const float gate = product.value(per_width);
  const float up = __shfl_xor_sync(0xffffffffu, gate, 4);
  const int output = blockIdx.x * kTile + product.output();
  if (threadIdx.x % 32 >= 4 || output >= p.intermediate_size || live == 0) return;
  static_cast<T*>(p.hidden)[output] = from_float<T>(silu(gate) * up);
}

template <class T, int MOST>
__global__ void __launch_bounds__(32 * kAddWarps) tlin_add_row(const __grid_constant__ AddStep p) {
  let_next_start();
  __shared__ float shared[kAddWarps][kTile];
  RowWeights<T, 1, kAddWarps, kAddAhead> weights({p.weight}, p.inputs, p.outputs);
  PlainRow<T, kAddWarps, kAddAhead> row(p.input, p.inputs);
  const int warp = warp_index(), lane = threadIdx.x % 32;
  const int output = min(static_cast<int>(blockIdx.x) * kTile + lane % kTile, p.outputs - 1);
  float bias = 0;
  if (p.bias != nullptr) bias = to_float(static_cast<const T*>(p.bias)[output]);

  wait_for_previous();
  const int live = load_now(&p.state->live, warp == kAddWarps - 1);
  row.start();
  Summed<MOST> x;
  if (warp == kAddWarps - 1) x.load(p.x + output, p.parts.rows + output, p.parts.count, true);
  weights.multiply(row);
  const float2 own = weights.sum(0);
  if (lane % 2 == 0) shared[warp][RowSums::own_output()] = own.x;
  __syncthreads();
  if (warp != kAddWarps - 1) return;
  float sum = 0;  // over half of the warps
#pragma unroll
  for (int w = 0; w < kAddWarps / 2; ++w) sum += shared[lane / kTile + 2 * w][lane % kTile];
  sum += __shfl_xor_sync(0xffffffffu, sum, kTile);
  if (lane >= kTile || blockIdx.x * kTile + lane >= p.outputs || live == 0) return;
  p.x[output] = x.sum() + (sum + bias);
}

}  // namespace

void project_row(const ProjectStep& p, const Launch& how) {
  with_type(p.dtype, [&](auto type) {
    with_most(p.parts.count, [&](auto most) {
      const int outputs = (p.query_heads + 2 * p.kv_heads) * p.head_dim;
      launch(how, tlin_project_row<typename decltype(type)::type, decltype(most)::value>,
             "project_row", ceil_div(outputs, kTile), 32 * kProjectWarps, 0, p,
             1.4426950408889634f / std::sqrt(static_cast<float>(p.head_dim)),
             1.0f / static_cast<float>(p.hidden_size),
             // Rounded up: exact for outputs below 2^32 / d.
             static_cast<unsigned>((1ll << 32) / p.head_dim + 1));
    });
  });
}

void gate_row(const GateStep& p, const Launch& how) {
  with_type(p.dtype, [&](auto type) {
    launch(how, tlin_gate_row<typename decltype(type)::type>, "gate_row",
           ceil_div(p.intermediate_size, kTile), 32 * kGateWarps, 0, p,
           1.0f / static_cast<float>(p.hidden_size));
  });
}

void add_row(const AddStep& p, const Launch& how) {
  with_type(p.dtype, [&](auto type) {
    with_most(p.parts.count, [&](auto most) {
      launch(how, tlin_add_row<typename decltype(type)::type, decltype(most)::value>, "add_row",
             ceil_div(p.outputs, kTile), 32 * kAddWarps, 0, p);
    });
  });
}

}  // namespace tlinformer::cuda
