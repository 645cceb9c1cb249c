#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../rope.cuh"
#include "candidate.cuh"
#include "normed_rows.cuh"
#include "product.h"
#include "weight_stream.cuh"

namespace tlinformer::cuda {
namespace {

using namespace step;

// Warps of a block, and slices that each has in flight.
constexpr int kNormedWarps = 8, kNormedAhead = 2;
constexpr int kAddWarps = 16, kAddAhead = 3;
constexpr int kHeadWarps = 8, kHeadAhead = 1;
constexpr int kPairs = kTile / 2;

// A block has a tile of outputs for 8 NT sequences, blockIdx.y counts these.
constexpr int kMany = 4;  // NT, unless they are few
template <int NT>
struct Rows {
  int first, count;
  __device__ explicit Rows(int batch)
      : first(blockIdx.y * 8 * NT), count(min(batch - first, 8 * NT)) {}
};

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

// Whether a row takes part; rows past the last do not. Volatile: the load would otherwise be put
// off until there is nothing to hide it behind.
__device__ bool is_live(const StepRows& p, int row) {
  const volatile SequenceState& state = p.state[min(row, p.batch - 1)];
  return state.live != 0 && row < p.batch;
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
  const Rows<NT> own(p.batch);
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
  const Rows<NT> own(p.batch);
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
  const Rows<NT> own(p.batch);
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

// Rows as fragments in shared memory, this lane's.
template <int NT>
struct Fragments {
  const uint4* of_lane;
  __device__ void load(int, int) const {}
  __device__ uint4 at(int, int slice, int n) const { return of_lane[(slice * NT + n) * 32]; }
};

constexpr int kHeadShared = 30;  // percent; of more than 8 sequences

template <int NT>
constexpr int kHeadSlices = NT == 1   ? 8
                            : NT == 2 ? 6
                                      : 4;  // slices in flight

// A block has all of the vocabulary's tiles that are its own for 8 NT sequences at once, whose
// normed rows are in shared memory as fragments.
template <class T, int NT>
__global__ void __launch_bounds__(32 * kHeadWarps, 2)
    tlin_head_step(const __grid_constant__ HeadStep p) {
  using Normed = NormedRows<T, NT, kHeadWarps, kHeadAhead>;
  extern __shared__ uint4 fragments[];  // (slices, NT, 32)
  __shared__ typename Normed::Shared measures;
  __shared__ Candidate of_warps[kHeadWarps][8 * NT];
  const int warp = warp_index();
  const Rows<NT> own(p.batch);
  int tile = warp * gridDim.x + blockIdx.x;
  WeightStream<T, 1, kHeadSlices<NT>, true> stream({p.embed}, p.hidden_size, p.vocab_size, 0, 1);
  stream.start(tile);
  Normed rows(measures, p.norm, p.x + int64_t{own.first} * p.hidden_size, own.count, p.hidden_size);
  wait_for_previous();
  let_next_start();  // not before: see launch.cuh
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const unsigned live =
      __ballot_sync(0xffffffffu, lane < own.count && is_live(p, own.first + lane));
  rows.measure();
  const int slices = ceil_div(p.hidden_size, kSlice);
#pragma unroll 1
  for (int slice = warp;;) {
#pragma unroll
    for (int i = 0; i < kHeadAhead; ++i) {
      const int at = slice + i * kHeadWarps;
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        if (at < slices) fragments[(at * NT + n) * 32 + lane] = rows.at(i, at, n);
      }
    }
    slice += kHeadAhead * kHeadWarps;
    if (slice >= slices) break;
#pragma unroll
    for (int i = 0; i < kHeadAhead; ++i) rows.load(i, slice + i * kHeadWarps);
  }
  __syncthreads();
  const Fragments<NT> inputs{fragments + lane};

  Candidate best[NT][2];
#pragma unroll
  for (int n = 0; n < NT; ++n) best[n][0] = best[n][1] = kNoCandidate;
  for (; tile * kTile < p.vocab_size; tile += kHeadWarps * gridDim.x) {
    Sums<1, NT> sums;
    stream.multiply(inputs, sums, tile + kHeadWarps * gridDim.x);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = tile * kTile + g + i / 2 * 8, row = 8 * n + 2 * q + i % 2;
        if (token >= p.vocab_size || !(live >> row & 1)) continue;
        const float logit = sums.at(0, n, i);
        p.logits[int64_t{own.first + row} * p.vocab_size + token] = logit;
        best[n][i % 2] = likelier(best[n][i % 2], {logit, token});
      }
    }
  }

#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Candidate found = likeliest_of_lanes<4, 32>(best[n][i]);
      if (g == 0) of_warps[warp][8 * n + 2 * q + i] = found;
    }
  }
  __syncthreads();
  const int row = threadIdx.x;
  if (row >= own.count || !(live >> row & 1)) return;
  Candidate found = of_warps[0][row];
  for (int w = 1; w < kHeadWarps; ++w) found = likelier(found, of_warps[w][row]);
  p.candidates[int64_t{own.first + row} * gridDim.x + blockIdx.x] = found;
}

// Whether blocks take 8 sequences, not 32: if each of the blocks, which are then many, has a place
// from the beginning where a multiprocessor has room for `each`.
bool few_in_block(const StepRows& p, int outputs, int each) {
  if (p.rows_of_block > 0) return p.rows_of_block <= 8;
  return ceil_div(outputs, kTile) * ceil_div(p.batch, 8) <= each * multiprocessors();
}

template <int NT>
dim3 grid_of(const StepRows& p, int tiles) {
  return {static_cast<unsigned>(tiles), static_cast<unsigned>(ceil_div(p.batch, 8 * NT))};
}

}  // namespace

bool few_in_block(const ProjectStep& p) {
  return few_in_block(p, (p.query_heads + 2 * p.kv_heads) * p.head_dim, 2);
}
bool few_in_block(const GateStep& p) { return few_in_block(p, p.intermediate_size, 2); }

void project_step(const ProjectStep& p, const Launch& how) {
  if (p.batch == 1) return project_row(p, how);
  if (few_in_block(p)) return project_few(p, how);
  const int tiles = ceil_div((p.query_heads + 2 * p.kv_heads) * p.head_dim, kTile);
  with_type(p.dtype, [&](auto type) {
    launch(how, tlin_project_step<typename decltype(type)::type>, "project_step",
           grid_of<kMany>(p, tiles), 32 * kNormedWarps, BlockSums<kNormedWarps, 1, kMany>::kBytes,
           p, 1.4426950408889634f / std::sqrt(static_cast<float>(p.head_dim)));
  });
}

void add_step(const AddStep& p, const Launch& how) {
  if (p.batch == 1) return add_row(p, how);
  if (few_in_block(p, p.outputs, 1)) return add_few(p, how);
  const int tiles = ceil_div(p.outputs, kTile);
  with_type(p.dtype, [&](auto type) {
    launch(how, tlin_add_step<typename decltype(type)::type>, "add_step", grid_of<kMany>(p, tiles),
           32 * kAddWarps, BlockSums<kAddWarps, 1, kMany>::kBytes, p);
  });
}

void gate_step(const GateStep& p, const Launch& how) {
  if (p.batch == 1) return gate_row(p, how);
  if (few_in_block(p)) return gate_few(p, how);
  const int tiles = ceil_div(p.intermediate_size, kTile);
  with_type(p.dtype, [&](auto type) {
    launch(how, tlin_gate_step<typename decltype(type)::type>, "gate_step",
           grid_of<kMany>(p, tiles), 32 * kNormedWarps, BlockSums<kNormedWarps, 2, kMany>::kBytes,
           p);
  });
}

int head_candidates(int vocab_size) {
  return std::min(ceil_div(vocab_size, kTile), 2 * multiprocessors());
}

void head_step(const HeadStep& p, const Launch& how) {
  const int blocks = head_candidates(p.vocab_size);
  if (p.batch == 1 ? head_row(p, blocks, how) : head_few(p, blocks, how)) return;
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto with = [&](auto groups) {
      constexpr int NT = decltype(groups)::value;
      const size_t shared = NT * 32 * sizeof(uint4) * ceil_div(p.hidden_size, kSlice);
      Launch two = how;  // blocks are to fit on a multiprocessor
      two.shared_percent = NT == 1 ? kLeastShared : kHeadShared;
      launch(two, tlin_head_step<T, NT>, "head_step", grid_of<NT>(p, blocks), 32 * kHeadWarps,
             shared, p);
    };
    // As many at once as leave room for two blocks, of few kilobytes a row.
    constexpr int kRoom = 100 * 1024;
    const int fit =
        kRoom / (ceil_div(p.hidden_size, kSlice) * 32 * static_cast<int>(sizeof(uint4)));
    if (p.batch <= 8 || fit < 2) return with(std::integral_constant<int, 1>{});
    if (p.batch <= 16 || fit < 4) return with(std::integral_constant<int, 2>{});
    with(std::integral_constant<int, 4>{});
  });
}

}  // namespace tlinformer::cuda
