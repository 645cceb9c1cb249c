// The decode attention of layers that read few rows: the blocks of a head's cluster have its rows
// in shared memory before the query exists, and send each other the softmaxes of their rows.
#pragma once

#include <algorithm>

#include "../dsmem.cuh"
#include "decode_attention.h"
#include "row_copy.cuh"
#include "row_score.cuh"

namespace tlinformer::cuda {

constexpr int kWindowWarps = 16, kWindowThreads = 32 * kWindowWarps;
constexpr int kUnit = 32;          // rows that a warp attends to at a time
constexpr int kTilesOfWarp = 2;    // at most, each of one unit
constexpr int kWindowCluster = 8;  // most blocks of a head

// Up to 32 rows against one query. put(i, pair) stores floats 2 i and 2 i + 1 of a record: greatest
// score, sum of the weights relative to it, weighted sum of the values.
template <class T, int d, class Put>
__device__ void attend_unit(const T* keys, const T* values, int rows, const float* query,
                            const Put& put) {
  constexpr int kQuads = d / 4;
  const int lane = threadIdx.x % 32;
  const float score = lane < rows ? row_score<T, d>(keys, query, lane) : -INFINITY;
  const float most = warp_max(score);
  const float weight = exp2_fast(score - most);
  const float sum = warp_sum(weight);

  constexpr int kAtOnce = 32 / kQuads;  // rows
  const int offset = lane / kQuads, quad = lane % kQuads;
  float4 mixed{};
#pragma unroll
  for (int first = 0; first < kUnit; first += kAtOnce) {
    const int row = first + offset;
    const float w = __shfl_sync(0xffffffffu, weight, row % 32);
    if (offset < kAtOnce && row < rows) {  // values beyond may be NaN
      const uint2 words = reinterpret_cast<const uint2*>(values + row * d)[quad];
      const float2 low = unpack<T>(words.x), high = unpack<T>(words.y);
      mixed.x += w * low.x;
      mixed.y += w * low.y;
      mixed.z += w * high.x;
      mixed.w += w * high.y;
    }
  }
  float4 all = mixed;
#pragma unroll
  for (int i = 1; i < kAtOnce; ++i) {
    all.x += __shfl_down_sync(0xffffffffu, mixed.x, i * kQuads);
    all.y += __shfl_down_sync(0xffffffffu, mixed.y, i * kQuads);
    all.z += __shfl_down_sync(0xffffffffu, mixed.z, i * kQuads);
    all.w += __shfl_down_sync(0xffffffffu, mixed.w, i * kQuads);
  }
  if (lane == 0) put(0, float2{most, sum});
  if (lane < kQuads) {
    put(1 + 2 * lane, float2{all.x, all.y});
    put(2 + 2 * lane, float2{all.z, all.w});
  }
}

// A value of softmax(scores) values, from records begin ... end - 1.
__device__ inline float merge_units(const float* records, int begin, int end, int stride,
                                    int column) {
  if (begin == end) return 0;
  float most = -INFINITY;
#pragma unroll 4
  for (int i = begin; i < end; ++i) most = fmaxf(most, records[i * stride]);
  float sum = 0, mixed = 0;
#pragma unroll 4
  for (int i = begin; i < end; ++i) {
    const float weight = exp2_fast(records[i * stride] - most);
    sum += weight * records[i * stride + 1];
    mixed += weight * records[i * stride + 2 + column];
  }
  return mixed / sum;
}

// What a block of `blocks` for a head keeps, in bytes: tiles of a unit's keys and values, floats.
template <int d>
struct WindowPlaces {
  // The first of an odd number of rows may lie behind one more, where copies may begin.
  static constexpr int kAligned = d % 8 == 0 ? 1 : 2;
  static constexpr int kTileBytes = ((kUnit + kAligned - 1) * d * 2 + 15) / 16 * 16;
  int units;  // most of a head
  int tiles, queries, records, end;

  __host__ __device__ WindowPlaces(int most_rows, int group, int blocks) {
    units = most_rows / kUnit + 2;
    tiles = (units + blocks - 1) / blocks;
    queries = tiles * 2 * kTileBytes;
    records = queries + group * d * 4;
    end = records + (group + blocks - 1) / blocks * units * (d + 2) * 4;
  }
  bool fits() const { return tiles <= kTilesOfWarp * kWindowWarps && end <= 160 * 1024; }
};

template <class T, int d>
__global__ void __launch_bounds__(kWindowThreads, 1)
    tlin_window_attention(const __grid_constant__ DecodeAttention a, int blocks) {
  using Places = WindowPlaces<d>;
  let_next_start();
  extern __shared__ __align__(128) char memory[];
  __shared__ uint64_t arrived[kTilesOfWarp * kWindowWarps], all_records;
  const int head = blockIdx.x / blocks, block = blockIdx.x % blocks, sequence = blockIdx.y;
  const int group = a.query_heads / a.kv_heads;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int most = static_cast<int>(a.most_rows);
  const Places places(most, group, blocks);
  float* const queries = reinterpret_cast<float*>(memory + places.queries);
  float* const records = reinterpret_cast<float*>(memory + places.records);
  const uint32_t record_barrier = shared_address(&all_records);
  if (lane < kTilesOfWarp) prepare_copies(&arrived[warp + lane * kWindowWarps]);
  if (threadIdx.x == 0 && blocks > 1) dsmem::barrier_init(record_barrier, 1);
  __syncwarp();
  if (blocks > 1) dsmem::arrive_at_blocks();

  // Before the token's own row exists: all others are where they will be. Only `last` may be one
  // behind; then the window's last row but one comes later, too.
  const volatile SequenceState* state = a.state + sequence;
  const int history = static_cast<int>(state->history);
  const int context =
      a.context_rows == ContextRows::none
          ? 0
          : min(max(a.context_rows == ContextRows::history ? history : state->compressed, 0), most);
  const int cached =
      static_cast<int>(min(max(state->last - history, int64_t{0}), int64_t{most - context}));
  const int first_row = a.window_follows_history ? history : 0;
  const int context_units = (context + kUnit - 1) / kUnit;
  struct Unit {
    bool of_context;
    int first;  // of its rows
  };
  const auto unit_of = [&](int tile) {
    const int unit = block + tile * blocks;
    const bool of_context = unit < context_units;
    return Unit{of_context, (of_context ? unit : unit - context_units) * kUnit};
  };
  // Row 0 of the unit in shared memory.
  const auto keys_of = [&](int tile, const Unit& unit) {
    const int shift = unit.of_context ? 0 : first_row % Places::kAligned;
    return reinterpret_cast<T*>(memory + tile * 2 * Places::kTileBytes) + shift * d;
  };
  constexpr int kValues = Places::kTileBytes / static_cast<int>(sizeof(T));  // behind the keys
  const auto from = [&](const CachedRows& rows, const void* data, int64_t row) {
    return static_cast<const T*>(data) + sequence * rows.sequence_stride + head * rows.head_stride +
           row * d;
  };
  uint32_t copied = 0;  // tiles of this warp that copies fill, a bit each
#pragma unroll 1
  for (int i = 0; i < kTilesOfWarp; ++i) {
    const int tile = warp + i * kWindowWarps;
    const Unit unit = unit_of(tile);
    const int rows = min(kUnit, (unit.of_context ? context : cached) - unit.first);
    if (rows <= 0) continue;
    const int shift = unit.of_context ? 0 : first_row % Places::kAligned;
    const CachedRows& of = unit.of_context ? a.context : a.window;
    const int64_t row = unit.first - shift + (unit.of_context ? 0 : first_row);
    char* const to = memory + tile * 2 * Places::kTileBytes;
    copy_tile(to, from(of, of.keys, row), to + Places::kTileBytes, from(of, of.values, row),
              ((shift + rows) * d * 2 + 15) / 16 * 16, &arrived[tile], lane);
    copied |= 1u << i;
  }
  // The other blocks have started: their barriers are there.
  if (blocks > 1) dsmem::wait_for_blocks();

  wait_for_previous();
  const bool live = state->live != 0;
  const int own = static_cast<int>(state->last - history);
  if (live) {
    const float* of_head = a.query + (int64_t{sequence} * a.query_heads + head * group) * d;
    for (int i = threadIdx.x; i < group * d; i += kWindowThreads) queries[i] = __ldcg(of_head + i);
  }
#pragma unroll 1
  for (int i = 0; i < kTilesOfWarp; ++i) {
    if (copied >> i & 1) await_tile<kTilesOfWarp>(&arrived[warp + i * kWindowWarps], 0, false);
  }
  if (!live) return;
  const int window = own + 1;
  const int units = context_units + (window + kUnit - 1) / kUnit;
  constexpr int kRecord = d + 2;
  const int merged = block < group ? (group - block + blocks - 1) / blocks : 0;  // queries
  if (threadIdx.x == 0 && blocks > 1 && merged > 0) {
    dsmem::barrier_expect(record_barrier, merged * units * kRecord * 4);
  }
  // Rows that no copy has brought.
#pragma unroll 1
  for (int row = cached; row <= own; ++row) {
    const int unit = context_units + row / kUnit, tile = unit / blocks;
    if (unit % blocks != block || tile % kWindowWarps != warp) continue;
    T* const keys = keys_of(tile, unit_of(tile)) + row % kUnit * d;
    const T* const new_keys = from(a.window, a.window.keys, first_row + row);
    const T* const new_values = from(a.window, a.window.values, first_row + row);
    for (int i = 2 * lane; i < d; i += 64) {
      const uint32_t key = __ldcg(reinterpret_cast<const uint32_t*>(new_keys + i));
      const uint32_t value = __ldcg(reinterpret_cast<const uint32_t*>(new_values + i));
      *reinterpret_cast<uint32_t*>(keys + i) = key;
      *reinterpret_cast<uint32_t*>(keys + kValues + i) = value;
    }
  }
  __syncthreads();

#pragma unroll 1
  for (int tile = warp; block + tile * blocks < units; tile += kWindowWarps) {
    const Unit unit = unit_of(tile);
    const T* const keys = keys_of(tile, unit);
    const int here = min(kUnit, (unit.of_context ? context : window) - unit.first);
    for (int i = 0; i < group; ++i) {
      float* const record = records + (i / blocks * places.units + block + tile * blocks) * kRecord;
      const uint32_t to = dsmem::address_in_block(shared_address(record), i % blocks);
      const uint32_t barrier = dsmem::address_in_block(record_barrier, i % blocks);
      attend_unit<T, d>(keys, keys + kValues, here, queries + i * d, [&](int at, float2 pair) {
        if (blocks > 1) {
          dsmem::send(to + 8 * at, {__float_as_uint(pair.x), __float_as_uint(pair.y)}, barrier);
        } else {
          reinterpret_cast<float2*>(record)[at] = pair;
        }
      });
    }
  }
  if (merged == 0) return;
  if (blocks > 1) {
    dsmem::barrier_wait(record_barrier, 0);
  } else {
    __syncthreads();
  }
  T* const to = static_cast<T*>(a.output) + (int64_t{sequence} * a.query_heads + head * group) * d;
  for (int i = threadIdx.x; i < merged * d; i += kWindowThreads) {
    const int query = block + i / d * blocks, column = i % d;
    const float* of_query = records + i / d * places.units * kRecord;
    to[query * d + column] =
        from_float<T>(merge_units(of_query, 0, context_units, kRecord, column) +
                      merge_units(of_query, context_units, units, kRecord, column));
  }
}

// Code for older devices, which newer ones may run too, has no clusters.
inline bool has_clusters() {
  static const bool has = [] {
    cudaFuncAttributes compiled{};
    const cudaError_t status = cudaFuncGetAttributes(&compiled, tlin_window_attention<bf16, 64>);
    if (status != cudaSuccess) cudaGetLastError();
    return status == cudaSuccess && compiled.ptxVersion >= 90;
  }();
  return has;
}

// Blocks of a head: so few rows in each that its warps take one unit each, if there may be so many.
// None where the rows do not fit.
template <int d>
int window_attention_blocks(const DecodeAttention& a) {
  if (a.most_rows <= 0 || a.most_rows > kUnit * kTilesOfWarp * kWindowWarps * kWindowCluster) {
    return 0;
  }
  const int group = a.query_heads / a.kv_heads, rows = static_cast<int>(a.most_rows);
  const int most = has_clusters() ? kWindowCluster : 1;
  const bool busy = a.batch * a.kv_heads > multiprocessors() / 2;  // one block of each head serves
  int blocks = 1;
  while (!busy && blocks < most && rows > blocks * kUnit * kWindowWarps) blocks *= 2;
  while (blocks < most && !WindowPlaces<d>(rows, group, blocks).fits()) blocks *= 2;
  return WindowPlaces<d>(rows, group, blocks).fits() ? blocks : 0;
}

template <class T, int d>
void launch_window_attention(const DecodeAttention& a, int blocks, const Launch& how) {
  Launch clusters = how;
  clusters.cluster = blocks;
  const WindowPlaces<d> places(static_cast<int>(a.most_rows), a.query_heads / a.kv_heads, blocks);
  launch(clusters, tlin_window_attention<T, d>, "window attention",
         dim3(static_cast<unsigned>(a.kv_heads * blocks), static_cast<unsigned>(a.batch)),
         kWindowThreads, static_cast<size_t>(places.end), a, blocks);
}

}  // namespace tlinformer::cuda
