// The products of a token for blocks of few sequences.
#include <cmath>

#include "../rope.cuh"
#include "folded_rows.cuh"

namespace tlinformer::cuda {
namespace {

using namespace step;

// Warps of a block, and slices that each has in flight.
constexpr int kProjectWarps = 16, kProjectAhead = 1;
constexpr int kFewGateWarps = 16, kFewGateAhead = 1;
constexpr int kAddWarps = 16, kAddAhead = 3;  // 1, if that is all

// A block has a tile of outputs for 8 sequences, blockIdx.y counts these.
template <class T, bool WHOLE>
__global__ void __launch_bounds__(32 * kProjectWarps, WHOLE ? 2 : 1)
    tlin_project_few(const __grid_constant__ ProjectStep p, float scale, float per_width) {
  let_next_start();
  using Product = FoldedRows<T, 1, kProjectWarps, kProjectAhead, WHOLE>;
  __shared__ typename Product::Shared shared;
  const int outputs = (p.query_heads + 2 * p.kv_heads) * p.head_dim;
  const int first = blockIdx.y * kFewRows;
  Product product(shared, {p.weight}, outputs, p.norm, p.hidden_size);
  const int row = first + product.row();
  const bool finishes = product.row() < kFewRows && row < p.batch;
  const int own_output = blockIdx.x * kTile + Product::output();
  const int output = min(own_output, outputs - 2);
  const int head = output / p.head_dim, element = output % p.head_dim;
  const bool is_query = head < p.query_heads,
             is_key = !is_query && head < p.query_heads + p.kv_heads;
  const NewRows& rows = p.new_rows;
  const SequenceState* state_of_row = nullptr;
  const float2* rotation_of_row = nullptr;
  char* to = nullptr;
  int bytes_of_slot = 0;
  float2 bias = {0, 0};
  if (p.hidden_size > 0) {  // see prepare()
    state_of_row = p.state + row;
    rotation_of_row = p.rotations + (row * p.head_dim + element) / 2;
    if (is_query) {
      to = reinterpret_cast<char*>(p.query + int64_t{row} * p.query_heads * p.head_dim + output);
    } else {
      to = reinterpret_cast<char*>(
          static_cast<T*>(is_key ? rows.keys : rows.values) + row * rows.sequence_stride +
          (head - p.query_heads - (is_key ? 0 : p.kv_heads)) * rows.head_stride + element);
      bytes_of_slot = p.head_dim * static_cast<int>(sizeof(T));
    }
    bias = unpack<T>(*reinterpret_cast<const uint32_t*>(static_cast<const T*>(p.bias) + output));
    product.prepare(p.x + int64_t{first} * p.hidden_size, p.batch - first);
  }

  wait_for_previous();
  product.start();
  const WarpState state(state_of_row, finishes);
  const float2 rotation = load_now(rotation_of_row, finishes);
  product.multiply();
  if (!finishes) return;
  const bool live = state.live() != 0;
  const int slot = state.last() - (rows.follows_history ? 0 : state.history());
  float2 values[1];
  product.finish(per_width, values);
  const float2 plain = {values[0].x + bias.x, values[0].y + bias.y};
  const float2 turned = rotate(plain, rotation);
  if (threadIdx.x % 32 >= 8 || own_output >= outputs || !live) return;
  to += int64_t{slot} * bytes_of_slot;
  if (is_query) {
    *reinterpret_cast<float2*>(to) = {turned.x * scale, turned.y * scale};
  } else {
    *reinterpret_cast<uint32_t*>(to) =
        is_key ? pack<T>(turned.x, turned.y) : pack<T>(plain.x, plain.y);
  }
}

template <class T, bool WHOLE>
__global__ void __launch_bounds__(32 * kFewGateWarps, WHOLE ? 2 : 1)
    tlin_gate_few(const __grid_constant__ GateStep p, float per_width) {
  let_next_start();
  using Product = FoldedRows<T, 2, kFewGateWarps, kFewGateAhead, WHOLE>;
  __shared__ typename Product::Shared shared;
  const int first = blockIdx.y * kFewRows;
  Product product(shared, {p.gate, p.up}, p.intermediate_size, p.norm, p.hidden_size);
  const int row = first + product.row();
  const bool finishes = product.row() < kFewRows && row < p.batch;
  const int output = blockIdx.x * kTile + Product::output();
  const int* live_of_row = nullptr;
  T* to = nullptr;
  if (p.hidden_size > 0) {  // see prepare()
    live_of_row = &p.state[row].live;
    to = static_cast<T*>(p.hidden) + int64_t{row} * p.intermediate_size + output;
    product.prepare(p.x + int64_t{first} * p.hidden_size, p.batch - first);
  }

  wait_for_previous();
  product.start();
  const int live = load_now(live_of_row, finishes);
  product.multiply();
  if (!finishes) return;
  float2 values[2];
  product.finish(per_width, values);
  if (threadIdx.x % 32 >= 8 || output >= p.intermediate_size || live == 0) return;
  *reinterpret_cast<uint32_t*>(to) =
      pack<T>(silu(values[0].x) * values[1].x, silu(values[0].y) * values[1].y);
}

template <class T, int AHEAD, bool WHOLE>
__global__ void __launch_bounds__(32 * kAddWarps) tlin_add_few(const __grid_constant__ AddStep p) {
  let_next_start();
  using Sums = BlockRows<kAddWarps, 1>;
  __shared__ typename Sums::Shared shared;
  const int warp = warp_index(), lane = threadIdx.x % 32, first = blockIdx.y * kFewRows;
  const int k = warp * kSlice + lane % 4 * 8, left = p.inputs - k;
  const T* from[2];  // outputs g and g + 8
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // Outputs past the end repeat the last one; nobody stores them.
    const int output =
        min(static_cast<int>(blockIdx.x) * kTile + lane / 4 + 8 * half, p.outputs - 1);
    from[half] = static_cast<const T*>(p.weight) + int64_t{output} * p.inputs + k;
  }
  uint4 weights[AHEAD][2], input[AHEAD] = {};
  const auto load_weights = [&](int slices) {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const int at = (slices + i * kAddWarps) * kSlice;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        weights[i][half] = load_vector(from[half] + at, at < left);
      }
    }
  };
  load_weights(0);
  const int row = first + warp, output = blockIdx.x * kTile + Sums::output();
  const bool finishes = warp < kFewRows && row < p.batch;
  const bool stores = finishes && lane < 8 && output < p.outputs;
  Sums block_sums(shared);
  const T* from_row = nullptr;
  const int* live_of_row = nullptr;
  float* to = nullptr;
  float2 bias = {0, 0};
  if (p.inputs > 0) {  // see FoldedRows::prepare()
    from_row =
        static_cast<const T*>(p.input) + k + int64_t{min(first + lane / 4, p.batch - 1)} * p.inputs;
    live_of_row = &p.state[row].live;
    to = p.x + int64_t{row} * p.outputs + output;
    if (p.bias != nullptr && output < p.outputs) {
      bias = unpack<T>(*reinterpret_cast<const uint32_t*>(static_cast<const T*>(p.bias) + output));
    }
    block_sums.find_places(warp);
#pragma unroll
    for (auto& of_slice : weights) {  // now, so that the input's words may stay as they lie
      of_slice[0] = other_order(of_slice[0]), of_slice[1] = other_order(of_slice[1]);
    }
  }

  wait_for_previous();
  FewSums sums;
#pragma unroll
  for (int i = 0; i < AHEAD; ++i) {
    const int at = i * kAddWarps * kSlice;
    load_now(from_row + at, at < left, input[i]);
  }
  const int live = load_now(live_of_row, finishes);
  const float2 x = load_now(reinterpret_cast<const float2*>(to), stores);
#pragma unroll 1
  for (int slices = 0;;) {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) sums.add<T>(weights[i][0], weights[i][1], input[i]);
    if (WHOLE) break;
    slices += AHEAD * kAddWarps;
    if ((slices + warp) * kSlice >= p.inputs) break;
    load_weights(slices);
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const int at = (slices + i * kAddWarps) * kSlice;
      input[i] = {0, 0, 0, 0};
      load_now(from_row + at, at < left, input[i]);
      input[i] = other_order(input[i]);
    }
  }
  block_sums.put(0, sums.at(0));
  block_sums.put(kTile / 2, sums.at(1));
  __syncthreads();
  if (!finishes) return;
  float2 sum[1] = {block_sums.get(0)};
  Sums::add_groups(sum);
  if (!stores || live == 0) return;
  *reinterpret_cast<float2*>(to) = {x.x + (sum[0].x + bias.x), x.y + (sum[0].y + bias.y)};
}

dim3 grid_of(int outputs, int batch) {
  return {static_cast<unsigned>(ceil_div(outputs, kTile)),
          static_cast<unsigned>(ceil_div(batch, kFewRows))};
}

// Calls f(TypeTag<T>{}, WHOLE), where a block has `slices` in registers at once.
template <class F>
void with_width(DType dtype, int width, int slices, const F& f) {
  with_type(dtype, [&](auto type) {
    if (width <= slices * kSlice) return f(type, std::true_type{});
    f(type, std::false_type{});
  });
}

}  // namespace

void project_few(const ProjectStep& p, const Launch& how) {
  with_width(p.dtype, p.hidden_size, kProjectWarps * kProjectAhead, [&](auto type, auto whole) {
    launch(how, tlin_project_few<typename decltype(type)::type, decltype(whole)::value>,
           "project_few", grid_of((p.query_heads + 2 * p.kv_heads) * p.head_dim, p.batch),
           32 * kProjectWarps, 0, p,
           1.4426950408889634f / std::sqrt(static_cast<float>(p.head_dim)),
           1.0f / static_cast<float>(p.hidden_size));
  });
}

void add_few(const AddStep& p, const Launch& how) {
  with_width(p.dtype, p.inputs, kAddWarps * kAddAhead, [&](auto type, auto whole) {
    using T = typename decltype(type)::type;
    const auto with = [&](auto kernel) {
      launch(how, kernel, "add_few", grid_of(p.outputs, p.batch), 32 * kAddWarps, 0, p);
    };
    if (p.inputs <= kAddWarps * kSlice) return with(tlin_add_few<T, 1, true>);
    with(tlin_add_few<T, kAddAhead, decltype(whole)::value>);
  });
}

void gate_few(const GateStep& p, const Launch& how) {
  with_width(p.dtype, p.hidden_size, kFewGateWarps * kFewGateAhead, [&](auto type, auto whole) {
    launch(how, tlin_gate_few<typename decltype(type)::type, decltype(whole)::value>, "gate_few",
           grid_of(p.intermediate_size, p.batch), 32 * kFewGateWarps, 0, p,
           1.0f / static_cast<float>(p.hidden_size));
  });
}

}  // namespace tlinformer::cuda
