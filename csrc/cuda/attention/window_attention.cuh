// The decode attention of layers that read few rows: the blocks of a head's cluster have its rows
// in shared memory before the query exists. A warp attends to 32 rows, then the block merges its
// warps, and one block of the cluster the others.
#pragma once

#include "../dsmem.cuh"
#include "decode_attention.h"
#include "row_copy.cuh"
#include "unit_attention.cuh"

namespace tlinformer::cuda {

constexpr int kWindowWarps = 18;  // 16 for 512 rows, and what context and window round up to
constexpr int kWindowThreads = 32 * kWindowWarps;
constexpr int kWindowCluster = 8;  // most blocks of a head

// What a block of `blocks` for a head keeps, in bytes: tiles of 32 keys and values; of queries at a
// time, the records of tiles (kRecord floats: sums of values, of weights, padding); and of the
// queries that this block merges, the records of blocks, for each of the two softmaxes.
template <int d>
struct WindowPlaces {
  // The first of an odd number of rows may lie behind one more, where copies may begin.
  static constexpr int kAligned = d % 8 == 0 ? 1 : 2;
  static constexpr int kTileBytes = ((kUnit + kAligned - 1) * d * 2 + 15) / 16 * 16;
  static constexpr int kRecord = d + 4;
  int tiles, records, merged, end;

  __host__ __device__ WindowPlaces(int most_rows, int group, int blocks) {
    tiles = (most_rows / kUnit + 2 + blocks - 1) / blocks;
    records = tiles * 2 * kTileBytes;
    merged = records + tiles * kUnitQueries * kRecord * 4;
    end = merged + (blocks == 1 ? 0 : (group + blocks - 1) / blocks * blocks * 2 * kRecord * 4);
  }
  bool fits() const { return tiles <= kWindowWarps && end <= 160 * 1024; }
};

template <class T, int d>
__global__ void __launch_bounds__(kWindowThreads, 1)
    tlin_window_attention(const __grid_constant__ DecodeAttention a, int blocks) {
  using Places = WindowPlaces<d>;
  constexpr int kRecord = Places::kRecord, kQuads = d / 4;
  let_next_start();
  extern __shared__ __align__(128) char memory[];
  __shared__ uint64_t arrived[kWindowWarps], all_records;
  __shared__ float maxima[2][kWindowWarps][kUnitQueries];  // of tiles; of passes in turn
  const int head = blockIdx.x / blocks, block = blockIdx.x % blocks, sequence = blockIdx.y;
  const int group = a.query_heads / a.kv_heads;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int most = static_cast<int>(a.most_rows);
  const Places places(most, group, blocks);
  float* const records = reinterpret_cast<float*>(memory + places.records);
  float* const merged = reinterpret_cast<float*>(memory + places.merged);
  const uint32_t record_barrier = shared_address(&all_records);
  if (lane == 0) prepare_copies(&arrived[warp]);
  if (threadIdx.x == 0 && blocks > 1) dsmem::barrier_init(record_barrier, 1);
  __syncwarp();
  if (blocks > 1) dsmem::arrive_at_blocks();

  // Before the token's own row exists: all others are where they will be. Only `last` may be one
  // behind; then the window's last row but one comes later, too.
  const volatile SequenceState* state = a.state + sequence;
  const int history = static_cast<int>(state->history);
  const int compressed = a.context_rows == ContextRows::history ? history : state->compressed;
  const int context = a.context_rows == ContextRows::none ? 0 : min(max(compressed, 0), most);
  const int cached =
      static_cast<int>(min(max(state->last - history, int64_t{0}), int64_t{most - context}));
  const int first_row = a.window_follows_history ? history : 0;
  // Tile i, which warp i attends to, has unit block + i blocks of 32 rows: first come those of the
  // context, then the window's.
  const int context_units = (context + kUnit - 1) / kUnit;
  const int context_tiles = max(context_units - block + blocks - 1, 0) / blocks;
  const bool of_context = warp < context_tiles;
  const int first = (block + warp * blocks - (of_context ? 0 : context_units)) * kUnit;
  const int shift = of_context ? 0 : first_row % Places::kAligned;
  const CachedRows& cache = of_context ? a.context : a.window;
  const int64_t offset = sequence * cache.sequence_stride + head * cache.head_stride +
                         int64_t{first + (of_context ? 0 : first_row)} * d;
  const T* const cached_keys = static_cast<const T*>(cache.keys) + offset;
  const T* const cached_values = static_cast<const T*>(cache.values) + offset;
  char* const tile = memory + warp * 2 * Places::kTileBytes;
  T* const keys = reinterpret_cast<T*>(tile) + shift * d;
  T* const values = keys + Places::kTileBytes / static_cast<int>(sizeof(T));
  const int copied = min(kUnit, (of_context ? context : cached) - first);
  if (copied > 0) {
    copy_tile(tile, cached_keys - shift * d, tile + Places::kTileBytes, cached_values - shift * d,
              ((shift + copied) * d * 2 + 15) / 16 * 16, &arrived[warp], lane);
  }
  // The other blocks have started: their barriers are there.
  if (blocks > 1) dsmem::wait_for_blocks();

  wait_for_previous();
  const int64_t first_query = int64_t{sequence} * a.query_heads + head * group;
  const float* const queries = a.query + first_query * d;
  UnitAttention<T, d> unit;
  unit.load_queries(queries, group);
  const bool live = state->live != 0;
  const int own = static_cast<int>(state->last - history);
  // The window's rows that no copy has brought. Only the second one's loads wait for `own`.
  const auto fetch = [&](int row) {
    constexpr int kLoads = (2 * kQuads + 31) / 32;
    const int at = row - first;
    if (of_context || at < 0 || at >= kUnit) return;
    uint2 words[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int quad = lane + 32 * i;
      const T* const from =
          quad < kQuads ? cached_keys + 4 * quad : cached_values + 4 * (quad - kQuads);
      if (quad < 2 * kQuads) words[i] = __ldcg(reinterpret_cast<const uint2*>(from + at * d));
    }
    if (copied > 0) await_tile<1>(&arrived[warp], 0, false);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int quad = lane + 32 * i;
      T* const to = quad < kQuads ? keys + 4 * quad : values + 4 * (quad - kQuads);
      if (quad < 2 * kQuads) *reinterpret_cast<uint2*>(to + at * d) = words[i];
    }
    __syncwarp();
  };
  if (cached < most - context) fetch(cached);
  if (own > cached) fetch(own);
  if (copied > 0) await_tile<1>(&arrived[warp], 0, false);
  if (!live) return;
  const int window = own + 1, units = context_units + (window + kUnit - 1) / kUnit;
  const int tiles = max(units - block + blocks - 1, 0) / blocks;
  const int rows = warp < tiles ? min(kUnit, (of_context ? context : window) - first) : 0;
  // The queries that this block merges: block, block + blocks, ...
  const int merges = blocks > 1 ? max(group - block + blocks - 1, 0) / blocks : group;
  if (threadIdx.x == 0 && blocks > 1 && merges > 0) {
    dsmem::barrier_expect(record_barrier, merges * blocks * 2 * (d + 2) * 4);
  }
  T* const to = static_cast<T*>(a.output) + first_query * d;
  // Of one softmax, a pair of lanes has both; adds them.
  const auto store = [&](int query, int quad, float4 sum, float weights) {
    const float scale = weights > 0 ? 1 / weights : 0.0f;
    const auto both = [&](float x) { return x + __shfl_xor_sync(0xffffffffu, x, 1); };
    sum = {both(sum.x * scale), both(sum.y * scale), both(sum.z * scale), both(sum.w * scale)};
    if (quad < kQuads && threadIdx.x % 2 == 0) {
      reinterpret_cast<uint2*>(to + query * d)[quad] = {pack<T>(sum.x, sum.y),
                                                        pack<T>(sum.z, sum.w)};
    }
  };
  // Threads 2 i and 2 i + 1: quad i of a row of quads of queries; whole warps go together.
  const auto each_quad = [&](int count, const auto& work) {
    for (int i = threadIdx.x / 2; i - lane / 2 < count * kQuads; i += kWindowThreads / 2) {
      const bool exists = i < count * kQuads;
      work(exists ? i / kQuads : 0, exists ? i % kQuads : kQuads, threadIdx.x % 2);
    }
  };

#pragma unroll 1
  for (int base = 0; base < group; base += kUnitQueries) {
    const int count = min(kUnitQueries, group - base), turn = base / kUnitQueries % 2;
    if (base > 0) unit.load_queries(queries + base * d, count);
    if (rows > 0) {
      unit.score(keys, rows);
      const float most_of_unit = unit.greatest();
      if (lane % 8 == 0) maxima[turn][warp][lane / 8] = most_of_unit;
    }
    __syncthreads();
    // The greatest score of a softmax in this block.
    const auto greatest = [&](int query, bool of_context) {
      float most_of_all = -INFINITY;
      const int end = of_context ? min(context_tiles, tiles) : tiles;
#pragma unroll 4
      for (int i = of_context ? 0 : context_tiles; i < end; ++i) {
        most_of_all = fmaxf(most_of_all, maxima[turn][i][query]);
      }
      return most_of_all;
    };
    if (rows > 0) {
      unit.attend(values, rows, greatest(unit.query(), of_context),
                  records + warp * kUnitQueries * kRecord, kRecord, count);
    }
    __syncthreads();
    each_quad(count, [&](int query, int quad, int softmax) {
      float4 sum = {0, 0, 0, 0};
      float weights = 0;
      const int end = softmax == 0 ? min(context_tiles, tiles) : tiles;
      if (quad < kQuads) {
#pragma unroll 4
        for (int i = softmax == 0 ? 0 : context_tiles; i < end; ++i) {
          const float* const record = records + (i * kUnitQueries + query) * kRecord;
          const float4 more = reinterpret_cast<const float4*>(record)[quad];
          sum = {sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w};
          weights += record[d];
        }
      }
      const int of_group = base + query;
      if (blocks == 1) {
        store(of_group, quad, sum, weights);
      } else if (quad < kQuads) {
        const int target = of_group % blocks;
        const uint32_t place = dsmem::address_in_block(
            shared_address(merged + ((of_group / blocks * blocks + block) * 2 + softmax) * kRecord),
            target);
        const uint32_t barrier = dsmem::address_in_block(record_barrier, target);
        const auto send = [&](int at, float low, float high) {
          dsmem::send(place + at * 4, {__float_as_uint(low), __float_as_uint(high)}, barrier);
        };
        send(4 * quad, sum.x, sum.y);
        send(4 * quad + 2, sum.z, sum.w);
        if (quad == 0) send(d, greatest(query, softmax == 0), weights);
      }
    });
    if (base + kUnitQueries < group) __syncthreads();  // records are written anew
  }
  if (blocks == 1 || merges == 0) return;
  dsmem::barrier_wait(record_barrier, 0);
  each_quad(merges, [&](int query, int quad, int softmax) {
    const float* const first = merged + (query * blocks * 2 + softmax) * kRecord;
    float most_of_all = -INFINITY, weights = 0;
    for (int i = 0; i < blocks; ++i) most_of_all = fmaxf(most_of_all, first[i * 2 * kRecord + d]);
    float4 sum = {0, 0, 0, 0};
    for (int i = 0; i < blocks; ++i) {
      const float* const record = first + i * 2 * kRecord;
      const float scale = record[d + 1] > 0 ? exp2_fast(record[d] - most_of_all) : 0.0f;
      weights += scale * record[d + 1];
      if (quad >= kQuads) continue;
      const float4 more = reinterpret_cast<const float4*>(record)[quad];
      sum = {sum.x + scale * more.x, sum.y + scale * more.y, sum.z + scale * more.z,
             sum.w + scale * more.w};
    }
    store(block + query * blocks, quad, sum, weights);
  });
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

// The fewest blocks of a head that take all rows; none if there would be too many.
template <int d>
int window_attention_blocks(const DecodeAttention& a) {
  if (a.most_rows <= 0 || a.most_rows > kUnit * kWindowWarps * kWindowCluster) return 0;
  const int most = has_clusters() ? kWindowCluster : 1;
  for (int blocks = 1; blocks <= most; blocks *= 2) {
    const int group = a.query_heads / a.kv_heads;
    if (WindowPlaces<d>(static_cast<int>(a.most_rows), group, blocks).fits()) return blocks;
  }
  return 0;
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
