// A head's cluster: its blocks share out the rows of the weights and the cached rows, which are in
// shared memory before x is there. Then they send each other the new query, key and value, and the
// softmaxes of their rows; barriers that count the bytes spare them the fences of a cluster's own.
#include <algorithm>
#include <cmath>

#include "../attention/window_attention.cuh"
#include "../cluster/ring.cuh"
#include "attention_step.h"
#include "weight_stream.cuh"

namespace tlinformer::cuda {
namespace {

constexpr int kHeadBlocks = 8;  // of a cluster
constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kMostHidden = 4 * kThreads;  // a thread normalises four elements

using step::ceil_div;

// Shared memory of a block, in bytes: lines of weights, tiles of kUnit keys and kUnit values,
// floats.
struct Places {
  int units;  // most of a head
  int share;  // pairs of outputs
  int tiles, queries, x, measures, records, end;
  __host__ __device__ Places(int most_rows, int group, int d, int hidden_size) {
    units = most_rows / kUnit + 2;
    share = ceil_div((group + 2) * d / 2, kHeadBlocks);
    tiles = share * 2 * hidden_size * 2;
    queries = tiles + ceil_div(units, kHeadBlocks) * 2 * kUnit * d * 2;
    x = queries + group * d * 4;
    measures = x + hidden_size * 4;
    records = measures + kWarps * 8;
    end = records + ceil_div(group, kHeadBlocks) * units * (d + 2) * 4;
  }
};

#if __CUDA_ARCH__ >= 900
using cluster::address_in_block;

__device__ void send(uint32_t to, float2 pair, uint32_t barrier) {
  cluster::send(to, barrier, {__float_as_uint(pair.x), __float_as_uint(pair.y)});
}
__device__ void send(uint32_t to, uint32_t word, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
      "r"(word), "r"(barrier));
}
#endif

template <class T, int d>
__global__ void __launch_bounds__(kThreads, 2)
    tlin_attention_step(const __grid_constant__ ProjectStep p,
                        const __grid_constant__ DecodeAttention a, float scale) {
#if __CUDA_ARCH__ >= 900
  constexpr int kVector = 8;  // elements
  let_next_start();
  extern __shared__ uint4 shared[];
  __shared__ uint64_t barriers[2];  // of the new row, and of the records
  const int head = blockIdx.x / kHeadBlocks, block = blockIdx.x % kHeadBlocks,
            sequence = blockIdx.y;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = p.query_heads / p.kv_heads, width = p.hidden_size;
  const int most = static_cast<int>(a.most_rows);
  const Places places(most, group, d, width);
  char* const memory = reinterpret_cast<char*>(shared);
  T* const weights = reinterpret_cast<T*>(memory);
  T* const tiles = reinterpret_cast<T*>(memory + places.tiles);
  float* const queries = reinterpret_cast<float*>(memory + places.queries);
  float* const x = reinterpret_cast<float*>(memory + places.x);
  float2* const measures = reinterpret_cast<float2*>(memory + places.measures);
  float* const records = reinterpret_cast<float*>(memory + places.records);
  const auto address = [](const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
  };
  const uint32_t row_barrier = address(&barriers[0]), record_barrier = address(&barriers[1]);
  if (threadIdx.x == 0) {
    cluster::barrier_init(row_barrier, 1);
    cluster::barrier_init(record_barrier, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");

  // Pairs of outputs of the head: of its queries, its key and its value. A warp computes one.
  constexpr int kPairs = d / 2;
  const int begin = block * places.share, end = min(begin + places.share, (group + 2) * kPairs);
  const auto line_of = [&](int pair) {
    const int part = pair / kPairs;
    const int of = part < group    ? head * group + part
                   : part == group ? p.query_heads + head
                                   : p.query_heads + p.kv_heads + head;
    return of * d + pair % kPairs * 2;
  };
  // Volatile, so that it is not put off until wait_for_previous() has returned.
  const auto bias_of = [&](int pair) -> uint32_t {
    if (pair >= end) return 0;
    return *reinterpret_cast<const volatile uint32_t*>(static_cast<const T*>(p.bias) +
                                                       line_of(pair));
  };
  int pair = begin + warp;
  uint32_t bias_words = bias_of(pair);
  const int vectors = width / kVector;
#pragma unroll 1
  for (int line = warp; line < 2 * (end - begin); line += kWarps) {
    const T* from =
        static_cast<const T*>(p.weight) + int64_t{line_of(begin + line / 2) + line % 2} * width;
    for (int i = lane; i < vectors; i += 32)
      copy_async(weights + line * width + i * kVector, from + i * kVector);
  }
  const int column = 4 * threadIdx.x;
  uint2 norm_weight = {0, 0}, norm_bias = {0, 0};
  if (column < width) {
    const auto load = [&](const void* from) {
      const volatile uint2* at =
          reinterpret_cast<const volatile uint2*>(static_cast<const T*>(from) + column);
      return uint2{at->x, at->y};
    };
    norm_weight = load(p.norm.weight);
    norm_bias = load(p.norm.bias);
  }

  // All cached rows but the token's own, as in tlin_window_attention.
  const volatile SequenceState* state = a.state + sequence;
  const int compressed =
      a.context_rows == ContextRows::compressed ? min(max(state->compressed, 0), most) : 0;
  const int cached = static_cast<int>(
      min(max(state->last - state->history, int64_t{0}), int64_t{most - compressed}));
  const int context_units = ceil_div(compressed, kUnit);
  // This block's tiles: all of the context if `context`, and rows first ... stop - 1 of the window.
  const auto copy_tiles = [&](bool context, int first, int stop) {
    const int units = context_units + ceil_div(stop, kUnit);
#pragma unroll 1
    for (int i = warp;; i += kWarps) {
      const int tile = i / 2, unit = block + tile * kHeadBlocks;
      if (unit >= units) break;
      const bool of_context = unit < context_units;
      if (of_context && !context) continue;
      const CachedRows& from = of_context ? a.context : a.window;
      const int row = (of_context ? unit : unit - context_units) * kUnit;
      const int low = of_context ? row : max(row, first);
      const int high = min(row + kUnit, of_context ? compressed : stop);
      if (low >= high) continue;
      const T* rows = static_cast<const T*>(i % 2 == 0 ? from.keys : from.values) +
                      sequence * from.sequence_stride + head * from.head_stride;
      copy_rows(tiles + (i * kUnit - row) * d, rows, low * d, high * d, lane, 32);
    }
  };
  copy_tiles(true, 0, cached);
  // The other blocks have started, so their barriers are there.
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");

  wait_for_previous();
  const float* const from = p.x + int64_t{sequence} * width;
  const float origin = __ldcg(from);
  float4 mine = {origin, origin, origin, origin};
  if (column < width) mine = __ldcg(reinterpret_cast<const float4*>(from + column));
  const bool live = state->live != 0;
  const int64_t position = state->last;
  const int own = static_cast<int>(position - state->history);
  if (!live) {
    asm volatile("cp.async.wait_all;" ::: "memory");
    return;
  }
  if (cached < own) copy_tiles(false, cached, own);
  const int own_unit = context_units + own / kUnit;
  const int window = own + 1, units = context_units + ceil_div(window, kUnit);
  constexpr int kRecord = d + 2;
  if (threadIdx.x == 0) {
    const int key_value = own_unit % kHeadBlocks == block ? 2 * d * static_cast<int>(sizeof(T)) : 0;
    cluster::barrier_expect(row_barrier, group * d * 4 + key_value);
    const int merged = (group - block + kHeadBlocks - 1) / kHeadBlocks;
    if (merged > 0) cluster::barrier_expect(record_barrier, merged * units * kRecord * 4);
  }
  const auto turn_of = [&](int pair) {
    return pair < (group + 1) * kPairs ? rotation(p.rope.turns[pair % kPairs], position)
                                       : float2{1, 0};
  };
  float2 turn = turn_of(pair);
  // As NormedRows::measure().
  const float4 off = {mine.x - origin, mine.y - origin, mine.z - origin, mine.w - origin};
  const float2 sums = {warp_sum((off.x + off.y) + (off.z + off.w)),
                       warp_sum((off.x * off.x + off.y * off.y) + (off.z * off.z + off.w * off.w))};
  if (lane == 0) measures[warp] = sums;
  __syncthreads();
  float2 sum = {0, 0};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    sum.x += measures[w].x;
    sum.y += measures[w].y;
  }
  const float shifted = __fdividef(sum.x, width), mean = origin + shifted;
  const float deviation = rsqrtf(__fdividef(sum.y, width) - shifted * shifted + p.norm.epsilon);
  if (column < width) {
    const float2 w0 = unpack<T>(norm_weight.x), w1 = unpack<T>(norm_weight.y);
    const float2 b0 = unpack<T>(norm_bias.x), b1 = unpack<T>(norm_bias.y);
    *reinterpret_cast<float4*>(x + column) = {
        (mine.x - mean) * deviation * w0.x + b0.x, (mine.y - mean) * deviation * w0.y + b0.y,
        (mine.z - mean) * deviation * w1.x + b1.x, (mine.w - mean) * deviation * w1.y + b1.y};
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();

#pragma unroll 1
  for (; pair < end; pair += kWarps, turn = turn_of(pair), bias_words = bias_of(pair)) {
    const T* const line = weights + (pair - begin) * 2 * width;
    const float2 bias = unpack<T>(bias_words);
    float2 low = {0, 0}, high = {0, 0};  // even and odd columns apart: shorter chains
#pragma unroll 2
    for (int i = lane; i < vectors; i += 32) {
      const uint4 l = *reinterpret_cast<const uint4*>(line + i * kVector);
      const uint4 h = *reinterpret_cast<const uint4*>(line + width + i * kVector);
      const float4 y0 = *reinterpret_cast<const float4*>(x + i * kVector);
      const float4 y1 = *reinterpret_cast<const float4*>(x + i * kVector + 4);
      const auto add = [&](uint32_t lower, uint32_t higher, float even, float odd) {
        const float2 w = unpack<T>(lower), v = unpack<T>(higher);
        low.x += w.x * even;
        low.y += w.y * odd;
        high.x += v.x * even;
        high.y += v.y * odd;
      };
      add(l.x, h.x, y0.x, y0.y);
      add(l.y, h.y, y0.z, y0.w);
      add(l.z, h.z, y1.x, y1.y);
      add(l.w, h.w, y1.z, y1.w);
    }
    const float2 value =
        rotate({warp_sum(low.x + low.y) + bias.x, warp_sum(high.x + high.y) + bias.y}, turn);
    const int part = pair / kPairs, element = pair % kPairs * 2;
    if (part < group) {
      if (lane >= kHeadBlocks) continue;
      send(address_in_block(address(queries + part * d + element), lane),
           {value.x * scale, value.y * scale}, address_in_block(row_barrier, lane));
    } else if (lane == 0) {
      const NewRows& cache = p.new_rows;
      const uint32_t words = pack<T>(value.x, value.y);
      const T* const to =
          tiles + (own_unit / kHeadBlocks * 2 * kUnit + (part - group) * kUnit + own % kUnit) * d +
          element;
      send(address_in_block(address(to), own_unit % kHeadBlocks), words,
           address_in_block(row_barrier, own_unit % kHeadBlocks));
      *reinterpret_cast<uint32_t*>(static_cast<T*>(part == group ? cache.keys : cache.values) +
                                   sequence * cache.sequence_stride + head * cache.head_stride +
                                   int64_t{own} * d + element) = words;
    }
  }
  cluster::barrier_wait(row_barrier, 0);

  const int own_units = block < units ? ceil_div(units - block, kHeadBlocks) : 0;
#pragma unroll 1
  for (int item = warp; item < own_units * group; item += kWarps) {
    const int tile = item / group, i = item % group, unit = block + tile * kHeadBlocks;
    const bool of_context = unit < context_units;
    const int first = (of_context ? unit : unit - context_units) * kUnit;
    const T* keys = tiles + tile * 2 * kUnit * d;
    const float* record = records + (i / kHeadBlocks * places.units + unit) * kRecord;
    const uint32_t to = address_in_block(address(record), i % kHeadBlocks);
    const uint32_t barrier = address_in_block(record_barrier, i % kHeadBlocks);
    attend_unit<T, d>(keys, keys + kUnit * d,
                      min(kUnit, (of_context ? compressed : window) - first), queries + i * d,
                      [&](int at, float2 two) { send(to + 8 * at, two, barrier); });
  }
  if (block >= group) return;
  cluster::barrier_wait(record_barrier, 0);
  T* const to = static_cast<T*>(a.output) + (int64_t{sequence} * p.query_heads + head * group) * d;
#pragma unroll 1
  for (int i = block; i < group; i += kHeadBlocks) {
    const float* of_query = records + i / kHeadBlocks * places.units * kRecord;
    for (int e = threadIdx.x; e < d; e += kThreads) {
      to[i * d + e] = from_float<T>(merge_units(of_query, 0, context_units, kRecord, e) +
                                    merge_units(of_query, context_units, units, kRecord, e));
    }
  }
#endif
}

size_t shared_bytes(const ProjectStep& p, const DecodeAttention& a) {
  return static_cast<size_t>(
      Places(static_cast<int>(a.most_rows), p.query_heads / p.kv_heads, p.head_dim, p.hidden_size)
          .end);
}

// Code for older devices, which newer ones may run too, has nothing in it.
bool has_clusters() {
  static const bool has = [] {
    cudaFuncAttributes compiled{};
    const cudaError_t status = cudaFuncGetAttributes(&compiled, tlin_attention_step<bf16, 64>);
    if (status != cudaSuccess) cudaGetLastError();
    return status == cudaSuccess && compiled.ptxVersion >= 90;
  }();
  return has;
}

}  // namespace

bool takes_attention_step(const ProjectStep& p, const DecodeAttention& a) {
  constexpr size_t kRoom = 160 * 1024;
  return p.batch == 1 && p.hidden_size <= kMostHidden && a.most_rows > 0 && a.most_rows < 16384 &&
         a.context_rows != ContextRows::history && !a.window_follows_history &&
         kHeadBlocks * p.kv_heads <= multiprocessors() && shared_bytes(p, a) <= kRoom &&
         has_clusters();
}

void attention_step(const ProjectStep& p, const DecodeAttention& a, const Launch& how) {
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto run = [&](auto* kernel) {
      Launch clusters = how;
      clusters.cluster = kHeadBlocks;
      launch(clusters, kernel, "attention step",
             dim3(static_cast<unsigned>(kHeadBlocks * p.kv_heads), static_cast<unsigned>(p.batch)),
             kThreads, shared_bytes(p, a), p, a,
             1.4426950408889634f / std::sqrt(static_cast<float>(p.head_dim)));
    };
    switch (p.head_dim) {
#define TLINFORMER_CASE(d) \
  case d:                  \
    return run(tlin_attention_step<T, d>);
      TLINFORMER_HEAD_SIZES(TLINFORMER_CASE)
#undef TLINFORMER_CASE
      default:
        require(false, "attention step: no kernel for heads of ", p.head_dim, " elements");
    }
  });
}

}  // namespace tlinformer::cuda
