// The decode attention of everything that no kernel of its own takes: batches with long histories,
// single sequences on devices without bulk copies. Every block streams an equal share of all rows
// through shared memory; the last block to finish a head merges the blocks' softmaxes of it.
#pragma once

#include <algorithm>

#include "decode_attention.h"
#include "decode_plan.cuh"
#include "decode_rows.cuh"
#include "row_copy.cuh"

namespace tlinformer::cuda {

// Query heads which attend to a row while it is in registers. More heads of a key/value head take
// several passes over its rows.
constexpr int heads_of_pass(int head_dim, bool grouped) {
  return !grouped ? 1 : head_dim % 32 == 0 && head_dim != 96 ? 4 : 2;
}
inline int passes_of_head(const DecodeAttention& a) {
  const int most = heads_of_pass(a.head_dim, a.query_heads > a.kv_heads);
  return (a.query_heads / a.kv_heads + most - 1) / most;
}

// The scratch holds arrivals, one count for each pass of each sequence, then partials: output,
// top, sum and padding of each head. The partials of block b in group g of pass p (counted through
// all sequences) are number b + 2 p + g: neither block nor group goes back along the rows, so no
// two are the same.
constexpr int kPartialExtra = 4;  // floats

// By one warp, half of it a group: one head's output from the blocks' partial softmaxes.
template <class T, int D>
__device__ inline void merge(const SequenceRows& rows, int pass, int64_t share,
                             const float* partials, int64_t stride, T* output, int lane) {
  constexpr int kVectors = (D + 63) / 64;  // of four elements, in a lane
  constexpr int kLoads = 16 / kVectors;    // partials in flight
  const int group = lane / 16;
  const int count = group == 0 ? rows.context : rows.window;
  const int64_t begin = rows.before + int64_t{pass} * rows.rows() + (group == 0 ? 0 : rows.context);
  const int64_t block = divide(begin, share);
  const int pieces =
      count == 0 ? 0 : static_cast<int>(divide(begin + count - 1, share) - block + 1);
  const float* piece = partials + (block + group) * stride;
  float top = kMinusInfinity, sum = 0;
  float4 total[kVectors] = {};
#pragma unroll 1
  for (int first = 0; first < pieces; first += kLoads) {
    float2 state[kLoads];
    float4 part[kLoads][kVectors];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const float* from = piece + (first + i) * stride;
      const bool exists = first + i < pieces;
      state[i] = make_float2(kMinusInfinity, 0);
      if (exists) state[i] = __ldcg(reinterpret_cast<const float2*>(from + D));
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int at = 4 * (lane % 16 + 16 * v);
        part[i][v] = make_float4(0, 0, 0, 0);
        if (exists && at < D) part[i][v] = __ldcg(reinterpret_cast<const float4*>(from + at));
      }
    }
    float peak = top;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) peak = fmaxf(peak, state[i].x);
    const float scale = exp2_fast(top - peak);
    sum *= scale;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      total[v].x *= scale, total[v].y *= scale, total[v].z *= scale, total[v].w *= scale;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const float weight = state[i].y == 0 ? 0.0f : exp2_fast(state[i].x - peak);
      sum += weight * state[i].y;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        total[v].x += weight * part[i][v].x, total[v].y += weight * part[i][v].y;
        total[v].z += weight * part[i][v].z, total[v].w += weight * part[i][v].w;
      }
    }
    top = peak;
  }
  const float inverse = pieces == 0 ? 0.0f : 1.0f / sum;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const auto both = [&](float x) {
      x *= inverse;
      return x + __shfl_xor_sync(0xffffffffu, x, 16);
    };
    const float x = both(total[v].x), y = both(total[v].y), z = both(total[v].z),
                w = both(total[v].w);
    const int at = 4 * (lane % 16 + 16 * v);
    if (group == 0 && at < D)
      *reinterpret_cast<uint2*>(output + at) = make_uint2(pack<T>(x, y), pack<T>(z, w));
  }
}

// How many blocks arrived before. What a block stored before the barrier before it is seen by the
// last to arrive after its next barrier.
__device__ inline uint32_t arrive(uint32_t* arrivals) {
  uint32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(arrivals))
               : "memory");
  return before;
}

constexpr int kMostSequences = 256;  // of a launch
constexpr int rows_of_tile(int head_dim) { return head_dim <= 64 ? 32 : 16; }

// A block's ring, in stages of a tile of keys and one of values for each warp. With bulk copies it
// leaves room for blocks of the neighbouring kernels; GPUs without have as little as 99 KiB a
// block, of which the other variables take a part, and their tiles are half as long.
template <int D, int H, bool kBulk>
struct DecodeRing {
  using Layout = RowLayout<D, H>;
  static constexpr int kOthers =
      kDecodeWarps * sizeof(PartialSoftmax<D, H>) + kMostSequences * sizeof(SequenceRows) + 4096;
  static constexpr int kMost = kBulk ? 152 * 1024 : 99 * 1024 - kOthers;
  static constexpr int kTile =
      kBulk ? rows_of_tile(D) : std::max(rows_of_tile(D) / 2, Layout::kRows);
  static constexpr int kTileBytes =
      ((kTile + Layout::kAligned - 1) * Layout::kRowBytes + 15) / 16 * 16;
  static constexpr int kStages = kMost / (kDecodeWarps * 2 * kTileBytes);
  static constexpr int kBytes = kStages * kDecodeWarps * 2 * kTileBytes;
  static_assert(kStages >= 2 && kTile % Layout::kRows == 0);
};

template <class T>
struct TileRows {
  const T *keys, *values;
  uint32_t bytes;  // of each; 0: no tile
};

// H query heads at once; `passes` of a sequence: those of all key/value heads.
template <class T, int D, int H>
__global__ void __launch_bounds__(kDecodeThreads, 1)
    tlin_decode_attention(DecodeAttention a, int passes, uint32_t* arrivals, float* partials) {
  using Layout = RowLayout<D, H>;
  using Ring = DecodeRing<D, H, copies_in_bulk()>;
  constexpr int kStages = Ring::kStages, kTileBytes = Ring::kTileBytes;
  constexpr int kWarps = kDecodeWarps, kThreads = kDecodeThreads;
  constexpr int kPartial = H * (D + kPartialExtra);
  extern __shared__ __align__(128) char memory[];
  __shared__ PartialSoftmax<D, H> warp_softmax[kWarps];
  __shared__ uint64_t arrived[kWarps][kStages];
  __shared__ Plan plan;
  __shared__ int finished[kThreads], finished_count;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  char* const ring = memory + warp * (kStages * 2 * kTileBytes);
  SequenceRows* const table = reinterpret_cast<SequenceRows*>(memory + Ring::kBytes);
  // Query heads, and passes, of a key/value head.
  const int heads_each = H == 1 ? 1 : a.query_heads / a.kv_heads;
  const int passes_each = H == 1 ? 1 : passes / a.kv_heads;
  let_next_start();
  if (lane < kStages) prepare_copies(&arrived[warp][lane]);

  LaneRows<T, D, H> mine;
  Walk walk{}, ahead{};      // of the tile under way, and of the next to fetch
  int at = 0, ahead_at = 0;  // rows into the segment of this warp's next tile
  int tile = 0;
  uint32_t used = 0, fetched = 0;  // tiles
  const auto whole_tiles = [&](int rows) { return (rows + tile - 1) & -tile; };
  // The next tile to fetch, without bytes if there is none.
  const auto next_tile = [&](bool windows_too) {
    TileRows<T> rows{};
    int exist = 0;
#pragma unroll 1
    while (ahead.count > 0) {
      if (ahead_at >= ahead.count) {
        ahead_at -= whole_tiles(ahead.count);
        ahead.next(table, passes);
        continue;
      }
      if (ahead.group == 1 && !windows_too) return rows;
      exist = ahead.exist(table, ahead_at, tile);
      if (exist > 0) break;
      ahead_at += kWarps * tile;
    }
    if (ahead.count == 0) return rows;
    const CachedRows& from = ahead.group == 0 ? a.context : a.window;
    const int row = ahead.row + ahead_at + (ahead.group == 0 ? 0 : table[ahead.sequence].first);
    const int shift = row & (Layout::kAligned - 1);
    const int64_t offset = ahead.sequence * from.sequence_stride +
                           ahead.pass / passes_each * from.head_stride +
                           static_cast<int64_t>(row - shift) * D;
    rows.keys = static_cast<const T*>(from.keys) + offset;
    rows.values = static_cast<const T*>(from.values) + offset;
    rows.bytes = ((shift + exist) * Layout::kRowBytes + 15) / 16 * 16;
    ahead_at += kWarps * tile;
    return rows;
  };
  const auto room = [&] { return fetched - used < kStages; };
  const auto fetch = [&](const TileRows<T>& rows) {
    const int stage = fetched++ % kStages;
    char* const to = ring + stage * (2 * kTileBytes);
    copy_tile(to, rows.keys, to + kTileBytes, rows.values, rows.bytes, &arrived[warp][stage], lane);
  };
  const auto await = [&] {
    const int stage = used % kStages;
    await_tile<kStages>(&arrived[warp][stage], used / kStages % 2, !room());
    ++used;
    return stage;
  };
  const auto first_query = [&](int pass) {  // its row in query and output; pass of all sequences
    return int64_t{pass / passes_each} * heads_each + pass % passes_each * H;
  };
  const auto load_queries = [&] {
    const int pass = walk.sequence * passes + walk.pass;
    mine.load_queries(a.query + first_query(pass) * D, heads_each - pass % passes_each * H, lane);
  };

  // A plan from the state as it was before the previous kernel ended lets the context's rows come
  // while that still runs. If it proves wrong, all is done again.
#pragma unroll 1
  for (bool checked = false;; checked = true) {
    if (warp == 0) make_plan(a, passes, Ring::kTile, lane, table, &plan);
    __syncthreads();
    walk = ahead = plan.walk;
#pragma unroll 1
    for (tile = Layout::kRows; tile < Ring::kTile && tile * kWarps < plan.share;) tile *= 2;
    at = ahead_at = warp * tile;
#pragma unroll 1
    while (room()) {
      const Walk resume = ahead;
      const int resume_at = ahead_at;
      const TileRows<T> rows = next_tile(false);
      if (rows.bytes == 0) {
        ahead = resume;
        ahead_at = resume_at;
        break;
      }
      fetch(rows);
    }
    if (!checked) {
      wait_for_previous();
      order_copies_after_stores();
    }
    if (walk.count > 0) load_queries();
    bool stale = false;
#pragma unroll 1
    for (int sequence = threadIdx.x; sequence < a.batch; sequence += kThreads) {
      const SequenceRows now = rows_of(a, sequence);
      stale |= !now.same(table[sequence]);
      table[sequence].filled[1] = now.filled[1];
    }
    if (!__syncthreads_or(stale)) break;
#pragma unroll 1
    while (used < fetched) await();
  }

  const int first_pass = walk.sequence * passes + walk.pass;
  int last_pass = first_pass - 1;
  bool any = false;
  mine.clear();
#pragma unroll 1
  while (walk.count > 0) {
#pragma unroll 1
    while (room()) {
      const TileRows<T> rows = next_tile(true);
      if (rows.bytes == 0) break;
      fetch(rows);
    }
    if (at < walk.count) {
      const int exist = walk.exist(table, at, tile);
      if (exist > 0) {
        const int row = walk.row + at + (walk.group == 0 ? 0 : table[walk.sequence].first);
        const int shift = row & (Layout::kAligned - 1);
        const char* keys = ring + await() * (2 * kTileBytes) + shift * Layout::kRowBytes;
        mine.add(keys, keys + kTileBytes, exist, lane);
        any = true;
      }
      at += kWarps * tile;
      __syncwarp();
      continue;
    }
    // The segment ends.
    if (any) {
      mine.store(warp_softmax[warp], lane);
    } else if (lane < H) {
      warp_softmax[warp].top[lane] = kMinusInfinity;
      warp_softmax[warp].sum[lane] = 0;
    }
    __syncthreads();
    last_pass = walk.sequence * passes + walk.pass;
    float* const to = partials + (blockIdx.x + 2 * int64_t{last_pass} + walk.group) * kPartial;
#pragma unroll 1
    for (int i = threadIdx.x; i < H * D; i += kThreads) {
      const int h = i / D, e = i % D;
      const MergedElement merged(warp_softmax, h, e);
      to[h * (D + kPartialExtra) + e] = merged.output;
      if (e < 2) to[h * (D + kPartialExtra) + D + e] = e == 0 ? merged.top : merged.sum;
    }
    at -= whole_tiles(walk.count);
    walk.next(table, passes);
    if (walk.count > 0 && walk.sequence * passes + walk.pass != last_pass) load_queries();
    mine.clear();
    any = false;
    __syncthreads();
  }

#pragma unroll 1
  for (int base = first_pass; base <= last_pass; base += kThreads) {
    if (threadIdx.x == 0) finished_count = 0;
    __syncthreads();
    const int pass = base + threadIdx.x;
    if (pass <= last_pass) {
      const SequenceRows& rows = table[pass / passes];
      const int64_t begin = rows.before + int64_t{pass % passes} * rows.rows();
      if (rows.rows() > 0) {
        const int64_t blocks =
            divide(begin + rows.rows() - 1, plan.share) - divide(begin, plan.share) + 1;
        if (arrive(&arrivals[pass]) == blocks - 1) {
          arrivals[pass] = 0;  // for the next launch
          finished[atomicAdd(&finished_count, 1)] = pass;
        }
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = warp; i < finished_count * H; i += kWarps) {
      const int done = finished[i / H], h = i % H;
      if (done % passes_each * H + h >= heads_each) continue;
      merge<T, D>(table[done / passes], done % passes, plan.share,
                  partials + 2 * int64_t{done} * kPartial + h * (D + kPartialExtra), kPartial,
                  static_cast<T*>(a.output) + (first_query(done) + h) * D, lane);
    }
    __syncthreads();
  }
}

// A block fills a multiprocessor. The memory is busy without a few of them, which are left to
// blocks of the kernels before and after where those take a good part of the time.
constexpr int kSpareMultiprocessors = 16;
constexpr int64_t kManyBytes = int64_t{512} << 20;

inline int blocks_for(const DecodeAttention& a) {
  const int all = multiprocessors();
  if (a.blocks > 0) return std::min(a.blocks, all);
  const int64_t rows = int64_t{a.batch} * a.kv_heads * passes_of_head(a) * a.most_rows;
  const bool spare = all > 4 * kSpareMultiprocessors && rows * a.head_dim * 4 < kManyBytes;
  const int most = spare ? all - kSpareMultiprocessors : all;
  if (a.most_rows == 0) return most;
  const int tile = rows_of_tile(a.head_dim);
  return static_cast<int>(std::min<int64_t>(most, (rows + tile - 1) / tile));
}

template <class T, int D, int H>
void launch_decode_attention(const DecodeAttention& a, uint32_t* arrivals, float* partials,
                             const Launch& how) {
  const bool bulk = compiled_for(tlin_decode_attention<T, D, H>, 90);
  const int ring = bulk ? DecodeRing<D, H, true>::kBytes : DecodeRing<D, H, false>::kBytes;
  const size_t shared = ring + a.batch * sizeof(SequenceRows);
  launch(how, tlin_decode_attention<T, D, H>, "decode attention", dim3(blocks_for(a)),
         dim3(kDecodeThreads), shared, a, a.kv_heads * passes_of_head(a), arrivals, partials);
}

}  // namespace tlinformer::cuda
