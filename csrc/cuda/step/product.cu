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

constexpr int kAddWarps = 16;    // no norm to share out: more warps have fewer slices each
constexpr int kNormedAhead = 2;  // slices in flight
constexpr int kPairs = kTile / 2;

// A pair of outputs of a row, which a thread finishes. The last warps have the first rows: when
// there are few, these are the warps that the norm leaves idle.
template <int WARPS>
struct Outlet {
  int row, output;  // output within the tile
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

// Whether a row takes part; rows past the last do not.
__device__ bool is_live(const StepRows& p, int row) {
  return p.state[min(row, p.batch - 1)].live != 0 && row < p.batch;
}

template <class T, int ROWS>
__global__ void __launch_bounds__(32 * kWarps)
    tlin_project_step(const __grid_constant__ ProjectStep p, float scale) {
  let_next_start();
  constexpr int NT = ceil_div(ROWS, 8);
  extern __shared__ uint4 shared[];
  const int outputs = (p.query_heads + 2 * p.kv_heads) * p.head_dim;
  const int warp = warp_index();
  WeightStream<T, 1, kNormedAhead> stream({p.weight}, p.hidden_size, outputs, warp, kWarps);
  stream.start(blockIdx.x);
  BlockSums<kWarps, 1, NT> block_sums(shared);
  NormedRows<T, ROWS> rows(shared + block_sums.kBytes / sizeof(uint4), p.norm, p.x, p.batch,
                           p.hidden_size);
  const Outlet<kWarps> outlet;
  const int output = blockIdx.x * kTile + outlet.output;
  const bool inside = outlet.row < p.batch && output < outputs;
  float2 bias = {0, 0};
  if (inside) bias = load_pair<T>(p.bias, output);
  const unsigned head = static_cast<unsigned>(output) / static_cast<unsigned>(p.head_dim);
  const int element = output - head * p.head_dim;

  wait_for_previous();
  // Volatile: the loads would otherwise be put off until there is nothing to hide them behind.
  const volatile SequenceState& state = p.state[min(outlet.row, p.batch - 1)];
  const bool live = state.live != 0;
  const int64_t position = state.last, history = state.history;
  float2 turn = {1, 0};
  if (inside) turn = __ldcg(p.rotations + (outlet.row * p.head_dim + element) / 2);
  rows.measure();
  rows.normalise();
  auto inputs = rows.inputs();
  Sums<1, NT> sums;
  stream.multiply(inputs, sums);
  block_sums.put(sums, warp, p.batch);
  if (outlet.row >= p.batch) return;
  float2 pair = block_sums.pair(0, outlet.row, outlet.output);
  if (!inside || !live) return;
  pair = {pair.x + bias.x, pair.y + bias.y};
  if (head < p.query_heads) {
    pair = rotate(pair, turn);
    const int64_t index = int64_t{outlet.row} * p.query_heads * p.head_dim + output;
    *reinterpret_cast<float2*>(p.query + index) = {pair.x * scale, pair.y * scale};
    return;
  }
  const bool is_key = head < p.query_heads + p.kv_heads;
  if (is_key) pair = rotate(pair, turn);
  const NewRows& to = p.new_rows;
  const int64_t slot = position - (to.follows_history ? 0 : history);
  const int kv_head = head - p.query_heads - (is_key ? 0 : p.kv_heads);
  store_pair<T>(
      is_key ? to.keys : to.values,
      outlet.row * to.sequence_stride + kv_head * to.head_stride + slot * p.head_dim + element,
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

template <class T, int NT>
__global__ void __launch_bounds__(32 * kAddWarps) tlin_add_step(const __grid_constant__ AddStep p) {
  let_next_start();
  extern __shared__ uint4 shared[];
  constexpr int kAhead = 3;
  const int warp = warp_index();
  WeightStream<T, 1, kAhead> stream({p.weight}, p.inputs, p.outputs, warp, kAddWarps);
  stream.start(blockIdx.x);
  BlockSums<kAddWarps, 1, NT> block_sums(shared);
  const Outlet<kAddWarps> outlet;
  const int output = blockIdx.x * kTile + outlet.output;
  const bool inside = outlet.row < p.batch && output < p.outputs;
  float2 bias = {0, 0};
  if (inside && p.bias != nullptr) bias = load_pair<T>(p.bias, output);
  wait_for_previous();
  PlainRows<T, NT, kAhead> inputs(p.input, p.batch, p.inputs);
#pragma unroll
  for (int i = 0; i < kAhead; ++i) inputs.load(i, warp + i * kAddWarps);
  const bool live = inside && is_live(p, outlet.row);
  float2* const to = reinterpret_cast<float2*>(p.x + int64_t{outlet.row} * p.outputs + output);
  float2 x = {0, 0};
  if (inside) x = *to;
  Sums<1, NT> sums;
  stream.multiply(inputs, sums);
  block_sums.put(sums, warp, p.batch);
  if (!live) return;
  const float2 pair = block_sums.pair(0, outlet.row, outlet.output);
  *to = {x.x + (pair.x + bias.x), x.y + (pair.y + bias.y)};
}

template <class T, int ROWS>
__global__ void __launch_bounds__(32 * kWarps) tlin_gate_step(const __grid_constant__ GateStep p) {
  let_next_start();
  constexpr int NT = ceil_div(ROWS, 8);
  extern __shared__ uint4 shared[];
  const int warp = warp_index();
  WeightStream<T, 2, kNormedAhead> stream({p.gate, p.up}, p.hidden_size, p.intermediate_size, warp,
                                          kWarps);
  stream.start(blockIdx.x);
  BlockSums<kWarps, 2, NT> block_sums(shared);
  NormedRows<T, ROWS> rows(shared + block_sums.kBytes / sizeof(uint4), p.norm, p.x, p.batch,
                           p.hidden_size);
  wait_for_previous();
  rows.measure();
  const Outlet<kWarps> outlet;
  const bool live = is_live(p, outlet.row);
  rows.normalise();
  auto inputs = rows.inputs();
  Sums<2, NT> sums;
  stream.multiply(inputs, sums);
  block_sums.put(sums, warp, p.batch);
  if (outlet.row >= p.batch) return;
  const float2 gate = block_sums.pair(0, outlet.row, outlet.output);
  const float2 up = block_sums.pair(1, outlet.row, outlet.output);
  const int output = blockIdx.x * kTile + outlet.output;
  if (!live || output >= p.intermediate_size) return;
  store_pair<T>(p.hidden, int64_t{outlet.row} * p.intermediate_size + output,
                {silu(gate.x) * up.x, silu(gate.y) * up.y});
}

// Every warp has tiles of its own: there are plenty.
template <class T, int ROWS>
__global__ void __launch_bounds__(32 * kWarps, 2)
    tlin_head_step(const __grid_constant__ HeadStep p) {
  constexpr int NT = ceil_div(ROWS, 8);
  extern __shared__ uint4 shared[];
  const int warp = warp_index();
  int tile = warp * gridDim.x + blockIdx.x;
  WeightStream<T, 1, NT == 4 ? 4 : 8, true> stream({p.embed}, p.hidden_size, p.vocab_size, 0, 1);
  stream.start(tile);
  NormedRows<T, ROWS> rows(shared + sizeof(Candidate) * kWarps * NT * 8 / sizeof(uint4), p.norm,
                           p.x, p.batch, p.hidden_size);
  wait_for_previous();
  let_next_start();  // not before: see launch.cuh
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const unsigned live = __ballot_sync(0xffffffffu, is_live(p, lane));
  rows.measure();
  rows.normalise();
  auto inputs = rows.inputs();

  Candidate best[NT][2];
#pragma unroll
  for (int n = 0; n < NT; ++n) best[n][0] = best[n][1] = kNoCandidate;
  for (; tile * kTile < p.vocab_size; tile += kWarps * gridDim.x) {
    Sums<1, NT> sums;
    stream.multiply(inputs, sums, tile + kWarps * gridDim.x);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = tile * kTile + g + i / 2 * 8, row = 8 * n + 2 * q + i % 2;
        if (token >= p.vocab_size || !(live >> row & 1)) continue;
        const float logit = sums.at(0, n, i);
        p.logits[int64_t{row} * p.vocab_size + token] = logit;
        best[n][i % 2] = likelier(best[n][i % 2], {logit, token});
      }
    }
  }

  Candidate* const of_warps = reinterpret_cast<Candidate*>(shared);
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Candidate found = likeliest_of_warp(best[n][i], 4);
      if (g == 0) of_warps[warp * NT * 8 + 8 * n + 2 * q + i] = found;
    }
  }
  __syncthreads();
  const int row = threadIdx.x;
  if (row >= p.batch || !(live >> row & 1)) return;
  Candidate found = of_warps[row];
  for (int w = 1; w < kWarps; ++w) found = likelier(found, of_warps[w * NT * 8 + row]);
  p.candidates[int64_t{row} * gridDim.x + blockIdx.x] = found;
}

// The same step for the sequences from `row` on.
ProjectStep from_row(ProjectStep p, int64_t row) {
  p.state += row;
  p.x += row * p.hidden_size;
  p.query += row * p.query_heads * p.head_dim;
  p.rotations += row * p.head_dim / 2;
  const int64_t bytes = row * p.new_rows.sequence_stride * size_of(p.dtype);
  p.new_rows.keys = static_cast<char*>(p.new_rows.keys) + bytes;
  p.new_rows.values = static_cast<char*>(p.new_rows.values) + bytes;
  return p;
}

AddStep from_row(AddStep p, int64_t row) {
  p.state += row;
  p.input = static_cast<const char*>(p.input) + row * p.inputs * size_of(p.dtype);
  p.x += row * p.outputs;
  return p;
}

GateStep from_row(GateStep p, int64_t row) {
  p.state += row;
  p.x += row * p.hidden_size;
  p.hidden = static_cast<char*>(p.hidden) + row * p.intermediate_size * size_of(p.dtype);
  return p;
}

HeadStep from_row(HeadStep p, int64_t row) {
  p.state += row;
  p.x += row * p.hidden_size;
  p.logits += row * p.vocab_size;
  p.candidates += row * head_candidates(p.vocab_size);
  return p;
}

// Calls pass(part of p, TypeTag<T>, ROWS) for at most `most` sequences at a time.
template <class Step, class Pass>
void in_passes(const Step& p, int most, const Pass& pass) {
  with_type(p.dtype, [&](auto type) {
    for (int row = 0, rows = 0; row < p.batch; row += rows) {
      rows = std::min(p.batch - row, most);
      Step part = from_row(p, row);
      part.batch = rows;
      if (rows == 1)
        pass(part, type, std::integral_constant<int, 1>{});
      else if (rows <= 8)
        pass(part, type, std::integral_constant<int, 8>{});
      else if (rows <= 16)
        pass(part, type, std::integral_constant<int, 16>{});
      else
        pass(part, type, std::integral_constant<int, 32>{});
    }
  });
}

// As many as leave room in shared memory.
int most_normed(int width) {
  constexpr size_t kRoom = 120 * 1024;
  if (NormedRows<bf16, 32>::bytes(32, width) <= kRoom) return 32;
  return NormedRows<bf16, 16>::bytes(16, width) <= kRoom ? 16 : 8;
}

}  // namespace

void project_step(const ProjectStep& p, const Launch& how) {
  in_passes(p, most_normed(p.hidden_size), [&](const ProjectStep& part, auto type, auto most_rows) {
    using T = typename decltype(type)::type;
    constexpr int ROWS = decltype(most_rows)::value, NT = ceil_div(ROWS, 8);
    if constexpr (ROWS == 1) {
      project_row(part, how);
    } else {
      const int outputs = (p.query_heads + 2 * p.kv_heads) * p.head_dim;
      const size_t shared =
          BlockSums<kWarps, 1, NT>::kBytes + NormedRows<T, ROWS>::bytes(part.batch, p.hidden_size);
      launch(how, tlin_project_step<T, ROWS>, "project_step", ceil_div(outputs, kTile), 32 * kWarps,
             shared, part, 1.4426950408889634f / std::sqrt(static_cast<float>(p.head_dim)));
    }
  });
}

void add_step(const AddStep& p, const Launch& how) {
  in_passes(p, 32, [&](const AddStep& part, auto type, auto most_rows) {
    using T = typename decltype(type)::type;
    constexpr int ROWS = decltype(most_rows)::value, NT = ceil_div(ROWS, 8);
    if constexpr (ROWS == 1) {
      add_row(part, how);
    } else {
      launch(how, tlin_add_step<T, NT>, "add_step", ceil_div(p.outputs, kTile), 32 * kAddWarps,
             BlockSums<kAddWarps, 1, NT>::kBytes, part);
    }
  });
}

void gate_step(const GateStep& p, const Launch& how) {
  in_passes(p, most_normed(p.hidden_size), [&](const GateStep& part, auto type, auto most_rows) {
    using T = typename decltype(type)::type;
    constexpr int ROWS = decltype(most_rows)::value, NT = ceil_div(ROWS, 8);
    if constexpr (ROWS == 1) {
      gate_row(part, how);
    } else {
      const size_t shared =
          BlockSums<kWarps, 2, NT>::kBytes + NormedRows<T, ROWS>::bytes(part.batch, p.hidden_size);
      launch(how, tlin_gate_step<T, ROWS>, "gate_step", ceil_div(p.intermediate_size, kTile),
             32 * kWarps, shared, part);
    }
  });
}

int head_candidates(int vocab_size) {
  return std::min(ceil_div(vocab_size, kTile), 2 * multiprocessors());
}

void head_step(const HeadStep& p, const Launch& how) {
  in_passes(p, most_normed(p.hidden_size), [&](const HeadStep& part, auto type, auto most_rows) {
    using T = typename decltype(type)::type;
    constexpr int ROWS = decltype(most_rows)::value, NT = ceil_div(ROWS, 8);
    if (ROWS == 1 && head_row(part, head_candidates(p.vocab_size), how)) return;
    const size_t shared =
        sizeof(Candidate) * kWarps * NT * 8 + NormedRows<T, ROWS>::bytes(part.batch, p.hidden_size);
    launch(how, tlin_head_step<T, ROWS>, "head_step", head_candidates(p.vocab_size), 32 * kWarps,
           shared, part);
  });
}

}  // namespace tlinformer::cuda
