// The products of a token for blocks of many sequences.
#include <cmath>

#include "../rope.cuh"
#include "normed_rows.cuh"
#include "rows_of_block.cuh"

namespace tlinformer::cuda {
namespace {

using namespace step;

// Warps of a block, and slices that each has in flight.
constexpr int kNormedWarps = 8, kNormedAhead = 2;
constexpr int kAddWarps = 16, kAddAhead = 3;
constexpr int kPairs = kTile / 2;

constexpr int kMany = 4;  // NT: a block has a tile of outputs for 8 NT sequences

// A pair of outputs of a row, which a thread finishes; the last warps have the first rows, as they
// have the fewest slices.
template <int WARPS>
struct Outlet {
  int row, output;  // within the block's
  __device__ Outlet() {
    const int i = threadIdx.x ^ (32 * (WARPS - 1));
    row = i / kPairs;
    output = i % kPairs * 2;
  }
};

template <class T>
__device__ float2 load_pair(const void* from, int64_t index) {
  return unpack<T>(*reinterpret_cast<const uint32_t*>(static_cast<const T*>(from) + index));
}

template <class T>
__device__ void store_pair(void* to, int64_t index, float2 pair) {
  *reinterpret_cast<uint32_t*>(static_cast<T*>(to) + index) = pack<T>(pair.x, pair.y);
}

template <class T>
__global__ void __launch_bounds__(32 * kNormedWarps)
    tlin_project_step(const __grid_constant__ ProjectStep p, float scale) {
  let_next_start();
  constexpr int NT = kMany;
  using Normed = NormedRows<T, NT, kNormedWarps, kNormedAhead>;
  extern __shared__ uint4 shared[];
  __shared__ typename Normed::Shared measures;
  const int outputs = (p.query_heads + 2 * p.kv_heads) * p.head_dim;
  const int warp = warp_index();
  const RowsOfBlock<NT> own(p.batch);
  WeightStream<T, 1, kNormedAhead> stream({p.weight}, p.hidden_size, outputs, warp, kNormedWarps);
  stream.start(blockIdx.x);
  BlockSums<kNormedWarps, 1, NT> block_sums(shared);
  Normed rows(measures, p.norm, p.x + int64_t{own.first} * p.hidden_size, own.count, p.hidden_size);
  const Outlet<kNormedWarps> outlet;
  const int output = blockIdx.x * kTile + outlet.output, row = own.first + outlet.row;
  const bool inside = outlet.row < own.count && output < outputs;
  float2 bias = {0, 0};
  if (inside) bias = load_pair<T>(p.bias, output);
  const unsigned head = static_cast<unsigned>(output) / static_cast<unsigned>(p.head_dim);
  const int element = output - head * p.head_dim;

  wait_for_previous();
  bool live = false;
  int64_t position = 0, history = 0;
  float2 turn = {1, 0};
  if (inside) {
    const volatile SequenceState& state = p.state[row];
    live = state.live != 0;
    position = state.last;
    history = state.history;
    turn = __ldcg(p.rotations + (row * p.head_dim + element) / 2);
  }
  rows.measure();
  Sums<1, NT> sums;
  stream.multiply(rows, sums);
  block_sums.put(sums, warp, own.count);
  if (!live) return;
  float2 pair = block_sums.pair(0, outlet.row, outlet.output);
  pair = {pair.x + bias.x, pair.y + bias.y};
  if (head < p.query_heads) {
    pair = rotate(pair, turn);
    const int64_t index = int64_t{row} * p.query_heads * p.head_dim + output;
    *reinterpret_cast<float2*>(p.query + index) = {pair.x * scale, pair.y * scale};
    return;
  }
  const bool is_key = head < p.query_heads + p.kv_heads;
  if (is_key) pair = rotate(pair, turn);
  const NewRows& to = p.new_rows;
  const int64_t slot = position - (to.follows_history ? 0 : history);
  const int kv_head = head - p.query_heads - (is_key ? 0 : p.kv_heads);
  store_pair<T>(is_key ? to.keys : to.values,
                row * to.sequence_stride + kv_head * to.head_stride + slot * p.head_dim + element,
                pair);
}

// The rows of a matrix of T in global memory, as B fragments.
template <class T, int NT, int AHEAD>
struct PlainRows {
  const T* row[NT];
  int limit;
  uint4 b[AHEAD][NT];

  __device__ PlainRows(const void* from, int rows, int width) {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    limit = width - 8 * q;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      row[n] = static_cast<const T*>(from) + int64_t{min(8 * n + g, rows - 1)} * width + 8 * q;
    }
  }
  __device__ void load(int i, int slice) {
    const int k = slice * kSlice;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      b[i][n] = {0, 0, 0, 0};
      if (k < limit) b[i][n] = *reinterpret_cast<const uint4*>(row[n] + k);
    }
  }
  __device__ uint4 at(int i, int, int n) const { return b[i][n]; }
};

template <class T>
__global__ void __launch_bounds__(32 * kAddWarps) tlin_add_step(const __grid_constant__ AddStep p) {
  let_next_start();
  constexpr int NT = kMany;
  extern __shared__ uint4 shared[];
  const int warp = warp_index();
  const RowsOfBlock<NT> own(p.batch);
  WeightStream<T, 1, kAddAhead> stream({p.weight}, p.inputs, p.outputs, warp, kAddWarps);
  stream.start(blockIdx.x);
  BlockSums<kAddWarps, 1, NT> block_sums(shared);
  const Outlet<kAddWarps> outlet;
  const int output = blockIdx.x * kTile + outlet.output, row = own.first + outlet.row;
  const bool inside = outlet.row < own.count && output < p.outputs;
  float2 bias = {0, 0};
  if (inside && p.bias != nullptr) bias = load_pair<T>(p.bias, output);
  wait_for_previous();
  PlainRows<T, NT, kAddAhead> inputs(static_cast<const T*>(p.input) + int64_t{own.first} * p.inputs,
                                     own.count, p.inputs);
#pragma unroll
  for (int i = 0; i < kAddAhead; ++i) inputs.load(i, warp + i * kAddWarps);
  const bool live = inside && is_live(p, row);
  float2* const to = reinterpret_cast<float2*>(p.x + int64_t{row} * p.outputs + output);
  float2 x = {0, 0};
  if (inside) x = *to;
  Sums<1, NT> sums;
  stream.multiply(inputs, sums);
  block_sums.put(sums, warp, own.count);
  if (!live) return;
  const float2 pair = block_sums.pair(0, outlet.row, outlet.output);
  *to = {x.x + (pair.x + bias.x), x.y + (pair.y + bias.y)};
}

template <class T>
__global__ void __launch_bounds__(32 * kNormedWarps)
    tlin_gate_step(const __grid_constant__ GateStep p) {
  let_next_start();
  constexpr int NT = kMany;
  using Normed = NormedRows<T, NT, kNormedWarps, kNormedAhead>;
  extern __shared__ uint4 shared[];
  __shared__ typename Normed::Shared measures;
  const int warp = warp_index();
  const RowsOfBlock<NT> own(p.batch);
  WeightStream<T, 2, kNormedAhead> stream({p.gate, p.up}, p.hidden_size, p.intermediate_size, warp,
                                          kNormedWarps);
  stream.start(blockIdx.x);
  BlockSums<kNormedWarps, 2, NT> block_sums(shared);
  Normed rows(measures, p.norm, p.x + int64_t{own.first} * p.hidden_size, own.count, p.hidden_size);
  const Outlet<kNormedWarps> outlet;
  const int output = blockIdx.x * kTile + outlet.output, row = own.first + outlet.row;
  const bool inside = outlet.row < own.count && output < p.intermediate_size;
  wait_for_previous();
  const bool live = inside && is_live(p, row);
  rows.measure();
  Sums<2, NT> sums;
  stream.multiply(rows, sums);
  block_sums.put(sums, warp, own.count);
  if (!live) return;
  const float2 gate = block_sums.pair(0, outlet.row, outlet.output);
  const float2 up = block_sums.pair(1, outlet.row, outlet.output);
  store_pair<T>(p.hidden, int64_t{row} * p.intermediate_size + output,
                {silu(gate.x) * up.x, silu(gate.y) * up.y});
}

// Whether blocks take 8 sequences, not 32: if each of the blocks, which are then many, has a place
// from the beginning where a multiprocessor has room for `each`.
bool few_in_block(const StepRows& p, int outputs, int each) {
  if (p.rows_of_block > 0) return p.rows_of_block <= 8;
  return ceil_div(outputs, kTile) * ceil_div(p.batch, 8) <= each * multiprocessors();
}

}  // namespace

bool few_in_block(const ProjectStep& p) {
  return few_in_block(p, (p.query_heads + 2 * p.kv_heads) * p.head_dim, 2);
}
bool few_in_block(const GateStep& p) { return few_in_block(p, p.intermediate_size, 2); }

void project_step(const ProjectStep& p, const Launch& how) {
  if (p.batch == 1) return project_wide(p, how) ? void() : project_row(p, how);
  if (few_in_block(p)) return project_few(p, how);
  const int tiles = ceil_div((p.query_heads + 2 * p.kv_heads) * p.head_dim, kTile);
  with_type(p.dtype, [&](auto type) {
    launch(how, tlin_project_step<typename decltype(type)::type>, "project_step",
           grid_of<kMany>(p, tiles), 32 * kNormedWarps, BlockSums<kNormedWarps, 1, kMany>::kBytes,
           p, 1.4426950408889634f / std::sqrt(static_cast<float>(p.head_dim)));
  });
}

void add_step(const AddStep& p, const Launch& how) {
  if (p.batch == 1) return add_wide(p, how) ? void() : add_row(p, how);
  if (few_in_block(p, p.outputs, 1)) return add_few(p, how);
  const int tiles = ceil_div(p.outputs, kTile);
  with_type(p.dtype, [&](auto type) {
    launch(how, tlin_add_step<typename decltype(type)::type>, "add_step", grid_of<kMany>(p, tiles),
           32 * kAddWarps, BlockSums<kAddWarps, 1, kMany>::kBytes, p);
  });
}

void gate_step(const GateStep& p, const Launch& how) {
  if (p.batch == 1) return gate_wide(p, how) ? void() : gate_row(p, how);
  if (few_in_block(p)) return gate_few(p, how);
  const int tiles = ceil_div(p.intermediate_size, kTile);
  with_type(p.dtype, [&](auto type) {
    launch(how, tlin_gate_step<typename decltype(type)::type>, "gate_step",
           grid_of<kMany>(p, tiles), 32 * kNormedWarps, BlockSums<kNormedWarps, 2, kMany>::kBytes,
           p);
  });
}

}  // namespace tlinformer::cuda
