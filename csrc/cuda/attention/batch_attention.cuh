// The decode attention of a batch, and of a single sequence whose query heads share keys and
// values, where there are few rows: a head's rows go through shared memory, in tiles of a warp, and
// through tensor cores, for all queries of the head at once. A warp's tiles are a ring; the first
// are asked for before the query exists, and often these are all. Each warp keeps softmaxes of its
// own, which are merged at the end, in one block of the head's cluster for each query.
#pragma once

#include "../dsmem.cuh"
#include "../warp_state.cuh"
#include "decode_attention.h"
#include "mma_rows.cuh"
#include "row_copy.cuh"
#include "window_attention.cuh"
#include "window_parts.cuh"

namespace tlinformer::cuda {

// Heads of all sequences together: no more than multiprocessors, or more.
enum class Heads { few, many };

template <Heads HEADS, int d>
constexpr int kBatchWarps = HEADS == Heads::few && d <= 64 ? 16 : 8;
// Of a tile.
template <Heads HEADS, int d>
constexpr int kBatchRows = HEADS == Heads::few && d <= 48 ? 32 : 16;
constexpr int batch_blocks_each(Heads heads, int d) {  // on a multiprocessor
  return heads == Heads::few ? 1 : d <= 36 ? 3 : d <= 96 ? 2 : 1;
}
constexpr int kBatchTiles = 16;  // most of a warp's ring
// Shared memory of the blocks on a multiprocessor, in bytes. Beside few heads' there is room for
// the kernels before and after.
constexpr int kFewMemory = 210 * 1024, kManyMemory = 200 * 1024;

// Its records begin at multiples of 16 bytes.
template <int d, Heads HEADS>
using BatchPlaces = WindowPlaces<d, kBatchWarps<HEADS, d>, kBatchRows<HEADS, d>, d + 4>;

template <class T, int d, Heads HEADS>
__global__ void __launch_bounds__(32 * kBatchWarps<HEADS, d>, batch_blocks_each(HEADS, d))
    tlin_batch_attention(const __grid_constant__ DecodeAttention a, int group, int shift_blocks,
                         int tiles) {
  constexpr int kWarps = kBatchWarps<HEADS, d>, kRows = kBatchRows<HEADS, d>;
  using Places = BatchPlaces<d, HEADS>;
  using Rows = MmaRows<T, d, kRows>;
  constexpr int kRecord = Places::kRecord;
  let_next_start();
  extern __shared__ __align__(128) char memory[];
  __shared__ uint64_t arrived[kWarps][kBatchTiles], all_records;
  __shared__ SequenceState known, current;
  const int blocks = 1 << shift_blocks,
            shift_warps = shift_blocks + (kWarps == 16 ? 4 : 3);  // a power of two, all of them
  const int head = blockIdx.x >> shift_blocks, block = blockIdx.x & (blocks - 1);
  const int sequence = blockIdx.y;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tiles_each = (tiles + kWarps - 1 - warp) / kWarps;  // of this warp
  const int most = static_cast<int>(a.most_rows);

  // Before the token's own row exists: all others are where they will be. Only `last` may be one
  // behind; then the window's last row but one comes later, too.
  constexpr int kStateWords = sizeof(SequenceState) / sizeof(int);
  const bool has_word = threadIdx.x < kStateWords;
  const int* const state = reinterpret_cast<const int*>(a.state + sequence) + threadIdx.x;
  const int known_word = load_now(state, has_word);
  const Places places(tiles, group, blocks);
  float* const records = reinterpret_cast<float*>(memory + places.records);
  const uint32_t record_barrier = shared_address(&all_records);
  if (lane < tiles_each) prepare_copies(&arrived[warp][lane]);
  if (threadIdx.x == 0 && blocks > 1) dsmem::barrier_init(record_barrier, 1);
  if (has_word) reinterpret_cast<int*>(&known)[threadIdx.x] = known_word;
  __syncthreads();
  if (blocks > 1) dsmem::arrive_at_blocks();
  const int history = static_cast<int>(known.history);
  const int compressed = a.context_rows == ContextRows::history ? history : known.compressed;
  const int context = a.context_rows == ContextRows::none ? 0 : min(max(compressed, 0), most);
  const int cached =
      static_cast<int>(min(max(known.last - history, int64_t{0}), int64_t{most - context}));
  // Units of kRows rows, first those of the context, then the window's, are dealt to all warps.
  const int warps = blocks * kWarps, place = block + warp * blocks;
  const int context_units = (context + kRows - 1) / kRows;
  const int first_row = a.window_follows_history ? history : 0;
  const int window_shift = first_row % Places::kAligned;  // rows of a copy before the first
  const auto tile_of = [&](int warp, int slot) {
    return memory + (slot * kWarps + warp) * (2 * Places::kTileBytes);
  };
  // By lane 0 of those that call, or by all where copies are not in bulk.
  const auto fetch = [&](int turn, int slot, int window_rows, int lane) {
    const int number = place + turn * warps;
    const bool of_context = number < context_units;
    const int first = (number - (of_context ? 0 : context_units)) * kRows;
    const int rows = min(kRows, (of_context ? context : window_rows) - first);
    const int shift = of_context ? 0 : window_shift;
    const uint32_t bytes =
        rows <= 0 ? 0u : static_cast<uint32_t>(((shift + rows) * d * 2 + 15) / 16 * 16);
    uint64_t* const barrier = &arrived[warp][slot];
    expect_copies(2 * bytes, barrier, lane);  // also of none: somebody waits for it
    if (bytes > 0) {
      const CachedRows& cache = of_context ? a.context : a.window;
      const int64_t offset = sequence * cache.sequence_stride + head * cache.head_stride +
                             int64_t{first - shift + (of_context ? 0 : first_row)} * d;
      char* const tile = tile_of(warp, slot);
      copy_rows(tile, static_cast<const T*>(cache.keys) + offset, bytes, barrier, lane);
      copy_rows(tile + Places::kTileBytes, static_cast<const T*>(cache.values) + offset, bytes,
                barrier, lane);
    }
    commit_copies();
  };
  if constexpr (copies_in_bulk()) {
    if (lane < tiles_each) fetch(lane, lane, cached, 0);
  } else {
#pragma unroll 1
    for (int turn = 0; turn < tiles_each; ++turn) fetch(turn, turn, cached, lane);
  }
  // The rows that no copy has brought: one more than there may be, as the token's own is not known
  // yet. Of two keys and two values a thread has 8 bytes.
  constexpr int kQuads = d / 4;
  static_assert(4 * kQuads <= 32 * kWarps);
  const uint2* newer = nullptr;
  uint2* newer_to = nullptr;
  uint64_t* newer_after = nullptr;
  if (threadIdx.x < 4 * kQuads) {
    const int quad = threadIdx.x % kQuads, which = threadIdx.x / kQuads;
    const bool is_value = which % 2 > 0;
    const int row = cached + which / 2, number = context_units + row / kRows;
    const int turn = number >> shift_warps, owner = (number & (warps - 1)) >> shift_blocks;
    if (row < most - context && int64_t{first_row + row + 1} * d <= a.window.head_stride &&
        (number & (blocks - 1)) == block && turn * kWarps + owner < tiles) {
      const int64_t offset = sequence * a.window.sequence_stride + head * a.window.head_stride +
                             int64_t{first_row + row} * d;
      newer = reinterpret_cast<const uint2*>(
                  static_cast<const T*>(is_value ? a.window.values : a.window.keys) + offset) +
              quad;
      char* const tile = tile_of(owner, turn) + (is_value ? Places::kTileBytes : 0);
      newer_to = reinterpret_cast<uint2*>(tile) + (window_shift + row % kRows) * kQuads + quad;
      newer_after = &arrived[owner][turn];
    }
  }
  const int64_t first_query = int64_t{sequence} * a.query_heads + head * group;
  const float* const queries = a.query + first_query * d;
  const float* const own_query = Rows::own_query(queries, group);
  // The other blocks have started: their barriers are there.
  if (blocks > 1) dsmem::wait_for_blocks();

  wait_for_previous();
  auto loaded = Rows::load(own_query);
  const int current_word = load_now(state, has_word);
  uint2 newer_words{};
  if (newer != nullptr) newer_words = __ldcg(newer);
  if (has_word) reinterpret_cast<int*>(&current)[threadIdx.x] = current_word;
  if constexpr (!copies_in_bulk()) {
    await_tile<1>(nullptr, 0, false);
    __syncthreads();
  }
  if (newer != nullptr) {
    if constexpr (copies_in_bulk()) await_tile<1>(newer_after, 0, false);
    *newer_to = newer_words;
  }
  __syncthreads();
  if (current.live == 0) {
    // No copy may be under way into memory that is no longer this block's.
    if (copies_in_bulk() && lane < tiles_each) await_tile<1>(&arrived[warp][lane], 0, false);
    return;
  }
  const int window = static_cast<int>(current.last) - history + 1;
  const int units = context_units + (window + kRows - 1) / kRows;
  // What has no tile yet follows in the order of its use: for eight queries after the other.
  const int turns = (units - place + warps - 1) >> shift_warps;
  const bool streams = turns > tiles_each;
  int slot = 0, next_turn = tiles_each;
  int to_fetch = streams ? (group + Rows::kQueries - 1) / Rows::kQueries * turns - tiles_each : 0;
  uint32_t parity = 0;  // of the ring's rounds
  if (streams) {
    order_copies_after_stores();
    order_copies_after_own_stores();  // of newer rows, whose tiles copies may overwrite
  }
  // Query i is merged by block i % blocks. A softmax's records are as many as warps with
  // rows of it.
  const int merges = max(group - block + blocks - 1, 0) >> shift_blocks;
  const auto records_of = [&](int softmax) {
    return min(softmax == 0 ? context_units : units - context_units, warps);
  };
  if (threadIdx.x == 0 && blocks > 1 && merges > 0) {
    dsmem::barrier_expect(record_barrier, merges * (records_of(0) + records_of(1)) * (d + 2) * 4);
  }

#pragma unroll 1
  for (int first_of_pass = 0;;) {
    const int count = min(Rows::kQueries, group - first_of_pass);
    const int own = first_of_pass + lane / 4;  // query
    const auto query = Rows::round(loaded);
    int number = place;
    if (!streams) slot = 0;
#pragma unroll 1
    for (int softmax = 0; softmax < 2; ++softmax) {
      const int first = number, end = softmax == 0 ? context_units : units;
      Rows rows;
#pragma unroll 1
      for (; number < end; number += warps) {
        const int left =
            softmax == 0 ? context - number * kRows : window - (number - context_units) * kRows;
        const T* const keys =
            reinterpret_cast<const T*>(tile_of(warp, slot)) + (softmax == 0 ? 0 : window_shift * d);
        const T* const values = keys + Places::kTileBytes / sizeof(T);
        await_tile<1>(&arrived[warp][slot], parity, false);
        if (left < kRows) {
          // Weights of zero do no harm to zeros.
          uint2* const to = reinterpret_cast<uint2*>(const_cast<T*>(values));
#pragma unroll 1
          for (int i = left * kQuads + lane; i < kRows * kQuads; i += 32) to[i] = {0, 0};
          if (to_fetch > 0) order_copies_after_own_stores();
          __syncwarp();
        }
        rows.add(query, keys, values, left);
        if (to_fetch > 0) {
          __syncwarp();  // all have read what is overwritten
          fetch(next_turn, slot, window, lane);
          --to_fetch;
          if (++next_turn == turns) next_turn = 0;
        }
        if (++slot == tiles_each && streams) {
          slot = 0;
          parity ^= 1;
        }
      }
      if (number == first) continue;
      const int rank = softmax == 0 ? first : first - context_units;  // of the warps with rows
      float* const record =
          records + ((((own >> shift_blocks) * 2 + softmax) << shift_warps) + rank) * kRecord;
      if (blocks == 1) {
        rows.finish(count, [&](int at, float2 x) { *reinterpret_cast<float2*>(record + at) = x; });
      } else {
        const uint32_t to = dsmem::address_in_block(shared_address(record), own & (blocks - 1));
        const uint32_t barrier = dsmem::address_in_block(record_barrier, own & (blocks - 1));
        rows.finish(count, [&](int at, float2 x) { dsmem::send(to + 4 * at, x, barrier); });
      }
    }
    first_of_pass += Rows::kQueries;
    if (first_of_pass >= group) break;
    loaded = Rows::load(Rows::own_query(queries + first_of_pass * d, group - first_of_pass));
  }
  if (blocks == 1) __syncthreads();
  if (merges <= warp) return;
  if (blocks > 1) dsmem::barrier_wait(record_barrier, 0);
#pragma unroll 1
  for (int m = warp; m < merges; m += kWarps) {
    const int softmax = lane / 16;
    merge_softmaxes<T, d, kRecord>(
        records + ((2 * m + softmax) << shift_warps) * kRecord, records_of(softmax),
        static_cast<T*>(a.output) + (first_query + block + (m << shift_blocks)) * d);
  }
}

// As many blocks of a head as the multiprocessors and the rows have work for, and as many tiles as
// there is room for.
template <int d, Heads HEADS>
WindowGrid batch_grid_of(const DecodeAttention& a) {
  constexpr int kWarps = kBatchWarps<HEADS, d>, kRows = kBatchRows<HEADS, d>;
  using Places = BatchPlaces<d, HEADS>;
  const int group = a.query_heads / a.kv_heads, rows = static_cast<int>(a.most_rows);
  const int heads = a.kv_heads * a.batch, most = has_clusters() ? kWindowCluster : 1;
  WindowGrid grid{1, 0};
  while (grid.blocks < most && 2 * grid.blocks * heads <= multiprocessors() &&
         rows > grid.blocks * kWarps * kRows) {
    grid.blocks *= 2;
  }
  const auto bytes = [&] { return Places(grid.tiles, group, grid.blocks).end; };
  constexpr int kOthers = 16 * 1024;  // that is not dynamic
  const int blocks = grid.blocks * heads;
  const int each =
      std::min((blocks + multiprocessors() - 1) / multiprocessors(), batch_blocks_each(HEADS, d));
  const int most_bytes = shared_memory_of_block() - kOthers;
  const int room = std::min((HEADS == Heads::few ? kFewMemory : kManyMemory) / each, most_bytes);
  grid.tiles = std::min(Places::tiles_of(rows, grid.blocks), kBatchTiles * kWarps);
  while (grid.tiles > kWarps && bytes() > room) --grid.tiles;
  return bytes() <= most_bytes ? grid : WindowGrid{};
}

template <class T, int d, Heads HEADS>
bool launch_batch_attention(const DecodeAttention& a, const Launch& how) {
  const WindowGrid grid = batch_grid_of<d, HEADS>(a);
  if (grid.blocks == 0) return false;
  constexpr int kWarps = kBatchWarps<HEADS, d>;
  Launch clusters = how;
  clusters.cluster = grid.blocks;
  clusters.shared_percent = kAllShared;
  const int group = a.query_heads / a.kv_heads;
  const BatchPlaces<d, HEADS> places(grid.tiles, group, grid.blocks);
  launch(clusters, tlin_batch_attention<T, d, HEADS>, "batch attention",
         dim3(static_cast<unsigned>(a.kv_heads * grid.blocks), static_cast<unsigned>(a.batch)),
         32 * kWarps, static_cast<size_t>(places.end), a, group, grid.shift(), grid.tiles);
  return true;
}

// False, and nothing is launched, where rows or heads are too many.
template <class T, int d>
bool launch_batch_attention(const DecodeAttention& a, const Launch& how) {
  if (a.most_rows <= 0 || a.most_rows > 16384) return false;
  if (a.kv_heads * a.batch <= multiprocessors()) {
    return launch_batch_attention<T, d, Heads::few>(a, how);
  }
  return launch_batch_attention<T, d, Heads::many>(a, how);
}

}  // namespace tlinformer::cuda
